"""What conversion refuses, in one line: places, options, sizes, data sets of others, a full disk."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.data.conversion.conversion import jpeg, run_cli, tree, write_images
from tests.data.conversion.test_convert import OFF
from vitcomposer.data.conversion.encode import StoreOptions, store_image
from vitcomposer.data.conversion.shard import parse_bytes
from vitcomposer.data.conversion.sources import FolderSource
from vitcomposer.data.conversion.write import convert
from vitcomposer.schema import Data
from vitcomposer.stores.objects import S3Store

pytestmark = pytest.mark.timeout(120)


def test_image_above_the_bomb_guard_is_bad() -> None:
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    png = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10) + b"IDAT"
    with pytest.raises(ValueError, match="its header says 400,000,000 pixels, and at most 134,217,728 are read"):
        store_image(png, OFF)


@pytest.mark.parametrize(("text", "value"), [("64mb", 64 << 20), ("1.5kb", 1536), ("100", 100), ("2G", 2 << 30)])
def test_parse_bytes_reads_units(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "0", "64 miles", "-1mb", "4gb"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="--shard-size must be"):
        parse_bytes(text)


def test_other_source_or_options_are_refused_with_the_difference(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(FolderSource(folder), out, workers=1)
    with pytest.raises(ValueError, match="--shard-size was 67108864 bytes and is 1048576"):
        convert(FolderSource(folder), out, workers=1, shard_size="1mb")
    with pytest.raises(ValueError, match="--seed was 0 and is 1"):
        convert(FolderSource(folder), out, workers=1, seed=1)
    (folder / "train/emu/new.jpg").write_bytes(jpeg(1))
    (folder / "train/emu/000.JPEG").unlink()
    (folder / "train/emu/001.JPEG").write_bytes(jpeg(1, width=90))
    with pytest.raises(ValueError, match="choose an empty place") as caught:
        convert(FolderSource(folder), out, workers=1)
    assert "1 images are new (such as train/emu/new.jpg)" in str(caught.value)
    assert "1 images are gone (such as train/emu/000.JPEG)" in str(caught.value)
    assert "another size or label (such as train/emu/001.JPEG)" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (StoreOptions(seekable=False), "--seekable was on and is off"),
        (StoreOptions(short_side=20), "--short-side was not given and is 20"),
        (StoreOptions(raw_fraction=0.5), "--raw-fraction was 0.0 and is 0.5"),
        (StoreOptions(raw_below=16), "--raw-below was not given and is 16"),
        (StoreOptions(reencode=90), "--reencode was not given and is 90"),
    ],
)
def test_changed_way_of_storing_is_refused_by_name(
    folder: Path, tmp_path: Path, changed: StoreOptions, message: str
) -> None:
    convert(FolderSource(folder), tmp_path / "out", workers=1)
    with pytest.raises(ValueError, match=message):
        convert(FolderSource(folder), tmp_path / "out", workers=1, stored=changed)
    convert(FolderSource(folder), tmp_path / "out", workers=1, stored=StoreOptions(quality=50))  # of no resized image


def begun_by_an_older_version(out: Path) -> None:
    """Plans and markers as they were before there were options."""
    for split in ("train", "val"):
        folder = out / ".convert" / split
        plan = json.loads((folder / "plan.json").read_text())
        assert plan.pop("stored")["--seekable"] is False
        (folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
        for path in (folder / "done").iterdir():
            marker = json.loads(path.read_text())
            (marker["shard"],) = marker.pop("shards")
            del marker["outcomes"], marker["original_bytes"]
            path.write_text(json.dumps(marker, indent=1) + "\n")


@pytest.mark.parametrize("finished", [True, False])
def test_data_set_of_an_older_version_counts_as_kept(folder: Path, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    first = convert(FolderSource(folder), out, workers=1, shard_size="8kb", stored=OFF)
    shards = {name: digest for name, digest in tree(out).items() if name.endswith("mds")}
    indexes = {split: index_without_exif(out / split) for split in ("train", "val")}
    begun_by_an_older_version(out)
    if not finished:
        for name in ("train/shard.00001.mds", ".convert/train/done/00001.json", "train/index.json", "summary.json"):
            (out / name).unlink()
    with pytest.raises(ValueError, match="--seekable was off and is on"):
        convert(FolderSource(folder), out, workers=1, shard_size="8kb", stored=StoreOptions(seekable=True))
    assert convert(FolderSource(folder), out, workers=1, shard_size="8kb") == first
    assert shards.items() <= tree(out).items()
    assert indexes == {split: index_without_exif(out / split) for split in ("train", "val")}


def index_without_exif(folder: Path) -> dict[str, Any]:
    """An older version did not say how photographs lie."""
    index = json.loads((folder / "index.json").read_text())
    index.pop("exif", None)
    return index


def test_data_set_of_another_tool_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/index.json").write_text("{}")
    with pytest.raises(ValueError, match="another making"):
        convert(FolderSource(folder), tmp_path / "out", workers=1)


def test_place_that_cannot_be_written_is_one_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: Not a directory"):
        convert(FolderSource(folder), tmp_path / "file" / "out", workers=1)
    with pytest.raises(ValueError, match="local folder or at s3://"):
        convert(FolderSource(folder), "gs://bucket/data", workers=1)
    with pytest.raises(ValueError, match="--workers must be 1 or more"):
        convert(FolderSource(folder), tmp_path / "out", workers=0)


def test_full_disk_is_one_error_and_can_be_continued(tmp_path: Path) -> None:
    import resource

    write_images(tmp_path / "images", {"a": 40}, size=400)
    args = ("convert", "folder", tmp_path / "images", tmp_path / "out", "--shard-size", "200kb", "--workers", 1)
    # a limit on the size of a file stands for the full disk: the write fails half way, with the same kind of error
    result = run_cli(*args, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "cannot be written: File too large" in result.stderr and "finished shards are kept" in result.stderr
    assert run_cli(*args).returncode == 0
    convert(FolderSource(tmp_path / "images"), tmp_path / "unbroken", workers=1, shard_size="200kb")
    assert tree(tmp_path / "out") == tree(tmp_path / "unbroken")


def test_workers_import_neither_torch_nor_streaming() -> None:
    # they cost 8 s of CPU and 0.7 GB in every worker
    code = "import sys, vitcomposer.data.conversion.write; print({'torch', 'streaming', 'composer'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("address", ["s3://bucket/x#1", "s3://bucket/x?versionId=3", "s3://me:secret@bucket/x"])
def test_place_that_data_remote_would_refuse_is_refused(folder: Path, address: str) -> None:
    with pytest.raises(ValueError, match="The address of a data set must be an address without") as caught:
        convert(FolderSource(folder), address, workers=1)
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="data.remote must be an address without"):
        Data(remote=address, local="cache")


def test_slashes_before_a_key_are_left_out_as_readers_leave_them_out() -> None:
    assert S3Store("s3://bucket//deep/x/").prefix == S3Store("s3://bucket/deep/x").prefix == "deep/x/"
