"""Broken images, shards and data sets, through train.py: what is left out, what ends a run, and what it says."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter
from streaming.base.format.mds.reader import MDSReader

from tests.conftest import PHOTOS, ROOT, TRAIN_PER_CLASS, VAL_PER_CLASS, run_train, tiny_photo_overrides
from tests.faults.conftest import Tell
from tests.teacher.test_cache_teacher import OPTIONS
from tests.teacher.test_cache_teacher import YAML as CACHED
from tests.teacher.test_cache_teacher import weights as weights
from vitcomposer import config
from vitcomposer.cli import main
from vitcomposer.data import collate, multicrop
from vitcomposer.data.files import TolerantCollate
from vitcomposer.data.loader import build_dataspec
from vitcomposer.data.mds.stream import ImageStream, StreamOptions
from vitcomposer.data.multicrop import MultiCrop
from vitcomposer.errors import ConfigError
from vitcomposer.runs import failures
from vitcomposer.runs.metrics import read_metrics
from vitcomposer.teacher.writer import write_cache

pytestmark = pytest.mark.timeout(150)

DEIT = str(ROOT / "yamls/deit_ti.yaml")
TRAIN, VAL = len(PHOTOS) * TRAIN_PER_CLASS, len(PHOTOS) * VAL_PER_CLASS


def header(jpeg: bytes, height: int, width: int) -> bytes:
    """The file with another size in its frame header."""
    at = re.search(rb"\xff[\xc0-\xc2]\x00\x11\x08", jpeg).end()  # pyright: ignore[reportOptionalMemberAccess]
    return jpeg[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg[at + 4 :]


def postscript(jpeg: bytes) -> bytes:
    """A format that Pillow would start another program for."""
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).save(file, "EPS")
    return file.getvalue()


BREAKS: dict[str, Callable[[bytes], bytes]] = {
    "half a JPEG": lambda jpeg: jpeg[: len(jpeg) // 2],
    "random bytes": lambda jpeg: bytes(range(256)) * 4,
    "no bytes": lambda jpeg: b"",
    "zeros": lambda jpeg: bytes(len(jpeg)),
    "a header of 65500 x 65500 pixels": lambda jpeg: header(jpeg, 65500, 65500),
    "a text": lambda jpeg: b"<html>404 Not Found</html>",
    "PostScript": postscript,
}


def rewrite(mds: Path, out: Path, change: Callable[[str, int, dict[str, Any]], dict[str, Any]]) -> Path:
    """A data set whose samples were changed by (split, sample_id, sample), with the right hashes again."""
    for split in ("train", "val"):
        shards = json.loads((mds / split / "index.json").read_text())["shards"]
        columns = dict(zip(shards[0]["column_names"], shards[0]["column_encodings"], strict=True))
        sample_id = 0
        with MDSWriter(out=str(out / split), columns=columns, hashes=["xxh64"], size_limit=100_000) as writer:
            for shard in shards:
                reader = MDSReader.from_json(str(mds), split, dict(shard))
                for row in range(shard["samples"]):
                    writer.write(change(split, sample_id, reader[row]))
                    sample_id += 1
        shutil.copy(mds / split / "class_names.json", out / split)
    return out


def broken(mds: Path, out: Path, where: dict[str, dict[int, str]]) -> Path:
    """``where`` says by split and sample_id how an image is broken."""

    def change(split: str, sample_id: int, sample: dict[str, Any]) -> dict[str, Any]:
        how = where.get(split, {}).get(sample_id)
        return {**sample, "image": BREAKS[how](sample["image"])} if how else sample

    return rewrite(mds, out, change)


def losses(run: Path) -> list[float]:
    return [line["loss/train/total"] for line in read_metrics(run / "metrics.jsonl") if "loss/train/total" in line]


def errors(captured: str) -> list[str]:
    return [line for line in captured.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="session")
def holed(photo_mds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven broken images in training and two in evaluation."""
    train = dict(zip((3, 4, 50, 90, 100, 150, 191), BREAKS, strict=True))
    out = tmp_path_factory.mktemp("holed")
    return broken(photo_mds, out, {"train": train, "val": {5: "half a JPEG", 40: "no bytes"}})


