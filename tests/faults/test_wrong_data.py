"""Data sets that cannot be trained on, through train.py: one error with file and remedy, before the first step."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_train, tiny_photo_overrides
from tests.faults.conftest import Tell
from tests.faults.test_bad_data import DEIT, VAL, errors, rewrite

pytestmark = pytest.mark.timeout(150)


def relabelled(label: int) -> Callable[[Path], None]:
    """The last sample of the validation split gets another label; classes have no names."""

    def change(mds: Path) -> None:
        sound = mds.with_name("sound")
        mds.rename(sound)
        last = VAL - 1
        rewrite(sound, mds, lambda s, i, x: {**x, "label": label} if (s, i) == ("val", last) else x)
        for names in mds.glob("*/class_names.json"):
            names.unlink()

    return change


def edited(split: str, **changes: Any) -> Callable[[Path], None]:
    """The index of a split with other values."""

    def change(mds: Path) -> None:
        path = mds / split / "index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def encoded(encoding: str) -> Callable[[Path], None]:
    """Every shard says that its labels are of another encoding."""

    def change(mds: Path) -> None:
        path = mds / "train" / "index.json"
        index = json.loads(path.read_text())
        for shard in index["shards"]:
            at = shard["column_names"].index("label")
            shard["column_encodings"][at] = encoding
        path.write_text(json.dumps(index))

    return change


WRONG: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a label beyond the classes": (relabelled(8), ["model.num_classes", "shard.00001.mds, sample", "has 8", "got 8"]),
    "a negative label": (relabelled(-3), ["model.num_classes", "has -3", "vitcomposer convert"]),
    "an empty split": (edited("val", shards=[]), ["val/index.json", "at least one sample", "vitcomposer convert"]),
    "an index of another version": (edited("train", version=3), ["train/index.json", "version must be 2, it is 3"]),
    "an index that is none": (edited("val", shards=7), ["val/index.json", "a list called shards"]),
    "pickled labels": (encoded("pkl"), ["train/index.json", "pkl", "runs code", "vitcomposer convert"]),
    "labels that are text": (encoded("str"), ["train/index.json", "label: str", "integer"]),
    "labels of another size": (encoded("int32"), ["train/index.json", "int32 has 4 bytes, got 8"]),
    "no validation split": (lambda mds: shutil.rmtree(mds / "val"), ["'val'", "where the splits are: train"]),
    "class names that are no list": (
        lambda mds: (mds / "val/class_names.json").write_text("{"),
        ["val/class_names.json", "list of names", "Correct or delete"],
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_data_set_is_refused_before_the_first_step(
    photo_mds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], tell: Tell, fault: str
) -> None:
    change, words = WRONG[fault]
    shutil.copytree(photo_mds, tmp_path / "mds")
    change(tmp_path / "mds")
    began = time.monotonic()
    assert run_train([DEIT, *tiny_photo_overrides(tmp_path / "mds", tmp_path, "bad")]) == 2
    seconds = time.monotonic() - began
    (error,) = errors(capfd.readouterr().err)
    for word in words:
        assert word in error
    assert not (tmp_path / "bad" / "metrics.jsonl").exists(), "it began to train"
    tell(fault, error, seconds)
