"""Compressed shards: what Streaming unpacks, bounded by the size that an index states."""

import contextlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstd
from streaming.base.compression import compress

from tests.data.mds.test_stream import load, open_stream, write_split
from vitcomposer.data.conversion.inspect import inspect_data
from vitcomposer.data.mds.unpack import unpack
from vitcomposer.errors import ShardError

ALGORITHMS = ("br:5", "bz2", "gz:1", "snappy", "zstd:3", "zstd")
BOMB = 1 << 25  # bytes that become a few thousand


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", [0, 1, 255, 256, 70_000, 1 << 21])
def test_what_streaming_compresses_comes_back(algorithm: str, size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, size, dtype="u1").tobytes()
    for data in (noise, bytes(size)):
        assert unpack(algorithm, compress(algorithm, data), size) == data


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("stated", [0, 1000, BOMB - 1, BOMB + 1])
def test_another_size_is_refused(algorithm: str, stated: int) -> None:
    with pytest.raises(
        ValueError, match=rf"another size than the {stated} bytes|to {BOMB} bytes, its index says {stated}"
    ):
        unpack(algorithm, compress(algorithm, bytes(BOMB)), stated)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bomb_takes_no_more_memory_than_stated(algorithm: str) -> None:
    data = compress(algorithm, bytes(BOMB))
    tracemalloc.start()
    with pytest.raises(ValueError, match="another size"):
        unpack(algorithm, data, 1000)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_frames_that_hide_their_size_are_refused() -> None:
    one = zstd.compress(bytes(1000), 3)
    with pytest.raises(ValueError, match="another size"):
        unpack("zstd", one + zstd.compress(bytes(BOMB), 3), 1000)
    without = bytearray(zstd.compress(bytes(100_000), 3))
    without[4:9] = bytes([0, 0x58])  # a window in the place of the size
    with pytest.raises(ValueError, match="another size"):
        unpack("zstd", bytes(without), 100_000)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_damage_is_a_value_error_and_never_more_bytes(algorithm: str) -> None:
    data = bytes(range(256)) * 4
    packed = bytearray(compress(algorithm, data))
    for place, byte in enumerate(packed[:400]):
        for other in (byte ^ 0xFF, 0, 0xFF):
            packed[place] = other
            with contextlib.suppress(ValueError):
                assert len(unpack(algorithm, bytes(packed), len(data))) == len(data)
        packed[place] = byte
    for length in range(0, len(packed), 9):
        with pytest.raises(ValueError):
            unpack(algorithm, bytes(packed[:length]), len(data))


def test_unknown_compression_is_named() -> None:
    with pytest.raises(ValueError, match="'lzma' is not one of br, bz2, gz, snappy, zstd"):
        unpack("lzma", b"", 0)


def test_shard_that_unpacks_to_more_than_its_index_says_is_named(tmp_path: Path) -> None:
    root = write_split(tmp_path / "data" / "train", compression="zstd", hashes=[])
    index = json.loads((root / "index.json").read_bytes())
    zipped = index["shards"][0]["zip_data"]
    bomb = zstd.compress(bytes(BOMB), 3)
    (root / zipped["basename"]).write_bytes(bomb)
    zipped["bytes"] = len(bomb)
    (root / "index.json").write_text(json.dumps(index))
    size = index["shards"][0]["raw_data"]["bytes"]
    with pytest.raises(ShardError, match=rf"{zipped['basename']}.*another size than the {size} bytes of its index"):
        list(load(open_stream(tmp_path / "data"), 0))
    (report,) = inspect_data(str(tmp_path / "data"), decode=True)
    assert report.samples == sum(shard["samples"] for shard in index["shards"])
