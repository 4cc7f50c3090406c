"""Reaches what Composer and Streaming keep private, a function for each such place and a row of docs/foundations.md.

Written for mosaicml 0.32.1 and mosaicml-streaming 0.13.0; tests/test_foundations.py has a test for each function that
fails when the private thing is gone or behaves otherwise. Both libraries are imported inside the functions, so that a
module which needs one of them does not load the other.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock
from numpy.typing import NDArray

if TYPE_CHECKING:
    import numpy as np
    from composer import Trainer
    from composer.algorithms import EMA
    from composer.algorithms.ema.ema import EMAParameters
    from composer.callbacks import CheckpointSaver
    from composer.core import State
    from composer.utils import LibcloudObjectStore
    from streaming import Stream, StreamingDataset
    from streaming.base.format import FileInfo
    from streaming.base.world import World
    from torch import nn
    from torch.distributed.checkpoint.storage import StorageReader


class ShardCodes(NamedTuple):
    """How the array of :func:`shard_states` says where a shard is."""

    remote: int
    preparing: int
    local: int


def forget_engine(trainer: Trainer) -> None:
    """Drop what keeps a closed run, with its weights, to the end of the process."""
    atexit.unregister(trainer.engine._close)


@contextmanager
def lean_steps(trainer: Trainer) -> Iterator[None]:
    """Within it Composer's loop copies no batch and composes no log line that nobody asked for.

    The Trainer copies each microbatch after its transforms, pixels of float32, for metrics of training images in case
    something changes the batch in place. Here they get the batch itself. Its engine composes a line for each event and
    each callback and writes it where the environment has ENGINE_DEBUG.
    """
    from composer.trainer import trainer as their_module
    from torch import Tensor

    module: Any = their_module
    theirs: Callable[[Any], Any] = module.deepcopy

    def copied(value: Any) -> Any:
        is_batch = type(value) is dict and any(isinstance(entry, Tensor) for entry in value.values())
        return dict(value) if is_batch else theirs(value)

    module.deepcopy = copied
    if not os.environ.get("ENGINE_DEBUG"):
        trainer.engine._debug_log = lambda event, msg: None
    try:
        yield
    finally:
        module.deepcopy = theirs
        vars(trainer.engine).pop("_debug_log", None)


@contextmanager
def load_checkpoints_with(load: Callable[[Path | str, str], Any], shares: type[StorageReader]) -> Iterator[None]:
    """Within it a Trainer reads checkpoints through others' hands than ``torch.load(weights_only=False)``.

    Args:
        load: Makes the content of a file, for a ``map_location``.
        shares: Reads a folder of shares; made with its path.
    """
    from composer.utils import checkpoint

    theirs = checkpoint._torch_load_with_validation, checkpoint.FileSystemReaderWithValidation
    checkpoint._torch_load_with_validation = load
    checkpoint.FileSystemReaderWithValidation = shares  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        checkpoint._torch_load_with_validation, checkpoint.FileSystemReaderWithValidation = theirs


def save_checkpoints_with(saver: CheckpointSaver, save: Callable[[State, Any], None]) -> None:
    """Have Composer's saver say when, and ``save`` write the checkpoint of a state, with the logger beside it."""
    saver._save_checkpoint = save  # pyright: ignore[reportAttributeAccessIssue]


def average_should_start(average: EMA, state: State) -> bool:
    """Whether the time ``ema_start`` of a moving average has come."""
    return average._should_start(state)


def new_average(model: nn.Module) -> EMAParameters:
    """Copies of a model's parameters and buffers, as a moving average keeps them."""
    from composer.algorithms.ema.ema import EMAParameters

    return EMAParameters(model)


def delete_from_libcloud(store: LibcloudObjectStore, key: str) -> None:
    """Delete an object, which Composer's stores cannot."""
    store._provider.delete_object(store._provider.get_object(store._container.name, key))


def shard_codes() -> ShardCodes:
    """What the numbers in :func:`shard_states` mean."""
    from streaming.base.dataset import _ShardState

    return ShardCodes(int(_ShardState.REMOTE), int(_ShardState.PREPARING), int(_ShardState.LOCAL))


def shard_states(dataset: StreamingDataset) -> NDArray[np.uint8]:
    """Where each shard is, (shards,), in memory that all processes of the node share; see :func:`shard_codes`."""
    return dataset._shard_states.numpy()


def access_times(dataset: StreamingDataset) -> NDArray[np.uint64]:
    """When each shard was last used, (shards,) in nanoseconds, shared as the states are."""
    return dataset._shard_access_times.numpy()


def cache_lock(dataset: StreamingDataset) -> FileLock:
    """What a process must hold to change states, access times or the count of bytes in the cache."""
    return dataset._cache_filelock


def evict_coldest(dataset: StreamingDataset) -> None:
    """Delete the shard of the cache that was used longest ago; the lock of the cache must be held."""
    dataset._evict_coldest_shard()


def open_locks(dataset: StreamingDataset) -> None:
    """Make the locks of a data set anew in this process: those from before a fork belong to its parent."""
    from streaming.base.constant import CACHE_FILELOCK

    dataset._shared_barrier.lock = FileLock(dataset._shared_barrier.filelock_path)
    dataset._cache_filelock = FileLock(dataset._cache_filelock_path)
    # Streaming asks for its lock under this name and, not finding it, would make a new one for every call.
    setattr(dataset, CACHE_FILELOCK, dataset._cache_filelock)


def put_locks(dataset: StreamingDataset, barrier: Path, cache: Path) -> None:
    """Say where the files of the two locks lie that :func:`open_locks` opens."""
    dataset._shared_barrier.filelock_path, dataset._cache_filelock_path = str(barrier), str(cache)


def number_in_memory(dataset: StreamingDataset) -> int:
    """With which the names of a data set's blocks of shared memory begin, as six digits."""
    return dataset._shm_prefix_int


@contextmanager
def choose_number(find: Callable[[], int] | None) -> Iterator[None]:
    """Within it ``find`` chooses the number of a data set that is made; None leaves it to Streaming's own search."""
    from streaming.base.shared import prefix

    search = prefix._check_and_find
    if find is not None:
        prefix._check_and_find = lambda *_, **__: find()
    try:
        yield
    finally:
        prefix._check_and_find = search


def rank_of(dataset: StreamingDataset) -> World:
    """Which rank of how many a data set was made in."""
    return dataset._unique_rank_world


def begin_epoch(dataset: StreamingDataset) -> tuple[World, int, int]:
    """Count the next epoch, or go on in the one that was resumed, in step with the node's other workers.

    Returns:
        This worker among all; the epoch; samples of it that were seen before, over all ranks.
    """
    dataset._unique_worker_world = dataset._unique_rank_world.detect_workers()
    dataset._parallel_worker_world = dataset._parallel_rank_world.detect_workers()
    return dataset._unique_worker_world, *dataset._resume_incr_epoch()


def wait_for_workers(dataset: StreamingDataset, count: int) -> None:
    """Until so many workers of the node have come here."""
    dataset._shared_barrier(count)


def transfer_with(
    stream: Stream,
    fetch: Callable[[str], str],
    unpack: Callable[[FileInfo, str, str, str | None], None],
) -> None:
    """Have a stream get the files of its shards through other hands.

    Args:
        fetch: Brings the file of that name; returns its path here.
        unpack: Turns a compressed file (its entry in the index, its path) into a raw one (its path); the last is the
            name of the compression.
    """
    stream._download_file = fetch  # pyright: ignore[reportAttributeAccessIssue]
    stream._decompress_shard_part = unpack  # pyright: ignore[reportAttributeAccessIssue]
