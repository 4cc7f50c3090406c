"""Mapped shards: slices without copies or descriptors, dropped with their shard, and no way to a bus error."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter
from streaming.base.hashing import get_hash, get_hashes

from tests.data.mds.test_columns import write_columns
from tests.data.mds.test_stream import image, jpeg, load, open_stream, raw_sample, shard, write_split
from vitcomposer.data.jpeg.decode import decode_rgb
from vitcomposer.data.mds import reader as rows_module
from vitcomposer.data.mds import shards as shards_module
from vitcomposer.data.mds.reader import RowReader
from vitcomposer.data.mds.stream import StreamOptions
from vitcomposer.errors import ConfigError, ShardError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path / "data" / "train")
    return tmp_path / "data"


def reader(root: Path) -> RowReader:
    return open_stream(root)._rows


def mapped(root: Path, *, deleted: bool = False) -> list[str]:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{root}/" in line and ".mds" in line]
    return [line for line in lines if line.endswith("(deleted)")] if deleted else lines


def test_an_image_is_a_read_only_slice_of_the_map(root):
    rows = reader(root)
    found, label, _ = rows.read(0, 3)
    assert (bytes(found), label) == (jpeg(3), 3)
    assert isinstance(found, memoryview) and found.readonly and found.format == "B"
    again, *_ = rows.read(0, 3)
    assert np.frombuffer(again, np.uint8).ctypes.data == np.frombuffer(found, np.uint8).ctypes.data
    assert len(mapped(root)) == 1


def test_maps_hold_no_descriptors_and_are_bounded(root, monkeypatch):
    rows = reader(root)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(6):
        rows.read(number, 0)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(mapped(root)) == 6
    monkeypatch.setattr(rows_module, "MAX_MAPS", 2)
    rows = reader(root)
    for number in (0, 1, 0, 2):
        rows.read(number, 0)
    assert sorted(rows._mapped) == [0, 2]


def test_a_sample_outlives_its_map_and_then_frees_the_disk(root):
    rows = reader(root)
    found, *_ = rows.read(2, 0)
    expected = bytes(found)
    shard(root).unlink()
    rows.forget_changed()
    assert rows._mapped == {}
    assert bytes(found) == expected
    assert len(mapped(root, deleted=True)) == 1
    del found
    assert mapped(root) == []


def test_forgetting_drops_only_what_is_gone(root):
    rows = reader(root)
    for number in range(4):
        rows.read(number, 0)
    rows.forget(np.arange(6) % 2 == 0)
    assert sorted(rows._mapped) == [1, 3]
    rows.forget_changed()
    assert sorted(rows._mapped) == [1, 3]


def test_a_replaced_file_is_mapped_anew(root):
    rows = reader(root)
    rows.read(2, 0)
    path = shard(root)
    data = bytearray(path.read_bytes())
    data[-8:] = (77).to_bytes(8, "little")  # the label of the last row
    (root / "new").write_bytes(data)
    (root / "new").rename(path)
    last = open_stream(root).samples_per_shard[2] - 1
    rows.forget_changed()
    assert rows.read(2, last)[1] == 77


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_file_cut_in_place_is_an_error_and_no_bus_error(root, is_mapped):
    rows = reader(root)
    if is_mapped:
        rows.read(2, 0)
    os.truncate(shard(root), 4096)
    rows.forget_changed()
    with pytest.raises(ShardError, match="has 4096 bytes, its index says"):
        rows.read(2, 9)
    with pytest.raises(ShardError):
        rows.fetch(2, 9)


def test_cutting_a_shard_in_the_middle_of_an_epoch_is_found_at_the_next_look(tmp_path):
    """And not later: bytes of a mapped file that are gone would end the process."""
    root = write_split(tmp_path / "data" / "train", 1200).parent
    stream = open_stream(root, shuffle=False, batch_size=64)
    list(stream)
    samples = iter(stream)
    for _ in range(10):
        next(samples)
    last = sorted(root.rglob("*.mds"))[-1]
    os.truncate(last, 100)
    with pytest.raises(ShardError, match=f"{last} cannot be read: the file has 100 bytes"):
        list(samples)


def test_damaged_tables_and_heads_never_crash(root):
    """With the hash off, so that damage gets as far as the rows."""
    path = shard(root, 0)
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    errors = 0
    rows = reader(root)
    for turn in range(300):
        data = bytearray(sound)
        count = int.from_bytes(data[:4], "little")
        heads = [int.from_bytes(data[4 + 4 * row : 8 + 4 * row], "little") for row in range(count)]
        places = list(range(4 * count + 8)) + [at + i for at in heads for i in range(4)]
        for place in rng.choice(places, rng.integers(1, 4)):
            data[place] = rng.integers(0, 256) if turn % 2 else data[place] ^ (1 << rng.integers(0, 8))
        path.write_bytes(data)
        rows.forget(np.ones(6, bool))
        for row in range(count):
            try:
                found, *_ = rows.read(0, row)
                bytes(found)
            except ShardError:
                errors += 1
    assert errors > 300


def test_evicted_shards_are_not_kept_on_the_disk_by_their_maps(tmp_path):
    root = write_split(tmp_path / "data" / "train", 200).parent
    cache = tmp_path / "cache"
    stream = open_stream(cache, remote=str(root), options=StreamOptions(cache_limit="40kb", predownload=4))
    for _ in range(2):
        held = [len(mapped(cache, deleted=True)) for _ in stream]
        assert len(held) == 200
        assert max(held) <= 10  # evicted and fetched again since the files were last looked at; 19 were they never
        assert mapped(cache) == []


def test_rows_of_a_missing_file_can_be_asked_for(root):
    stream = open_stream(root)
    stream._fetch([(1, 0)])
    os.remove(shard(root, 1))
    stream._rows.forget_changed()
    stream._fetch([(1, 0)])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1"])
def test_pil_columns_become_raw_samples(tmp_path, mode):
    picture = image(5).convert(mode)
    write_columns(tmp_path, {"x": "pil", "y": "int"}, {"x": picture, "y": 4})
    found = open_stream(tmp_path)[0]
    assert found["image"] == raw_sample(np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
@pytest.mark.parametrize("field", ["width", "mode", "length of the mode"])
def test_a_pil_sample_without_its_pixels_is_a_broken_image(tmp_path, mode, field):
    picture = image(0).convert(mode)
    with MDSWriter(out=str(tmp_path / "train"), columns={"x": "pil", "y": "int"}) as writer:
        for label in range(2):
            writer.write({"x": picture, "y": label})
    path = tmp_path / "train" / "shard.00000.mds"
    data = path.read_bytes()
    at = data.index(struct.pack("<3I", *picture.size, len(mode)))
    value = {"width": picture.width + 5, "mode": 0xFFFFFFFF, "length of the mode": 1 << 31}[field]
    at += {"width": 0, "mode": 12, "length of the mode": 8}[field]
    path.write_bytes(data[:at] + value.to_bytes(4, "little") + data[at + 4 :])
    stream = open_stream(tmp_path, batch_size=1)
    with pytest.raises(ValueError, match="raw sample"):
        decode_rgb(stream[0]["image"])
    assert decode_rgb(stream[1]["image"]).shape[:2] == (picture.height, picture.width)


def test_low_resolution_reads_the_small_column(tmp_path):
    small = raw_sample(np.asarray(image(1).resize((8, 6), Image.Resampling.BOX)))
    columns = {"image": "bytes", "image_small": "bytes", "label": "int"}
    write_columns(tmp_path, columns, {"image": jpeg(1), "image_small": small, "label": 3})
    for low, expected in ((False, jpeg(1)), (True, small)):
        found = [s for batch in load(open_stream(tmp_path, low_resolution=low), 1) for s in batch]
        assert [(s["image"], s["label"]) for s in found] == [(expected, 3)] * 8


def test_low_resolution_without_its_column_names_key_and_command(root):
    with pytest.raises(ConfigError, match="augment.low_resolution must be false .*vitcomposer convert --raw-below"):
        open_stream(root, low_resolution=True)


def test_the_hash_of_a_file_is_that_of_streaming(root):
    for algorithm in sorted(get_hashes()):
        assert shards_module._hash(algorithm, shard(root)) == get_hash(algorithm, shard(root).read_bytes())
