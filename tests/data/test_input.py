"""The ways of storing and reading images, each through train.py: which change the numbers and which must not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT, run_train, tiny_photo_overrides

DEIT = str(ROOT / "yamls/deit_ti.yaml")
STEPS = 6


def losses(mds: Path, runs: Path, name: str, *overrides: str) -> list[float]:
    given = [*tiny_photo_overrides(mds, runs, name), f"max_duration={STEPS}ba", *overrides]
    assert run_train([DEIT, *given]) == 0
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    found = [row["loss/train/total"] for row in rows if "loss/train/total" in row]
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module")
def one_shard(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses from seekable files in one shard: the order depends on the shards, whose number on what is stored."""
    folder = tmp_path_factory.mktemp("one_shard")
    return losses(convert(photo_folder, folder / "mds"), folder, "reference")


@pytest.fixture(scope="module")
def reference(photo_mds: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(photo_mds, tmp_path_factory.mktemp("runs"), "reference")


def convert(photo_folder: Path, out: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "vitcomposer", "convert", "folder", str(photo_folder), str(out)]
    subprocess.run([*command, "--workers", "1", *options], check=True, cwd=ROOT, timeout=120)
    return out


def test_augmenting_on_the_device_trains_the_same(reference: list[float], photo_mds: Path, tmp_path: Path) -> None:
    assert losses(photo_mds, tmp_path, "device", "data.augment_on=device") == reference


def test_microbatches_on_the_device_get_their_own_programs(photo_mds: Path, tmp_path: Path) -> None:
    overrides = ["run.device_train_microbatch_size=4", "model.drop_path_rate=0"]
    worker = losses(photo_mds, tmp_path, "worker", *overrides)
    assert losses(photo_mds, tmp_path, "device", *overrides, "data.augment_on=device") == worker


def test_seekable_files_train_as_the_files_themselves(
    one_shard: list[float], photo_folder: Path, tmp_path: Path
) -> None:
    plain = convert(photo_folder, tmp_path / "plain", "--no-seekable")
    assert b"vitseek1" not in (plain / "train/shard.00000.mds").read_bytes()
    assert losses(plain, tmp_path, "plain") == one_shard


def test_raw_pixels_train_as_the_files_they_were_decoded_from(
    one_shard: list[float], photo_folder: Path, tmp_path: Path
) -> None:
    raw = convert(photo_folder, tmp_path / "raw", "--raw-fraction", "1.0")
    assert losses(raw, tmp_path, "raw") == one_shard


def test_low_resolution_column_is_used_and_trains(one_shard: list[float], photo_folder: Path, tmp_path: Path) -> None:
    small = convert(photo_folder, tmp_path / "small", "--raw-below", "48")
    assert losses(small, tmp_path, "image") == one_shard
    assert losses(small, tmp_path, "small", "augment.low_resolution=true") != one_shard


def test_shared_decodes_train(photo_mds: Path, tmp_path: Path) -> None:
    shared = losses(photo_mds, tmp_path, "shared", "augment.shared_decodes=true")
    assert losses(photo_mds, tmp_path, "again", "augment.shared_decodes=true", "data.num_workers=2") == shared


def test_shards_of_streamings_imagenet_converter_train(photo_folder: Path, tmp_path: Path) -> None:
    """Its columns are x, a Pillow image written as JPEG again, and y."""
    from streaming import MDSWriter

    for split in ("train", "val"):
        with MDSWriter(out=str(tmp_path / "mds" / split), columns={"i": "int", "x": "jpeg", "y": "int"}) as writer:
            for label, folder in enumerate(sorted((photo_folder / split).iterdir())):
                for i, file in enumerate(sorted(folder.iterdir())):
                    sample: dict[str, Any] = {"i": i, "x": Image.open(file), "y": label}
                    writer.write(sample)
    found = losses(tmp_path / "mds", tmp_path, "theirs")
    assert found[0] == pytest.approx(2.0794, abs=0.3)  # ln 8: the head starts with small weights


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("augment.low_resolution=true", ["augment.low_resolution", "image_small", "--raw-below"]),
        ("augment.repeated_augmentation=1 augment.shared_decodes=true", ["augment.shared_decodes", "false"]),
        ("data.augment_on=gpu", ["data.augment_on", "gpu", "device"]),
        ("augment.decode_scale=half", ["augment.decode_scale", "half", "exact"]),
    ],
)
def test_options_that_do_not_fit_are_refused(
    override: str, words: list[str], photo_mds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_train([DEIT, *tiny_photo_overrides(photo_mds, tmp_path, "bad"), *override.split()]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), errors