def test_broken_images_are_named_counted_and_replaced(
    holed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tell: Tell
) -> None:
    more = ["data.max_bad_fraction=0.05", "augment.repeated_augmentation=1"]
    began = time.monotonic()
    assert run_train([DEIT, *tiny_photo_overrides(holed, tmp_path, "holed"), *more]) == 0
    seconds = time.monotonic() - began
    named = [line for line in caplog.messages if "cannot be decoded" in line]
    assert len(named) == 9, "each image once, in two epochs and in evaluations of two sets of weights"
    assert any(line.startswith(f"{holed}/train/shard.00000.mds, sample 3 (sample_id 3)") for line in named)
    ends = [line for line in capfd.readouterr().err.splitlines() if "could not be decoded" in line]
    train, val = ([line for line in ends if f"{holed}/{split} could" in line] for split in ("train", "val"))
    assert len(train) == 1 and train[0].startswith(f"7 of the {TRAIN} images")
    assert len(val) == 2 and f"The metrics are of the other {VAL - 2}." in val[-1]
    summary = json.loads((tmp_path / "holed/summary.json").read_text())
    assert (summary["bad_images"], summary["bad_eval_images"], summary["images_seen"]) == (7, 2, 2 * TRAIN)
    assert read_metrics(tmp_path / "holed/metrics.jsonl")[-1]["data/bad_images"] == 7
    tell("a broken JPEG in a sound shard", next(line for line in named if "/train/" in line), seconds)
    tell("broken images in a validation split", val[-1], seconds)


def test_every_broken_image_is_listed_by_inspect(holed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(holed), "--decode"]) == 1
    found = re.findall(r"^bad: (\w+)/shard\.\d+\.mds, sample \d+ \(sample_id (\d+)\)", capfd.readouterr().err, re.M)
    expected = [("train", str(i)) for i in (3, 4, 50, 90, 100, 150, 191)] + [("val", "5"), ("val", "40")]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_more_broken_images_than_allowed_end_the_run(
    photo_mds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], tell: Tell, workers: int
) -> None:
    mds = broken(photo_mds, tmp_path / "mds", {"train": dict.fromkeys(range(0, TRAIN, 20), "half a JPEG")})
    more = ["data.max_bad_fraction=0.02", "augment.repeated_augmentation=1", f"data.num_workers={workers}"]
    began = time.monotonic()
    assert run_train([DEIT, *tiny_photo_overrides(mds, tmp_path, "bad"), *more]) == 2
    seconds = time.monotonic() - began
    (error,) = errors(capfd.readouterr().err)
    for words in ("data.max_bad_fraction", "got 0.02", "4 of 192", "shard.0000", "sample ", "vitcomposer inspect"):
        assert words in error
    tell(f"too many broken images, {workers} workers", error, seconds)


def collate_all(cfg: Any, workers: int, size: int = 16) -> list[dict[str, Any]]:
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, num_workers=workers))
    loader = build_dataspec(cfg, "train", seed=0, device_batch_size=size).dataloader
    batches = [{name: value.clone() if hasattr(value, "clone") else value for name, value in b.items()} for b in loader]
    if workers:
        loader._iterator._shutdown_workers()  # pyright: ignore
    return batches


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["augment.repeated_augmentation=3"],
        ["augment.repeated_augmentation=2", "augment.shared_decodes=true", "augment.decode_scale=dct"],
    ],
    ids=["plain", "repeated", "shared"],
)
def test_stand_ins_do_not_depend_on_the_workers_and_bring_their_labels(
    holed: Path, photo_mds: Path, tmp_path: Path, more: list[str]
) -> None:
    argv = [*tiny_photo_overrides(holed, tmp_path, "x"), "augment.repeated_augmentation=1", "data.max_bad_fraction=0.1"]
    cfg = config.load(DEIT, [*argv, *more])
    alone, among = collate_all(cfg, 0), collate_all(cfg, 2)
    labels = {i: label for split, i, label in seen_labels(photo_mds) if split == "train"}
    assert len(alone) == len(among) == TRAIN // 16
    for one, other in zip(alone, among, strict=True):
        assert one.keys() == other.keys() and len(one["image"]) == 16
        for name in one:
            assert np.array_equal(one[name], other[name]), name
        assert not set(one["sample_id"].tolist()) & {3, 4, 50, 90, 100, 150, 191}
        assert one["label"].tolist() == [labels[i] for i in one["sample_id"].tolist()]


def test_a_resumed_loader_goes_on_with_the_same_stand_ins(holed: Path, tmp_path: Path) -> None:
    argv = [*tiny_photo_overrides(holed, tmp_path, "x"), "data.max_bad_fraction=0.1", "data.num_canonical_nodes=1"]
    cfg = config.load(DEIT, [*argv, "augment.repeated_augmentation=1"])
    loaders = [build_dataspec(cfg, "train", seed=0, device_batch_size=16).dataloader for _ in range(2)]
    streams = [loader.dataset for loader in loaders]  # pyright: ignore
    unbroken = list(loaders[0])
    streams[1].load_state_dict(streams[0].state_dict(80, False) | {"epoch": 0})
    resumed = list(loaders[1])
    assert len(resumed) == len(unbroken) - 5
    for one, other in zip(unbroken[5:], resumed, strict=True):
        assert np.array_equal(one["image"], other["image"]) and np.array_equal(one["sample_id"], other["sample_id"])


