"""A folder without classes is data for the recipes without labels alone; classes are counted in the data."""

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_train
from tests.data.conversion.conversion import write_images
from tests.self_supervised.test_self_supervised import page, tiny
from vitcomposer import config
from vitcomposer.cli import main
from vitcomposer.errors import ConfigError
from vitcomposer.needed_files import check_needed_files

DEMO = ROOT / "yamls/demo.yaml"


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled")
    write_images(folder / "images/2024", {"june": 20, "july": 20})
    out = str(folder / "mds")
    assert main(["convert", "folder", str(folder / "images"), out, "--unlabelled", "--workers", "1"]) == 0
    return folder / "mds"


@pytest.mark.parametrize("method", ["swav", "dino"])
def test_recipes_without_labels_train_on_a_folder_without_classes(
    method: str, unlabelled: Path, tmp_path: Path
) -> None:
    assert run_train([page(method), *tiny(method, unlabelled, tmp_path, method)]) == 0
    summary = json.loads((tmp_path / method / "summary.json").read_text())
    assert summary["finished"] and summary["images_seen"] > 40


def test_recipe_with_labels_says_that_there_are_none(unlabelled: Path) -> None:
    for classes in ("null", "10"):
        changes = [f"data.local={unlabelled}", "data.val_split=train", f"model.num_classes={classes}"]
        with pytest.raises(ConfigError, match="data.local must be a data set of two classes or more.*without labels"):
            config.load(DEMO, changes, also=check_needed_files)


def test_classes_are_counted_in_the_data_where_the_yaml_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "mds/train").mkdir(parents=True)
    here = [f"data.local={tmp_path / 'mds'}", "model.num_classes=null"]
    with pytest.raises(ConfigError, match="^model.num_classes must be a number, or left out where .*class_names.json"):
        config.load(DEMO, here)
    (tmp_path / "mds/train/class_names.json").write_text('["ant", "bee", "cat"]')
    assert config.load(DEMO, here).model.num_classes == 3
    (tmp_path / "demo.yaml").write_text(DEMO.read_text().replace("  num_classes: 10\n", ""))
    assert config.load(tmp_path / "demo.yaml", here[:1]).model.num_classes == 3
    assert config.load(DEMO, [here[0], "model.num_classes=7"]).model.num_classes == 7
