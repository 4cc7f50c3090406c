"""How the runs of one machine set up their data sets without disturbing each other."""

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from streaming.base.distributed import get_local_rank
from streaming.base.shared import prefix
from streaming.base.world import World


@contextmanager
def one_start_at_a_time() -> Iterator[None]:
    """Let the runs of a machine set up their StreamingDatasets one after the other.

    Streaming looks for a free name in shared memory and takes it in a second step, so two runs that start together can
    choose the same. Its ranks look on their own: they wait until their leader holds the lock. After a minute it goes
    on without, since two runs that share several nodes could wait for each other. Each node of a run looks from a
    number of its own, so that two nodes can also be two launchers on one machine.
    """
    node = World.detect().node
    lock = FileLock(Path(tempfile.gettempdir(), f"vitcomposer-{os.getuid()}-{node}.lock"), timeout=60)
    numbers = prefix._each_prefix_int
    prefix._each_prefix_int = lambda: itertools.count(10_000 * node)
    if get_local_rank() == 0:
        with suppress(Timeout):
            lock.acquire()
    try:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        yield
    finally:
        prefix._each_prefix_int = numbers
        lock.release()
