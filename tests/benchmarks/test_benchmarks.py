"""The input benchmark runs from its command line; its own numbers are no subject here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.input", "--quick", "--rounds", "2", "--no-install"]
    places = ["--work", folder / "work", "--out", folder / "out"]
    return subprocess.run([*command, *places, *options], cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    done = run(folder, "--only", "ours-seekable", "tf-bilinear")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "input_full.json").read_text())


def test_every_round_of_ours_and_the_baseline_is_in_the_results(report: dict[str, Any]) -> None:
    ours, baseline = report["candidates"]["ours-seekable"], report["candidates"]["torchvision"]
    for row in (ours, baseline):
        assert len(row["rounds"]) == report["rounds"] == 2
        for turn in row["rounds"]:
            assert turn["images"] % 64 == 0 and 0 < turn["cpu_seconds"] <= 1.1 * turn["wall_seconds"] + 0.02
    speeds = [[turn["images"] / turn["cpu_seconds"] for turn in row["rounds"]] for row in (ours, baseline)]
    ratios = [own / other for own, other in zip(*speeds, strict=True)]
    assert ours["ratio"]["min"] == pytest.approx(min(ratios)) and ours["ratio"]["max"] == pytest.approx(max(ratios))
    assert baseline["ratio"] == {"median": 1, "min": 1, "max": 1}
    assert ours["shapes"] == baseline["shapes"] == [[3, 224, 224]]
    assert (ours["dtype"], baseline["dtype"]) == ("uint8", "float32")


def test_peer_that_is_not_installed_is_a_row_with_the_reason(report: dict[str, Any], folder: Path) -> None:
    row = report["candidates"]["tf-bilinear"]
    assert row["failure"] == "not installed: --no-install" and "ratio" not in row
    assert "not installed: --no-install" in (folder / "out" / "input_full.md").read_text()


def test_photos_have_the_statistics_of_imagenet(report: dict[str, Any], folder: Path) -> None:
    photos = report["photos"]
    assert photos["files"] == 64
    assert 95_000 < photos["mean_bytes"] < 125_000 and 170_000 < photos["mean_pixels"] < 210_000
    file = next((folder / "work" / "full-64" / "photos").glob("*/*.jpg"))
    with Image.open(file) as image:
        assert image.format == "JPEG" and "progressive" not in image.info


def test_quality_of_ours_is_that_of_pillow(report: dict[str, Any]) -> None:
    ours = report["quality"]["vitcomposer"]
    assert ours["psnr_mean"] > 70 and ours["largest_difference"] <= 2
    assert all(row["psnr_mean"] < 50 for name, row in report["quality"].items() if name != "vitcomposer")


def test_picture_is_written(folder: Path) -> None:
    with Image.open(folder / "out" / "input_full.png") as image:
        assert image.width > 800


def test_unknown_candidate_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "no-such")
    assert done.returncode != 0 and "no-such" in done.stderr and "ours-seekable" in done.stderr
