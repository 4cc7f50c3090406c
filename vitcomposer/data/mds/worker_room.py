"""Checks that a machine has room for loader workers: open files, and shared memory for the batches on their way."""

import logging
import os
import resource
import warnings
from functools import cache
from pathlib import Path

from vitcomposer.errors import require

log = logging.getLogger(__name__)

MEMORY = Path("/dev/shm")  # Linux: where blocks of shared memory can be listed

_FILES, _FILES_OF_WORKER = 192, 48  # descriptors: of a run on its own, and for each worker's batches on their way
_MOST = 1024  # where nothing limits the open files; the schema takes no more
_STREAMING_BYTES = 1 << 20  # its blocks are a page or a few each


def check_worker_room(key: str, workers: int, *, prefetch_factor: int = 2, batch_bytes: int = 0) -> None:
    """Refuse loader workers for which this machine has no room, in open files and in /dev/shm.

    A write beyond the end of /dev/shm kills a process without a word (SIGBUS); without a free descriptor a batch never
    arrives. The limit of open files is raised as far as the system lets this process.

    Args:
        key: What sets the number of workers, for the message.
        workers: Loader workers of this process; the other ranks of the machine have as many.
        prefetch_factor: Batches that a worker makes ahead.
        batch_bytes: Of the images of one batch.

    Raises:
        ConfigError: Streaming's own blocks, or the batches that wait for the model, are larger than what is free; the
            hard limit of open files is too low.
    """
    _compare_with_cores(key, workers)
    _allow_open_files(files_needed(workers))
    if not MEMORY.is_dir():
        return
    free, ranks = free_bytes(), _ranks()
    enlarge = "Enlarge it (docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm)"
    require(free >= _STREAMING_BYTES, str(MEMORY), "a place with 1 MiB of room", f"{free:,} bytes", f"{enlarge}.")
    each = _bytes_of_worker(prefetch_factor, batch_bytes)
    fit = (free - _STREAMING_BYTES) // each
    rule = f"at most {fit}: {MEMORY} has {free / 1e6:,.0f} MB free, and a worker needs {each / 1e6:,.0f} MB for batches"
    rule += f" (of {ranks} ranks)" if ranks > 1 else ""
    require(workers <= fit, key, rule, workers, f"{enlarge}, or set {key}={fit}.")


def workers_with_room(*, prefetch_factor: int, batch_bytes: int) -> int:
    """Workers of this process, at most, that :func:`check_worker_room` lets pass on this machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    by_files = _MOST if hard == resource.RLIM_INFINITY else (hard - _FILES) // _FILES_OF_WORKER
    if not MEMORY.is_dir():
        return max(0, by_files)
    by_bytes = (free_bytes() - _STREAMING_BYTES) // _bytes_of_worker(prefetch_factor, batch_bytes)
    return max(0, min(by_files, by_bytes))


def _bytes_of_worker(prefetch_factor: int, batch_bytes: int) -> int:
    """Of shared memory, for a worker of each rank of this machine."""
    return max(1, _ranks() * prefetch_factor * batch_bytes)


def _ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@cache
def _compare_with_cores(key: str, workers: int) -> None:
    """Say in a line, once, what each DataLoader of PyTorch says in five."""
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    cores = len(os.sched_getaffinity(0))
    if workers > cores and os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning("%s is %d, more than the cores of this machine (%d): try %s=%d.", key, workers, cores, key, cores)


def files_needed(workers: int) -> int:
    """Descriptors of a process with so many loader workers."""
    return _FILES + _FILES_OF_WORKER * workers


def bytes_needed(workers: int, prefetch_factor: int, batch_bytes: int) -> int:
    """Of shared memory, for the workers of one process."""
    return _STREAMING_BYTES + workers * prefetch_factor * batch_bytes


def _allow_open_files(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        remedy = f"Raise it (ulimit -n {needed}, docker run --ulimit nofile={needed}), or lower data.num_workers."
        require(False, "The limit of open files", f"at least {needed} here", hard, remedy)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def free_bytes() -> int:
    """Of shared memory."""
    found = os.statvfs(MEMORY)
    return found.f_bavail * found.f_frsize
