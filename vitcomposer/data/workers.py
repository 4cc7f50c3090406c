"""Decides how many processes load the images of a rank, by the CPU cores that the ranks of a machine may use."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vitcomposer.data.mds.worker_room import workers_with_room
from vitcomposer.schema import Data

MOST = 32  # of a rank beside a GPU; more than fill one that trains ViT-S at 224 pixels
MOST_ON_CPU = 4  # of a rank that trains on the CPU, where one worker decodes more than many cores train
_CORES_OF_WORKER = 4  # on a CPU

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True, kw_only=True)
class Place:
    """What one rank may use of its machine.

    Attributes:
        node: The number of the machine.
        cores: Those that its process may run on; other ranks of the machine may have the same.
        quota: Cores' worth of time that the container of the machine's ranks has; None where nothing limits it.
        room: Workers whose batches and open files there is room for.
    """

    node: int = 0
    cores: frozenset[int]
    quota: float | None
    room: int


@dataclass(frozen=True)
class Workers:
    """The number of workers of each rank, and why it is that."""

    count: int
    reason: str


def here(*, node: int = 0, prefetch_factor: int, batch_bytes: int = 0) -> Place:
    """The place of this process.

    Args:
        prefetch_factor: Batches that a worker makes ahead.
        batch_bytes: Of the images of one batch.
    """
    room = workers_with_room(prefetch_factor=prefetch_factor, batch_bytes=batch_bytes)
    return Place(node=node, cores=_affinity(), quota=_quota(), room=room)


def choose_workers(ranks: Sequence[Place], *, gpu: bool) -> Workers:
    """The workers of each rank, of which all have as many.

    Beside a GPU a worker for each core of the rank but one, which its own process needs to start the GPU's work. Where
    the CPU trains, one for every four cores of the rank, since the step computes on them. At least one, and none for
    which a machine has no room.

    Args:
        ranks: The places of all ranks of the run.
        gpu: Whether GPUs train.
    """
    shares = {rank: _share(rank, ranks) for rank in ranks}
    least = min(shares, key=lambda rank: shares[rank])
    share = max(1, math.floor(shares[least] + 1e-6))
    wanted = min(share - 1, MOST) if gpu else min(share // _CORES_OF_WORKER, MOST_ON_CPU)
    room = min(rank.room for rank in ranks)
    count = max(1, min(wanted, room))
    reason = _in_words(least, ranks, share)
    if room < wanted:
        return Workers(count, f"{reason}, and there is no room for more (docker run --shm-size=16g, ulimit -n)")
    rule = "all but one" if gpu else "one for every four, as training computes on them too"
    limits = f", from 1 to {MOST if gpu else MOST_ON_CPU}"
    return Workers(count, f"{reason}, {rule}{limits}")


def _in_words(least: Place, ranks: Sequence[Place], share: int) -> str:
    beside = sum(rank.node == least.node for rank in ranks)
    cores = f"{share} CPU core{'s' * (share != 1)}"
    return f"{cores} for each of {beside} ranks" if beside > 1 else cores


def _share(rank: Place, ranks: Sequence[Place]) -> float:
    """Cores of a rank, those that it shares with others counted in parts."""
    beside = [other for other in ranks if other.node == rank.node]
    users = Counter(core for other in beside for core in other.cores)
    share = sum(1 / users[core] for core in rank.cores)
    return share if rank.quota is None else min(share, rank.quota / len(beside))


def number_of_workers(data: Data, *, gpu: bool, batch_bytes: int = 0) -> int:
    """``data.num_workers`` as a number: what ``auto`` is for a process that does not ask the other ranks.

    Args:
        batch_bytes: Of the images of one batch.
    """
    if isinstance(data.num_workers, int):
        return data.num_workers
    place = here(prefetch_factor=data.prefetch_factor, batch_bytes=batch_bytes)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return choose_workers([place] * ranks, gpu=gpu).count


def planned_workers(cores: int, ranks: int, *, gpu: bool = True) -> int:
    """What ``auto`` is for each of the ranks of machines that have so many cores together, and room for all workers."""
    place = Place(cores=frozenset(range(cores)), quota=None, room=MOST)
    return choose_workers([place] * ranks, gpu=gpu).count


def usable_cores() -> int:
    """CPU cores that this process may use, by its affinity and by the quota of its container."""
    count, quota = len(_affinity()), _quota()
    return count if quota is None else min(count, max(1, round(quota)))


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _quota() -> float | None:
    """The least of the quotas of the control groups that this process is in."""
    with suppress(OSError):
        return min(_quotas(_OWN_GROUPS.read_text().splitlines()), default=None)
    return None


def _quotas(groups: Sequence[str]) -> Iterator[float]:
    """Those of the groups, and of the groups that these are in: version 2 has one file of it, version 1 two."""
    for group in groups:
        number, controllers, path = group.split(":", 2)
        if number == "0":
            yield from (_ratio(*text.split()) for text in _texts(_CONTROL_GROUPS, path, "cpu.max") if text[:3] != "max")
        elif "cpu" in controllers.split(","):
            root = _CONTROL_GROUPS / "cpu"
            of_time, periods = (_texts(root, path, f"cpu.cfs_{name}_us") for name in ("quota", "period"))
            yield from (_ratio(*pair) for pair in zip(of_time, periods, strict=False) if pair[0] != "-1")


def _ratio(quota: str, period: str) -> float:
    return int(quota) / int(period)


def _texts(root: Path, group: str, name: str) -> Iterator[str]:
    """A file of a group and of those above it, where it is there: a container may see its own group as the root."""
    below = Path(group.lstrip("/"))
    for path in (below, *below.parents):
        with suppress(OSError):
            yield (root / path / name).read_text().strip()