def test_crops_of_several_sizes_are_those_of_the_stand_in(holed: Path) -> None:
    options = StreamOptions(max_bad_fraction=0.1)
    stream = ImageStream(local=str(holed), split="train", batch_size=4, shuffle=True, seed=0, options=options)
    groups: dict[str, Any] = {"num_crops": (2, 3), "size_crops": (32, 16), "crop_scales": ((0.3, 1), (0.1, 0.3))}
    cut = MultiCrop(**groups, seed=7, source=stream)
    samples = [{**stream[i], "epoch": 1, "copy": 0} for i in (2, 3, 100, 191)]
    batch, expected = cut(samples), cut([{**stream[i], "epoch": 1, "copy": 0} for i in (2, 5, 101, 0)])
    assert batch["sample_id"].tolist() == [2, 5, 101, 0], "3 and 4 are broken, and after 191 comes 0"
    for crops, others in zip(batch["crops"], expected["crops"], strict=True):
        assert np.array_equal(crops, others)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_train_on_the_images_of_one_and_count_together(holed: Path, tmp_path: Path, tell: Tell) -> None:
    more = ["mixing.prob=0", "model.drop_path_rate=0", "augment.repeated_augmentation=1", "data.max_bad_fraction=0.05"]
    launcher = [str(Path(sys.executable).parent / "composer"), "-n", "2", "train.py"]
    began = time.monotonic()
    done = subprocess.run(
        [*launcher, DEIT, *tiny_photo_overrides(holed, tmp_path, "two"), *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = time.monotonic() - began
    assert run_train([DEIT, *tiny_photo_overrides(holed, tmp_path, "one"), *more]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for name in ("one", "two"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert (summary["bad_images"], summary["bad_eval_images"]) == (7, 2), name
    seen = [line for line in done.stderr.splitlines() if f"images of {holed}/train could not be decoded" in line]
    tell("broken images, two ranks", seen[-1], seconds)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_neighbours_are_measured_without_broken_images(holed: Path, tmp_path: Path) -> None:
    overrides = [
        *tiny_photo_overrides(holed, tmp_path, "swav")[:6],
        "model.image_size=32",
        "model.depth=1",
        "model.num_classes=0",
        "crops.size_crops=[32,16]",
        "data.max_bad_fraction=0.05",
        "global_train_batch_size=16",
        "max_duration=2ba",
        "schedule.t_warmup=1ba",
        "run.progress_bar=false",
    ]
    assert run_train([str(ROOT / "yamls/swav_demo.yaml"), *overrides]) == 0
    assert "knn/top1" in read_metrics(tmp_path / "swav/metrics.jsonl")[-1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_teacher_cache_of_broken_images_has_the_losses_of_the_teacher(
    holed: Path, weights: Path, tmp_path: Path
) -> None:
    overrides = [
        *tiny_photo_overrides(holed, tmp_path, "live"),
        "model.embed_dim=32",
        "model.num_heads=2",
        "model.depth=1",
        "teacher.name=deit_tiny_patch16",
        f"teacher.weights={weights}",
        *[f"teacher.options.{key}={value}" for key, value in OPTIONS.items()],
        "augment.repeated_augmentation=1",
        "data.max_bad_fraction=0.05",
        "max_duration=1ep",
    ]
    write_cache(config.load(CACHED, overrides), tmp_path / "cache", crop_sets=2, top_k=None, batch_size=16)
    assert run_train([CACHED, *overrides, "cache=null"]) == 0
    assert run_train([CACHED, *overrides, "run.name=cached", f"cache.local={tmp_path / 'cache'}"]) == 0
    assert losses(tmp_path / "cached") == losses(tmp_path / "live")


def seen_labels(mds: Path) -> list[tuple[str, int, int]]:
    """Split, sample_id and label of every sample."""
    found: list[tuple[str, int, int]] = []
    for split in ("train", "val"):
        for shard in json.loads((mds / split / "index.json").read_text())["shards"]:
            reader = MDSReader.from_json(str(mds), split, dict(shard))
            begin = sum(each[0] == split for each in found)
            found += [(split, begin + row, int(reader[row]["label"])) for row in range(shard["samples"])]
    return found


def fail(*_: object) -> None:
    """What a decoder must never do."""
    raise KeyError(6)


@pytest.mark.parametrize(("split", "workers"), [("train", 0), ("train", 1), ("val", 1)])
def test_a_fault_of_the_decoder_names_the_sample(
    photo_mds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: Literal["train", "val"], workers: int
) -> None:
    monkeypatch.setattr(collate, "read_size", fail)
    argv = [*tiny_photo_overrides(photo_mds, tmp_path, "x"), f"data.num_workers={workers}"]
    loader = build_dataspec(config.load(DEIT, argv), split, seed=0, device_batch_size=16).dataloader
    with pytest.raises(RuntimeError) as caught:
        list(loader)
    place = rf"{photo_mds}/{split}/shard\.\d+\.mds, sample \d+ \(sample_id \d+\), of [\d,]+ bytes: KeyError: 6"
    assert re.fullmatch(place, failures._message(caught.value))
    assert failures.explain(caught.value, None) is None, "it deserves its traceback"


def test_a_label_that_is_no_class_names_its_sample(photo_mds: Path, tmp_path: Path) -> None:
    cfg = config.load(DEIT, tiny_photo_overrides(photo_mds, tmp_path, "x"))
    stream = ImageStream(local=str(photo_mds), split="train", batch_size=4, shuffle=False, seed=0)
    collates = (
        collate.TrainCollate(cfg.augment, cfg.mixing, image_size=16, num_classes=1, seed=0, source=stream),
        collate.EvalCollate(image_size=16, crop_ratio=0.875, interpolation="bicubic", num_classes=1, source=stream),
    )
    samples = [{**stream[i], "label": i % 2} for i in (2, 3)]
    for each in collates:
        with pytest.raises(ConfigError, match=r"train/shard\.\d+\.mds, sample 3 \(sample_id 3\): the label must be in"):
            each(samples)


def test_a_fault_of_the_decoder_in_crops_of_several_sizes_or_in_files_names_the_sample(
    photo_mds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multicrop, "read_size", fail)
    monkeypatch.setattr(collate, "read_size", fail)
    stream = ImageStream(local=str(photo_mds), split="train", batch_size=4, shuffle=True, seed=0)
    cut = MultiCrop(num_crops=(2,), size_crops=(32,), crop_scales=((0.3, 1),), seed=7, source=stream)
    with pytest.raises(RuntimeError, match=r"train/shard\.\d+\.mds, sample 3 \(sample_id 3\).*: KeyError: 6"):
        cut([{**stream[3], "epoch": 1, "copy": 0}])
    tolerant = TolerantCollate(image_size=16, crop_ratio=0.875, interpolation="bicubic", num_classes=100)
    assert tolerant([stream[3]])["broken"] == [(0, "KeyError: 6")]


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_shards_of_the_cache_are_fetched_again(
    photo_mds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, tell: Tell
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(photo_mds, cache)
    flipped, cut = sorted((cache / "train").glob("*.mds"))[3:5]
    damage(flipped)
    cut.write_bytes(cut.read_bytes()[:-9])
    remote = [f"data.remote={photo_mds}", "max_duration=1ep", "augment.repeated_augmentation=1"]
    began = time.monotonic()
    assert run_train([DEIT, *tiny_photo_overrides(cache, tmp_path, "again"), *remote]) == 0
    for bad, fault in ((flipped, "a flipped bit"), (cut, "a missing end")):
        (said,) = [line for line in caplog.messages if bad.name in line and "is downloaded again" in line]
        assert bad.read_bytes() == (photo_mds / "train" / bad.name).read_bytes()
        tell(f"{fault} in a shard of the cache", said, time.monotonic() - began)


def told(argv: list[str]) -> int:
    """As the command does it: what ends the run is printed and not raised."""
    import train

    return train.main(argv, report_errors=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_of_the_data_set_ends_the_run_by_its_name(
    photo_mds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], tell: Tell, workers: int
) -> None:
    mds = tmp_path / "mds"
    shutil.copytree(photo_mds, mds)
    bad = sorted((mds / "train").glob("*.mds"))[3]
    damage(bad)
    more = [f"data.num_workers={workers}", "augment.repeated_augmentation=1"]
    began = time.monotonic()
    status = told([DEIT, *tiny_photo_overrides(mds, tmp_path, "bad"), *more])
    seconds = time.monotonic() - began
    (error,) = errors(capfd.readouterr().err)
    assert status == 1 and bad.name in error and "xxh64" in error and "vitcomposer convert" in error
    tell(f"a flipped bit in a shard, {workers} workers", error, seconds)
