"""Makes room for shards in a cache with a limit before they are downloaded.

Streaming looks at the limit before a download and counts its bytes after it: a node's cache may exceed the limit by a
shard for each process and thread that downloads, and a run ends where they leave no shard to evict.
"""

from collections.abc import Callable
from time import sleep, time_ns
from typing import TYPE_CHECKING

import numpy as np
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState

if TYPE_CHECKING:
    from vitcomposer.data.mds.stream import ImageStream

_REMOTE, _PREPARING, _LOCAL = (int(state) for state in (_ShardState.REMOTE, _ShardState.PREPARING, _ShardState.LOCAL))


def prepare_within_limit(stream: "ImageStream", shard_id: int, *, may_wait: bool, check: Callable[[], None]) -> bool:
    """Download a shard that is not here; False where it is, another process is at it, or it has to wait and may not.

    Args:
        may_wait: For the downloads of others to end, where the limit has no room beside them.
        check: Called while waiting; raises what ends the wait.

    Raises:
        Exception: Of the download; the shard is absent again, and its room free.
    """
    shard = stream.shards[shard_id]
    need = shard.get_max_size()  # of both forms, where it is compressed
    while (room := _take_room(stream, shard_id, need)) is None:
        if not may_wait:
            return False
        check()
        sleep(TICK)
    if not room:
        return False
    added, state = 0, _REMOTE
    try:
        added, state = stream.stream.prepare_shard(shard), _LOCAL
    finally:
        with stream._cache_filelock:
            stream.cache_usage += added - need
            stream._shard_access_times[shard_id] = time_ns()
            stream._shard_states[shard_id] = state
    return True


def _take_room(stream: "ImageStream", shard_id: int, need: int) -> bool | None:
    """Count a shard's bytes and mark it; False where it is not absent, None where others have to end first."""
    states = stream._shard_states.numpy()
    with stream._cache_filelock:
        if states[shard_id] != _REMOTE:
            return False
        limit = stream.cache_limit
        assert isinstance(limit, int)
        while stream.cache_usage + need > limit and np.any(states == _LOCAL):
            stream._evict_coldest_shard()
        # Alone, a shard comes even where the index fills the limit: nothing would make room later.
        if stream.cache_usage + need > limit and np.any(states == _PREPARING):
            return None
        stream.cache_usage += need
        states[shard_id] = _PREPARING
        return True
