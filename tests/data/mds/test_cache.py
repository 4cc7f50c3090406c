"""A cache with a limit: what comes back, and that its bytes are counted before they come."""

import pytest
from streaming import StreamingDataset

from tests.data.mds.test_stream import open_stream, write_split
from vitcomposer.data.mds import cache
from vitcomposer.data.mds.stream import StreamOptions
from vitcomposer.foundations import cache_lock, evict_coldest, shard_codes, shard_states

pytestmark = pytest.mark.timeout(60)

_, _, LOCAL = shard_codes()


def test_shard_that_is_evicted_before_it_is_read_comes_back_within_the_limit(tmp_path, monkeypatch):
    """Between the look at a shard and its use another thread may need its room."""
    root = write_split(tmp_path / "data" / "train", 100).parent
    options = StreamOptions(cache_limit="40kb", predownload=4)
    dataset = open_stream(tmp_path / "cache", remote=str(root), options=options)
    bring, streamings, evicted, states = cache.download_within_limit, StreamingDataset.prepare_shard, [], []

    def evict_at_once(dataset, shard_id, *args, **options):
        came = bring(dataset, shard_id, *args, **options)
        if not came and len(evicted) < 3:  # it is here
            with cache_lock(dataset):
                evict_coldest(dataset)
            evicted.append(shard_id)
        return came

    def look(dataset, shard_id, blocking=True):
        states.append(shard_states(dataset)[shard_id])
        streamings(dataset, shard_id, blocking)

    monkeypatch.setattr(cache, "download_within_limit", evict_at_once)
    monkeypatch.setattr(StreamingDataset, "prepare_shard", look)
    dataset.prepare_shard(0)
    for _ in range(3):
        dataset.prepare_shard(0)  # alone in the cache: it is what is evicted
        assert shard_states(dataset)[0] == LOCAL and dataset.cache_usage <= 40 * 1024
    dataset.prepare_shard(0)
    assert evicted == [0, 0, 0] and states == [LOCAL], "Streaming's own meets no absent shard, which it would download"
