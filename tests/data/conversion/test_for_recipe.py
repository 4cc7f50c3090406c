"""``vitcomposer convert --for``: what is stored for a recipe, what it prints first, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.conversion.conversion import write_images
from vitcomposer.cli import main
from vitcomposer.config import load
from vitcomposer.data.conversion.encode import StoreOptions
from vitcomposer.data.conversion.for_recipe import fit, needs_of
from vitcomposer.shipped import YAMLS


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("for") / "images"
    write_images(folder, {"a": 30, "b": 30}, size=300)  # 300 x 30 pixels
    return folder


def run(images: Path, out: Path, *options: str) -> int:
    return main(["convert", "folder", str(images), str(out), "--workers", "1", *options])


@pytest.mark.parametrize(
    ("page", "side", "views", "evaluated"),
    [
        ("vit_s_medium", 160, [96, 160, 192, 224], 256),
        ("vit_s_hot", 160, [96, 160, 192, 224], 256),
        ("vit_b_medium", None, [192, 224], 224),
        ("deit_s", None, [224], 256),
        ("swav_deit_s", None, [96, 224], 256),
        ("probe_linear", None, [224], 256),
    ],
)
def test_what_recipes_read(page: str, side: int | None, views: list[int], evaluated: int) -> None:
    needs = needs_of(load(page), page)
    assert (needs.small_side, needs.views, needs.evaluated) == (side, views, evaluated)
    assert fit(needs, StoreOptions(), "out").raw_below == side
    assert needs.has_labels == (page != "swav_deit_s")


def test_keys_of_the_recipe_decide_on_the_column() -> None:
    off = needs_of(load("vit_s_medium", ["augment.low_resolution_stages=false"]), "off")
    always = needs_of(load("deit_s", ["augment.low_resolution=true"]), "always")
    assert off.small_side is None and always.small_side == 374


@pytest.mark.parametrize(
    ("page", "given", "seekable"),
    [
        ("photos_scratch", StoreOptions(), False),
        ("photos_scratch", StoreOptions(seekable=True), True),
        ("photos_scratch", StoreOptions(raw_below=200), False),
        ("photos_scratch", StoreOptions(small_quality=90, raw_below=160), None),
        ("vit_s_medium", StoreOptions(), None),
        ("deit_s", StoreOptions(), None),
    ],
)
def test_jpegs_are_made_seekable_only_where_training_reads_parts_of_them(
    page: str, given: StoreOptions, seekable: bool | None
) -> None:
    assert fit(needs_of(load(page), page), given, "out").seekable is seekable


def test_a_page_may_leave_its_classes_to_the_data_set_that_is_written(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out = tmp_path / "mine.yaml", tmp_path / "out"
    text = (YAMLS / "photos_scratch.yaml").read_text()
    page.write_text(re.sub(r"num_classes: 10", "num_classes: null", text).replace("datasets/photos", str(out)))
    assert run(images, out, "--for", str(page)) == 0
    assert "shorter side 160, raw pixels: views of 64 and 96 px" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["splits"]["train"]["stored"] == {"kept": 54}
    assert load(page).model.num_classes == 2


def test_what_a_recipe_reads_is_found_without_torch() -> None:
    line = "import sys, vitcomposer.data.conversion.for_recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], check=False).returncode == 0


def test_imagenet_of_the_papers_is_read_as_it_is_stored() -> None:
    needs = needs_of(load("vit_s_medium"), "vit_s_medium")
    assert fit(needs, StoreOptions(), "/data/imagenet").exif == "keep"
    assert fit(needs, StoreOptions(exif="apply"), "/data/imagenet").exif == "apply"
    assert fit(needs, StoreOptions(), "/data/photos").exif is None


def test_the_plan_is_printed_before_and_is_true(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(images, out, "--for", "vit_s_medium") == 0
    printed = capsys.readouterr().out
    assert printed.index("for vit_s_medium: images are turned upright") < printed.index("60 of 60 images")
    assert "shorter side 160, raw pixels: views of 96 px" in printed
    assert "as it came: views of 160, 192 and 224 px, evaluation" in printed
    (expected,) = re.findall(r"in all +([\d.]+) GB  for 60 images", printed)
    stored = sum(facts["shard_bytes"] for facts in json.loads((out / "summary.json").read_text())["splits"].values())
    assert float(expected) == pytest.approx(stored / 1e9, rel=0.05, abs=0.0006)
    assert json.loads((out / "train/index.json").read_text())["image_small"] == 160


def test_nothing_beside_the_image_where_no_view_is_small(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(images, tmp_path / "out", "--for", "deit_s") == 0
    printed = capsys.readouterr().out
    assert "as it came: views of 224 px, evaluation" in printed and "raw pixels" not in printed
    assert "image_small" not in json.loads((tmp_path / "out/train/index.json").read_text())


def test_options_by_hand_win(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--raw-below", "270", "--small-quality", "80", "--short-side", "300", "--exif", "keep"]
    assert run(images, tmp_path / "out", "--for", "vit_s_medium", *options) == 0
    printed = capsys.readouterr().out
    assert "shorter side 270, JPEG of quality 80: views of 96 and 160 px" in printed
    assert "shorter side at most 300: views of 192 and 224 px" in printed and "read as they are stored" in printed


@pytest.mark.parametrize(
    ("page", "options", "message"),
    [
        ("vit_s_medium", ["--raw-below", "120"], "--raw-below must be 160 or more with --for vit_s_medium"),
        ("vit_s_medium", ["--short-side", "224"], "--short-side must be 256 or more with --for vit_s_medium"),
        ("vit_s_medium", ["--unlabelled"], "--unlabelled must be left out with --for vit_s_medium"),
        ("swav_deit_s", ["--raw-below", "160"], "--raw-below must be left out with --for swav_deit_s"),
        ("deit_s", ["--small-quality", "90"], "--small-quality must be left out without a column image_small"),
        ("vit_s_mediun", [], "vit_s_medium"),
    ],
)
def test_a_clash_is_one_error_before_anything_is_written(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], page: str, options: list[str], message: str
) -> None:
    assert run(images, tmp_path / "out", "--for", page, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()
