"""Columns of data sets that others wrote: which are read, and how the rest is refused."""

import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter

from tests.data.mds.test_stream import NUM_CLASSES, image, jpeg, load, open_stream, raw_sample, write_split
from vitcomposer.errors import ConfigError, ShardError

pytestmark = pytest.mark.timeout(60)


def write_columns(folder: Path, columns: dict[str, str], sample: dict) -> None:
    with MDSWriter(out=str(folder / "train"), columns=columns, hashes=["xxh64"]) as writer:
        for _ in range(8):
            writer.write(sample)


@pytest.mark.parametrize("label", ["int", "uint16", "str_int"])
@pytest.mark.parametrize("encoding", ["bytes", "jpeg", "png", "pil"])
@pytest.mark.parametrize("names", [("x", "y"), ("image", "target")])
def test_columns_of_others_are_read(tmp_path, encoding, label, names):
    picture = image(5)
    value = jpeg(5) if encoding == "bytes" else picture
    number = np.uint16(300) if label == "uint16" else 300
    columns = {names[0]: encoding, names[1]: label, "width": "int32", "note": "str"}
    sample = {names[0]: value, names[1]: number, "width": np.int32(16), "note": "a note"}
    write_columns(tmp_path, columns, sample)
    found = open_stream(tmp_path)[0]
    assert found["label"] == 300
    if encoding == "pil":
        assert found["image"] == raw_sample(np.asarray(picture))
    elif encoding == "png":
        assert np.array_equal(np.asarray(Image.open(BytesIO(found["image"]))), np.asarray(picture))
    else:
        assert found["image"] == jpeg(5)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_of_streamings_own_imagenet_converter_are_read(tmp_path, workers):
    """Its columns are x, a JPEG file as Pillow read it, and y; its shards may be compressed and have no xxh64."""
    files = []
    for index in range(40):
        files.append(tmp_path / f"{index}.jpg")
        files[-1].write_bytes(jpeg(index))
    out = tmp_path / "mds" / "train"
    with MDSWriter(out=str(out), columns={"x": "jpeg", "y": "int"}, hashes=["sha1"], size_limit=9000) as writer:
        for index, file in enumerate(files):
            writer.write({"x": Image.open(file), "y": index % NUM_CLASSES})
    samples = [s for batch in load(open_stream(tmp_path / "mds"), workers) for s in batch]
    assert {s["sample_id"]: (s["image"], s["label"]) for s in samples} == {
        index: (jpeg(index), index % NUM_CLASSES) for index in range(40)
    }


@pytest.mark.parametrize(
    "columns, sample",
    [
        ({"picture": "jpeg", "label": "int"}, {"picture": image(0), "label": 0}),
        ({"image": "jpeg", "label": "str"}, {"image": image(0), "label": "cat"}),
        ({"image": "jpeg"}, {"image": image(0)}),
        ({"image": "jpeg", "label": "int", "y": "int"}, {"image": image(0), "label": 0, "y": 1}),
    ],
)
def test_wrong_columns_are_named(tmp_path, columns, sample):
    write_columns(tmp_path, columns, sample)
    found = ", ".join(f"{name}: {columns[name]}" for name in sorted(columns))
    with pytest.raises(
        ConfigError, match=f"{tmp_path}/train/index.json: one column image or x .*got columns {found}|got {found}"
    ):
        open_stream(tmp_path)


def test_a_pickle_column_is_refused(tmp_path):
    write_columns(tmp_path, {"image": "jpeg", "label": "pkl"}, {"image": image(0), "label": 0})
    with pytest.raises(ConfigError, match="pkl runs code when it is read and is refused, got columns image: jpeg"):
        open_stream(tmp_path)


def test_data_in_parts_is_read(tmp_path):
    """As merge_index leaves it: shards in folders below the index."""
    from streaming.base.util import merge_index

    for part in range(2):
        write_split(tmp_path / "train" / f"part{part}", 20)
    merge_index(str(tmp_path / "train"))
    assert len(list(load(open_stream(tmp_path), 0))) == 10
    shutil.rmtree(tmp_path / "train" / "part1")
    with pytest.raises(ShardError, match="part1/shard.00000.mds"):
        open_stream(tmp_path)
