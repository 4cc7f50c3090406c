"""Conversion: what is stored, what is refused, and that workers, crashes and buckets do not change the result."""

import csv
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import read_photo
from tests.data.conversion.conversion import items, jpeg, read_shards, stream, tree, write_images
from vitcomposer.cli import main
from vitcomposer.data.conversion.encode import StoreOptions
from vitcomposer.data.conversion.sources import FolderSource, ListSource
from vitcomposer.data.conversion.write import convert
from vitcomposer.data.jpeg.markers import read_index

pytestmark = pytest.mark.timeout(120)

OFF = StoreOptions(seekable=False)
ALL = StoreOptions(seekable=True, short_side=100, raw_fraction=0.3, raw_below=16, reencode=90)


def test_folder_reads_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = FolderSource(folder)
    summary = convert(source, out, workers=1, shard_size="8kb", stored=OFF)
    names = ["cat", "dog", "emu"]
    for split, count in (("train", 28), ("val", 7)):
        stored = stream(out, split)
        listed = [((folder / name).read_bytes(), names.index(name.split("/")[1])) for name, _, _ in items(out, split)]
        assert stored == listed
        assert len(stored) == count == summary[split]["images"]
        assert json.loads((out / split / "class_names.json").read_text()) == names
    assert summary["train"]["formats"] == {"JPEG": 26, "PNG": 1, "WEBP": 1}
    assert summary["train"]["class_counts"] == {"cat": 13, "dog": 10, "emu": 5}
    assert summary["train"]["width"] == {"min": 40, "median": 40, "max": 40}
    assert summary["train"]["shards"] > 3 and summary["train"]["stored"] == {"kept": 28}
    assert summary["train"]["bytes"] == summary["train"]["original_bytes"]
    assert json.loads((out / "summary.json").read_text())["splits"] == summary
    assert source.report.left_out == {".txt": 1}


def test_split_equals_what_mds_writer_writes(folder: Path, tmp_path: Path) -> None:
    from streaming import MDSWriter

    out, theirs = tmp_path / "out", tmp_path / "theirs"
    convert(FolderSource(folder), out, workers=1, shard_size="8kb", stored=replace(OFF, exif="keep"))
    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(columns=columns, out=str(theirs), hashes=["xxh64"], size_limit="8kb") as writer:
        for name, _, label in items(out, "train"):
            writer.write({"image": (folder / name).read_bytes(), "label": label})
    ours = tree(out / "train")
    del ours["class_names.json"]
    assert ours == tree(theirs)


def test_shards_mix_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"a": 40, "b": 40})
    convert(FolderSource(tmp_path / "images", val_fraction=0), tmp_path / "out", workers=1)
    labels = [label for _, _, label in items(tmp_path / "out", "train")]
    assert 10 <= sum(labels[:40]) <= 30


