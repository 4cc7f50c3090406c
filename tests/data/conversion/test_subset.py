"""Low-shot splits: balanced, exact copies of rows, drawn by a seed alone."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import PHOTOS, TRAIN_PER_CLASS
from tests.data.conversion.conversion import read_shards, tree
from vitcomposer import cli
from vitcomposer.data.conversion.subset import choose_balanced, write_subset


@pytest.fixture
def low_shot(photo_mds: Path, tmp_path: Path) -> Path:
    shutil.copytree(photo_mds, tmp_path / "mds")
    command = ["convert", "subset", str(tmp_path / "mds"), "train_10pct", "--fraction", "0.1", "--seed", "3"]
    assert cli.main(command) == 0
    return tmp_path / "mds"


def test_low_shot_split_is_balanced_exact_and_drawn_by_its_seed(low_shot: Path) -> None:
    whole, part = read_shards(low_shot, "train"), read_shards(low_shot, "train_10pct")
    assert json.loads((low_shot / "train_10pct/index.json").read_text())["exif"] == "apply"
    assert len(part) == round(0.1 * len(PHOTOS) * TRAIN_PER_CLASS) == 19
    assert len(set(part)) == 19 and set(part) <= set(whole), "bytes and label of rows of the whole split"
    counts = Counter(label for _, label in part)
    assert sorted(counts.values()) == [2] * 5 + [3] * 3
    before = tree(low_shot)
    write_subset(low_shot, "train_10pct", fraction=0.1, seed=3)
    assert tree(low_shot) == before, "already done"
    write_subset(low_shot, "again", fraction=0.1, seed=3)
    assert read_shards(low_shot, "again") == part
    write_subset(low_shot, "other", fraction=0.1, seed=4)
    assert set(read_shards(low_shot, "other")) != set(part)
    for arguments, error in (
        ({"name": "train_10pct", "fraction": 0.2, "seed": 3}, "is another subset"),
        ({"name": "val", "fraction": 0.2, "seed": 3}, "holds a data set"),
        ({"name": "tiny", "fraction": 0.01, "seed": 3}, "every of the 8 classes a sample"),
        ({"name": "../x", "fraction": 0.5, "seed": 3}, "must be a folder name"),
    ):
        with pytest.raises(ValueError, match=error):
            write_subset(low_shot, **arguments)


def test_smallest_classes_give_all_they_have() -> None:
    labels = np.repeat([0, 1, 2, 3], [2, 40, 50, 8])
    chosen = choose_balanced(labels, 0.5, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [2, 20, 20, 8]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
