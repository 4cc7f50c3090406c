"""A run goes on with the images that it began with, wherever they lie, and with no others."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import error_of, run_train
from tests.data.conversion.conversion import write_images
from tests.faults.small_run import DEIT, tiny
from vitcomposer.cli import main
from vitcomposer.runs.identity import read_identity, write_identity
from vitcomposer.runs.layout import IDENTITY

CLASSES = {"cat": 12, "dog": 12}


def convert(folder: Path, classes: dict[str, int], seed: int = 0) -> Path:
    write_images(folder / "images/train", classes, seed)
    write_images(folder / "images/val", dict.fromkeys(classes, 4), 500 + seed)
    options = ["--workers", "1", "--no-seekable"]
    assert main(["convert", "folder", str(folder / "images"), str(folder / "mds"), *options]) == 0
    return folder / "mds"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = {
        "same": (CLASSES, 0),
        "names": ({"ant": 12, "bee": 12}, 0),
        "more classes": ({**CLASSES, "emu": 12}, 0),
        "more images": ({"cat": 12, "dog": 13}, 0),
        "pixels": (CLASSES, 7),
    }
    folder = tmp_path_factory.mktemp("data")
    sets = {name: convert(folder / name, classes, seed) for name, (classes, seed) in kinds.items()}
    shutil.copytree(sets["same"], folder / "val/mds")
    shutil.rmtree(folder / "val/mds/val")
    shutil.copytree(sets["names"] / "val", folder / "val/mds/val")
    (folder / "val/mds/val/class_names.json").write_text('["cat", "dog"]\n')
    return {**sets, "val": folder / "val/mds"}


def start(runs: Path, *more: str) -> int:
    small = ["data.source=mds", "model.num_classes=2", "global_train_batch_size=8", "evaluation.global_batch_size=8"]
    return run_train([DEIT, *tiny(runs, "demo"), *small, "run.eval_interval=9ba", *more])


@pytest.fixture(scope="module")
def finished(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert start(runs, f"data.local={data['same']}", "max_duration=1ba") == 0
    return runs / "demo"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "runs/demo", symlinks=True)
    return tmp_path / "runs/demo"


def files(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_identity_tells_images_and_configuration(run: Path) -> None:
    identity = read_identity(run)
    assert identity is not None and identity["config"]["optimizer"]["weight_decay"] == 0.05
    train = identity["images"]["train"]
    assert train["source"] == "mds" and train["samples"] == 24 and train["classes"] == ["cat", "dog"]
    assert identity["images"]["val"]["samples"] == 8
    (run / IDENTITY).write_text((run / IDENTITY).read_text().replace('"samples": 24', '"samples": 25'))
    assert read_identity(run) is None, "it has a digest"


OTHERS = {
    "names": "data.local must lead to the images of the run in RUN, whose split train has the classes cat, dog, got "
    "the classes ant, bee in DATA/train. Set run.name=demo_2 to use these, or name those, which may lie anywhere.",
    "more classes": "data.local must lead to .* has 2 classes, got 3 classes in DATA/train",
    "more images": "data.local must lead to .* has 24 images, got 25 images in DATA/train",
    "pixels": "data.local must lead to .* has an index.json of sha256 [0-9a-f]{12}, got an index.json of sha256 ",
    "val": "data.local must lead to .* whose split val has an index.json of sha256 .* in DATA/val",
}


@pytest.mark.parametrize("duration", ["max_duration=1ba", "max_duration=2ba"])
@pytest.mark.parametrize("other", OTHERS)
def test_other_images_are_refused_by_name(
    other: str, duration: str, run: Path, data: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run)
    assert start(run.parent, f"data.local={data[other]}", duration) == 2
    expected = OTHERS[other].replace("RUN", re.escape(str(run))).replace("DATA", re.escape(str(data[other])))
    assert re.match(f"error: {expected}", error_of(capsys.readouterr().err))
    assert files(run) == before


def test_a_resume_says_that_the_resize_is_another_one(
    run: Path, data: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of an older version noted none down: its crops were those of Pillow 12 and older."""
    identity = read_identity(run)
    assert identity is not None and identity.pop("resize") == "Pillow 13"
    write_identity(run, identity)
    said = f"{run} began with the resize of Pillow 12; from here on it is that of Pillow 13: "
    assert start(run.parent, f"data.local={data['same']}", "max_duration=2ba") == 0
    assert capsys.readouterr().out.count(said) == 1
    assert start(run.parent, f"data.local={data['same']}", "max_duration=3ba") == 0
    assert "began with the resize" not in capsys.readouterr().out


def test_synthetic_images_are_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(run.parent, "data.source=synthetic", "data.local=null", "max_duration=2ba") == 2
    error = error_of(capsys.readouterr().err)
    assert error.startswith("error: data.source must lead to the images of the run")
    assert "has images of data.source=mds, got images of data.source=synthetic. Set run.name=demo_2" in error


def test_images_behind_a_cache_are_looked_at_when_they_came(
    run: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, cache = files(run), f"data.local={tmp_path}/cache"
    assert start(run.parent, f"data.remote={data['names']}", cache, "max_duration=2ba") == 2
    assert "has the classes cat, dog, got the classes ant, bee in" in capsys.readouterr().err
    assert files(run) == before


@pytest.mark.parametrize("way", ["moved", "cached"])
def test_the_same_images_may_lie_anywhere(way: str, run: Path, data: dict[str, Path], tmp_path: Path) -> None:
    place = [f"data.local={tmp_path}/elsewhere"]
    if way == "moved":
        shutil.copytree(data["same"], tmp_path / "elsewhere")
    else:
        place.append(f"data.remote={data['same']}")
    assert start(run.parent, *place, "max_duration=2ba") == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 2


def test_run_of_an_older_version_knows_its_classes(
    run: Path, data: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (run / IDENTITY).unlink()
    assert start(run.parent, f"data.local={data['names']}", "max_duration=2ba") == 2
    assert "has the classes cat, dog, got the classes ant, bee in" in capsys.readouterr().err
    assert json.loads((run / "class_names.json").read_text()) == ["cat", "dog"]
    assert start(run.parent, f"data.local={data['same']}", "max_duration=2ba") == 0
    assert (read_identity(run) or {})["images"]["train"]["samples"] == 24
