"""Damaged images, indexes and shards: a refusal in words, or pixels; no crash, no hang, no wrong label."""

import time
from pathlib import Path

import pytest

from benchmarks.faults.fuzz import Report, fuzz
from tests.faults.conftest import Tell


def check(report: Report, tried: int) -> None:
    assert not report.faults, "\n".join(report.faults)
    assert sum(row.tried for row in report.rows.values()) == tried
    assert sum(row.crashes + row.hangs for row in report.rows.values()) == 0


def shares(report: Report) -> dict[str, float]:
    """Of the images that ours decode, those whose pixels are Pillow's, and whose boxes are ours of the whole."""
    pillow, box = report.compared["pillow"], report.compared["box"]
    asked = pillow["equal"] + pillow["different"] + pillow["we alone decode"]
    return {"pillow": pillow["equal"] / asked, "box": 1 - box["different"] / (box.total() - box["not asked"])}


@pytest.mark.timeout(120)
def test_damaged_images_are_decoded_as_pillow_does_or_refused(tmp_path: Path, tell: Tell) -> None:
    began = time.monotonic()
    report = fuzz("images", 330, 1, tmp_path)
    check(report, 330)
    assert shares(report)["pillow"] == 1 and shares(report)["box"] > 0.98
    decoded, refused = (sum(getattr(row, name) for row in report.rows.values()) for name in ("decoded", "refused"))
    assert decoded > 100 and refused > 50
    tell("330 damaged images", f"{decoded} decoded, {refused} refused in words, no crash", time.monotonic() - began)


@pytest.mark.timeout(120)
def test_damaged_indexes_and_shards_give_no_wrong_label(tmp_path: Path, tell: Tell) -> None:
    began = time.monotonic()
    report = fuzz("data", 21, 1, tmp_path)
    check(report, 21)
    refused = sum(row.refused for row in report.rows.values())
    tell("21 damaged indexes and shards", f"{refused} refused by name, no wrong label", time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_damaged_images(tmp_path: Path) -> None:
    report = fuzz("images", 10_000, 0, tmp_path)
    check(report, 10_000)
    assert shares(report)["pillow"] == 1 and shares(report)["box"] > 0.99


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_damaged_indexes_and_shards(tmp_path: Path) -> None:
    check(fuzz("data", 500, 0, tmp_path), 500)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kernels_stay_inside_their_arrays(tmp_path: Path) -> None:
    check(fuzz("images", 1000, 2, tmp_path, checked=True), 1000)
