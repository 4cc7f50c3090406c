"""Keeps the runs of one machine apart in shared memory, and clears what killed ones left."""

import atexit
import fcntl
import itertools
import os
import signal
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from streaming import StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.distributed import get_local_rank
from streaming.base.world import World

from vitcomposer.data.mds.worker_room import MEMORY as _MEMORY
from vitcomposer.foundations import choose_number, number_in_memory, put_locks

_LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)


@contextmanager
def one_start_at_a_time() -> Iterator[None]:
    """Let the runs of a machine set up their StreamingDatasets one after the other.

    Streaming looks for a free number in shared memory and takes it in a second step, so two runs that start together
    can choose the same. Its ranks look on their own: they wait until their leader holds the lock. After a minute it
    goes on without, since two runs that share several nodes could wait for each other.
    """
    node = World.detect().node
    # Where the blocks are, which runs with temporary folders of their own share too.
    folder = _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())
    lock = FileLock(folder / f"vitcomposer-{os.getuid()}-{node}.lock", timeout=60)
    if get_local_rank() == 0:
        _acquire(lock)
    try:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        with choose_number((lambda: _free_number(node)) if _MEMORY.is_dir() else None):
            yield
    finally:
        lock.release()


def _acquire(lock: FileLock) -> None:
    """Take the lock, or say why the start goes on without: a file there that is not this user's must not stop it."""
    path = Path(lock.lock_file)
    try:
        found = path.lstat() if os.path.lexists(path) else None
        if found is None or (stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()):
            with suppress(Timeout):
                lock.acquire()
            return
        why = f"belongs to user {found.st_uid}" if found.st_uid != os.getuid() else "is no plain file"
    except OSError as error:
        why = f"cannot be opened: {error.strerror}"
    print(
        f"warning: {path} {why}; going on without it. Two starts at the same moment on this machine may now disturb "
        "each other: remove it.",
        file=sys.stderr,
    )


def ignore_interrupt(worker_id: int) -> None:
    """For ``DataLoader(worker_init_fn=...)``: a terminal sends Ctrl-C to the loader workers too.

    The main process decides what happens, and needs its workers meanwhile.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _free_number(node: int) -> int:
    """The first number that no block of shared memory has; of each node's own, for two of them can be one machine.

    Streaming's own search takes the first that is free for each kind of block, and of these the highest, which may be
    another run's. It also refuses a cache that another run reads, whose files appear whole here.
    """
    taken = {path.name[:6] for path in _belongings()}
    first = 10_000 * node + 100 * (os.getuid() % 97)  # other users have other locks
    return next(number for number in itertools.count(first) if f"{number:06}" not in taken)


def _belongings() -> list[Path]:
    """Blocks and lock files of all data sets of this machine."""
    kinds = (*SHM_TO_CLEAN, *_LOCKS)
    return [_MEMORY / name for name in os.listdir(_MEMORY) if name[:6].isdecimal() and name[7:] in kinds]


def lock_in_memory(dataset: StreamingDataset) -> None:
    """Put the lock files of a data set beside its shared memory, and away with it when this process ends.

    Streaming leaves two in the temporary folder for every data set that there ever was, and passes their numbers over.
    The block that names the data set is held by a lock of the system, shared by its ranks and workers, for as long as
    one of them lives: that is what tells its memory from that of a killed run, in every container that sees it.
    """
    if not _MEMORY.is_dir():
        return
    number = f"{number_in_memory(dataset):06}"
    barrier, cache = (_MEMORY / f"{number}_{name}" for name in _LOCKS)
    put_locks(dataset, barrier, cache)
    held = os.open(_MEMORY / f"{number}_{LOCALS}", os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(held, fcntl.LOCK_SH)
    weakref.finalize(dataset, os.close, held)
    if get_local_rank() == 0:
        for path in (barrier, cache):
            atexit.register(path.unlink, missing_ok=True)


def clear_stale_memory() -> None:
    """Remove the shared memory and the locks of killed runs, which Streaming would stumble over (its issue 781).

    Only what no process holds: ``streaming.base.util.clean_stale_shared_memory`` also takes the memory of a run that is
    alive on this machine. To be called within :func:`one_start_at_a_time`: a data set that is being made holds nothing
    yet. Outside Linux, where the blocks cannot be listed, nothing is done.
    """
    if not _MEMORY.is_dir() or not os.path.isdir("/proc/self"):
        return
    found = _belongings()
    in_use = _mapped_files() if found else ""
    for path in found:
        # A data set maps the block that names it before it locks anything, and for as long as it lives.
        named = path.with_name(f"{path.name[:6]}_{LOCALS}")
        holder = path if path.name[7:] in SHM_TO_CLEAN else named
        # The memory of other users of Streaming is not held by a lock; of those in other containers nothing is seen.
        if not _is_held(named) and str(holder) not in in_use:
            with suppress(FileNotFoundError):  # another start removes it too
                if path.stat().st_uid == os.getuid():
                    path.unlink()


def _is_held(path: Path) -> bool:
    """Whether a process, in whichever container, has the lock of :func:`lock_in_memory`."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:  # of another user
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(file)


def _mapped_files() -> str:
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            found.append(maps.read_text())
        except OSError:  # ended since, or another user's
            continue
    return "\n".join(found)