def test_workers_do_not_change_the_result(folder: Path, tmp_path: Path) -> None:
    convert(FolderSource(folder), tmp_path / "one", workers=1, shard_size="8kb")
    convert(FolderSource(folder), tmp_path / "two", workers=2, shard_size="8kb")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize(
    ("flags", "stored"),
    [
        ([], None),
        (["--raw-fraction", "0.5", "--raw-below", "16", "--reencode", "90"], StoreOptions(None, None, 95, 0.5, 16, 90)),
    ],
)
def test_killed_conversion_continues_to_the_same_result(
    tmp_path: Path, flags: list[str], stored: StoreOptions | None
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    write_images(images, {"a": 200, "b": 200}, size=150)
    for number in (7, 70, 150):
        (images / f"a/{number:03}.JPEG").write_bytes(jpeg(number, width=150)[:-900])
    args = ["folder", str(images), str(out), "--shard-size", "20kb", "--workers", "2", *flags]
    process = subprocess.Popen([sys.executable, "-m", "vitcomposer", "convert", *args], stdout=subprocess.DEVNULL)
    done = out / ".convert" / "train" / "done"
    deadline = time.monotonic() + 60
    while not (done.is_dir() and len(list(done.iterdir())) >= 5):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the killed conversion"
        time.sleep(0.05)
    written = {path.name: path.stat().st_mtime_ns for path in done.iterdir()}
    assert not (out / "train" / "index.json").exists()
    seen: list[tuple[int, int]] = []
    source = FolderSource(images)
    convert(source, out, workers=2, shard_size="20kb", stored=stored, on_progress=lambda *counts: seen.append(counts))
    assert 0 < seen[0][0] < seen[0][1] == 400 == seen[-1][0]
    assert all((done / name).stat().st_mtime_ns == stamp for name, stamp in written.items())
    convert(source, tmp_path / "unbroken", workers=1, shard_size="20kb", stored=stored)
    assert tree(out) == tree(tmp_path / "unbroken") and len(left_out(out)) == 4


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_train_is_seekable_by_default_and_decodes_alike(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = convert(FolderSource(folder), out, workers=1, shard_size="8kb")
    assert summary["train"]["stored"] == {"seekable": 26, "kept: PNG": 1, "kept: WEBP": 1}
    assert summary["val"]["stored"] == {"kept": 7}
    samples = read_shards(out, "train")
    assert summary["train"]["bytes"] == sum(len(data) for data, _ in samples) > summary["train"]["original_bytes"]
    for (data, _), (name, size, _) in zip(samples, items(out, "train"), strict=True):
        original = (folder / name).read_bytes()
        assert (read_index(data) is not None) == name.endswith(".JPEG") and size == len(original)
        assert np.array_equal(Image.open(BytesIO(data)).convert("RGB"), Image.open(BytesIO(original)).convert("RGB"))


def test_all_options_give_one_result_for_any_number_of_workers(folder: Path, tmp_path: Path) -> None:
    summaries = [
        convert(FolderSource(folder), tmp_path / name, workers=workers, shard_size="8kb", stored=ALL)
        for name, workers in (("one", 1), ("two", 2))
    ]
    assert tree(tmp_path / "one") == tree(tmp_path / "two") and summaries[0] == summaries[1]
    assert summaries[0]["train"]["stored"].keys() >= {"seekable", "raw", "re-encoded: PNG"}


def test_parts_that_grow_become_several_shards_below_the_limit(folder: Path, tmp_path: Path) -> None:
    out, limit = tmp_path / "out", 8 << 10
    convert(FolderSource(folder), out, workers=1, shard_size=limit, stored=StoreOptions(raw_fraction=1.0))
    shards = json.loads((out / "train/index.json").read_text())["shards"]
    names = [shard["raw_data"]["basename"] for shard in shards]
    assert names[:3] == ["shard.00000.mds", "shard.00000_001.mds", "shard.00000_002.mds"] and names == sorted(names)
    assert {path.name for path in (out / "train").glob("*.mds")} == set(names)
    sizes = [(out / "train" / name).stat().st_size for name in names]
    assert sizes == [shard["raw_data"]["bytes"] for shard in shards]
    assert max(sizes) <= limit and shards[0]["samples"] == 2
    expected = [(name, label) for name, _, label in items(out, "train")]
    for (data, label), (name, wanted) in zip(stream(out, "train"), expected, strict=True):
        pixels = np.asarray(Image.open(folder / name).convert("RGB"))
        assert label == wanted and data[16:] == pixels.tobytes() and data[:4] == b"\0RAW"


def test_seekable_parts_stay_one_shard_each(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    photo = read_photo("china")
    for number in range(40):
        photo.crop((number, 0, number + 200, 150)).save(images / f"a/{number}.jpg", quality=92)
    convert(FolderSource(images, val_fraction=0), tmp_path / "out", workers=1, shard_size="50kb")
    names = [path.name for path in (tmp_path / "out/train").glob("*.mds")]
    assert len(names) > 5 and not any("_" in name for name in names)


def test_small_column_is_read_by_streaming_and_inspected(folder: Path, tmp_path: Path) -> None:
    from streaming.base.format import reader_from_json

    from vitcomposer.data.conversion.inspect import inspect_data

    out = tmp_path / "out"
    convert(FolderSource(folder), out, workers=1, stored=StoreOptions(raw_below=16))
    shard = json.loads((out / "train/index.json").read_text())["shards"][0]
    reader = reader_from_json(str(out), "train", shard)
    for number in range(len(reader)):
        sample = reader.get_item(number)
        assert struct.unpack("<4s3I", sample["image_small"][:16]) == (b"\0RAW", 16, 21, 0)
        assert len(sample["image_small"]) == 16 + 16 * 21 * 3
    report = inspect_data(out, "train")[0]
    assert report.columns == {"image": "bytes", "image_small": "bytes", "label": "int"}
    assert report.forms == {"seekable": 26, "other": 2} and report.problems == []


def test_finished_data_set_is_left_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(FolderSource(folder), out, workers=1)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    seen: list[tuple[int, int]] = []
    again = convert(FolderSource(folder), out, workers=1, on_progress=lambda *counts: seen.append(counts))
    assert again == first and seen == [(35, 35)]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == stamps


def left_out(out: Path) -> list[list[str]]:
    return list(csv.reader((out / "left_out.csv").open(newline="")))


def test_more_bad_images_than_allowed_are_one_error_that_names_the_first(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "train/cat/000.JPEG").read_bytes()
    (folder / "train/cat/000.JPEG").write_bytes(whole[: len(whole) // 2])
    (folder / "train/dog/001.JPEG").write_bytes(b"")
    (folder / "val/emu/000.JPEG").write_bytes(b"<html>404</html>")
    out = tmp_path / "out"
    with pytest.raises(ValueError) as caught:
        convert(FolderSource(folder), out, workers=1)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("--max-bad-fraction must be at least the share of images")
    assert "2 of 28 in the split train and 1 of 7 in the split val, got 0.01" in message
    assert "train/cat/000.JPEG (image file is truncated (" in message
    assert "train/dog/001.JPEG (the file is empty), val/emu/000.JPEG (no image format that Pillow knows)" in message
    assert f"{out}/left_out.csv lists them. Mend or remove them" in message and "--max-bad-fraction 0.143" in message
    assert not (out / "train/index.json").exists()
    assert [row[:2] for row in left_out(out)[1:]] == [
        ["train", "train/cat/000.JPEG"],
        ["train", "train/dog/001.JPEG"],
        ["val", "val/emu/000.JPEG"],
    ]
    assert convert(FolderSource(folder), out, workers=1, max_bad_fraction=0.143)["val"]["left_out"] == 1


def test_bad_images_beyond_five_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"a": 14})
    for number in range(13):
        (tmp_path / f"images/a/{number:03}.JPEG").write_bytes(b"x")
    with pytest.raises(ValueError, match="13 of 14 in the split train") as caught:
        convert(FolderSource(tmp_path / "images", val_fraction=0), tmp_path / "out", workers=1)
    assert str(caught.value).count("no image format") == 5
    assert "and 8 more" in str(caught.value) and "--max-bad-fraction 0.929" in str(caught.value)


def test_a_few_bad_images_are_left_out_counted_and_listed(folder: Path, tmp_path: Path) -> None:
    """As in training, where the same share is data.max_bad_fraction; both splits judge alike."""
    write_images(folder / "more", {"train": 100, "val": 100}, size=8)
    for split in ("train", "val"):
        for path in sorted((folder / "more" / split).iterdir()):
            path.rename(folder / split / "cat" / f"more{path.name}")
        # a scan that a marker ends which must not be: libjpeg gives all rows, and then an error
        (folder / split / "dog/001.JPEG").write_bytes(jpeg(0, 200, 200)[:9000] + b"\xff\xf9\x80\x00")
    shutil.rmtree(folder / "more")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"1 of 128 in the split train and 1 of 107 .*got 0 \(--strict\)"):
        convert(FolderSource(folder), out, workers=1, shard_size="64kb", max_bad_fraction=0)
    summary = convert(FolderSource(folder), out, workers=1, shard_size="64kb")
    for split, images in (("train", 127), ("val", 106)):
        assert summary[split]["left_out"] == 1 and summary[split]["images"] == images
        assert len(read_shards(out, split)) == images
    assert left_out(out) == [
        ["split", "path", "reason"],
        ["train", "train/dog/001.JPEG", "broken data stream when reading image file"],
        ["val", "val/dog/001.JPEG", "broken data stream when reading image file"],
    ]


def test_list_of_what_was_left_out_keeps_other_splits_and_names_that_are_no_text(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_images(tmp_path / "images", {"a": 3})
    name = os.fsdecode(b'\xff, "x".jpg')
    (tmp_path / "images/a" / name).write_bytes(b"x")
    for split in ("train", "val"):
        lines = [f"a/00{number}.JPEG\ta" for number in range(3)] + [f"a/{name}\ta"] * (split == "train")
        (tmp_path / split).write_bytes(os.fsencode("\n".join(lines)))
        source = ListSource(tmp_path / split, split=split, root=tmp_path / "images")
        convert(source, out, workers=1, max_bad_fraction=0.5)
    expected = b'split,path,reason\ntrain,"a/\xff, ""x"".jpg",no image format that Pillow knows\n'
    assert (out / "left_out.csv").read_bytes() == expected


def test_command_line_leaves_out_as_many_as_it_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train/cat/000.JPEG").write_bytes(jpeg(0)[:300])
    out = str(tmp_path / "out")
    command = ["convert", "folder", str(folder), out, "--workers", "1"]
    for given, words in (([], "got 0.01"), (["--strict"], "got 0 (--strict)")):
        assert main([*command, *given]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "1 of 28 in the split train" in error and words in error and "--max-bad-fraction 0.036" in error
    assert main([*command, "--max-bad-fraction", "1.5"]) == 2
    assert "--max-bad-fraction must be in [0, 1], got 1.5" in capsys.readouterr().err
    assert main([*command, "--max-bad-fraction", "0.04"]) == 0
    assert f"left out 1 (2.86 %): {out}/left_out.csv\n" in capsys.readouterr().out


def test_split_without_a_good_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/x.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="train must hold an image that can be decoded, none of 1 can"):
        convert(FolderSource(tmp_path / "images", val_fraction=0), tmp_path / "out", workers=1, max_bad_fraction=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_moves_by_images_within_a_chunk(tmp_path: Path, workers: int) -> None:
    """Chunks of hundreds of images would have it stand still for seconds."""
    write_images(tmp_path / "images", {"a": 150, "b": 150}, size=200)
    seen: list[tuple[int, int]] = []
    source = FolderSource(tmp_path / "images", val_fraction=0.5)
    convert(source, tmp_path / "out", workers=workers, on_progress=lambda *counts: seen.append(counts))
    done = [count for count, _ in seen]
    assert done[0] == 0 and done[-1] == 300 and done == sorted(done) and {total for _, total in seen} == {300}
    assert len(list((tmp_path / "out").glob("*/shard.*"))) == 2
    if workers == 1:  # of several, how often they are asked depends on the machine
        assert len(set(done)) == 301
