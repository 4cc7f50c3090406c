"""Makes room for shards in a cache with a limit before they are downloaded.

Streaming looks at the limit before a download and counts its bytes after it: a node's cache may exceed the limit by a
shard for each process and thread that downloads, and a run ends where they leave no shard to evict.
"""

from collections.abc import Callable
from time import sleep, time_ns

import numpy as np
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.format import Reader

from vitcomposer.foundations import access_times, cache_lock, evict_coldest, shard_codes, shard_states

_REMOTE, _PREPARING, _LOCAL = shard_codes()


def prepare_within_limit(
    dataset: StreamingDataset,
    shard_id: int,
    download: Callable[[Reader], int],
    use: Callable[[int], None],
    *,
    may_wait: bool,
    check: Callable[[], None],
) -> None:
    """Have a shard here, as it is needed now.

    Args:
        download: Fetches a shard; returns how many bytes came.
        use: Streaming's own, for one that is here: it notes the time, and unpacks what is here compressed alone.
        may_wait: For another process that is at it, and for downloads to end where the limit has no room beside them.
        check: Called while waiting; raises what ends the wait.

    Raises:
        Exception: Of the download; the shard is absent again, and its room free.
    """
    while not download_within_limit(dataset, shard_id, download, may_wait=may_wait, check=check) and may_wait:
        with cache_lock(dataset):
            # Nobody can evict it meanwhile: Streaming would download an absent one beyond the limit.
            if shard_states(dataset)[shard_id] == _LOCAL:
                return use(shard_id)
        check()
        sleep(TICK)


def download_within_limit(
    dataset: StreamingDataset,
    shard_id: int,
    download: Callable[[Reader], int],
    *,
    may_wait: bool,
    check: Callable[[], None],
) -> bool:
    """Download a shard that is not here; False where it is, another process is at it, or it has to wait and may not.

    The lock, the states and the counts are Streaming's own, which all processes of a node share.
    """
    shard = dataset.shards[shard_id]
    need = shard.get_max_size()  # of both forms, where it is compressed
    while (room := _take_room(dataset, shard_id, need)) is None:
        if not may_wait:
            return False
        check()
        sleep(TICK)
    if not room:
        return False
    added, state = 0, _REMOTE
    try:
        added, state = download(shard), _LOCAL
    finally:
        with cache_lock(dataset):
            dataset.cache_usage += added - need
            access_times(dataset)[shard_id] = time_ns()
            shard_states(dataset)[shard_id] = state
    return True


def _take_room(dataset: StreamingDataset, shard_id: int, need: int) -> bool | None:
    """Count a shard's bytes and mark it; False where it is not absent, None where others have to end first."""
    states = shard_states(dataset)
    with cache_lock(dataset):
        if states[shard_id] != _REMOTE:
            return False
        limit = dataset.cache_limit
        assert isinstance(limit, int)
        while dataset.cache_usage + need > limit and np.any(states == _LOCAL):
            evict_coldest(dataset)
        # Alone, a shard comes even where the index fills the limit: nothing would make room later.
        if dataset.cache_usage + need > limit and np.any(states == _PREPARING):
            return None
        dataset.cache_usage += need
        states[shard_id] = _PREPARING
        return True
