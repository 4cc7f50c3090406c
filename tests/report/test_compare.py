"""Runs side by side: what differs in their settings, and whether their accuracies are shown to differ."""

from pathlib import Path
from typing import Any

import pytest

from tests.report.runs import HOSTILE, SUMMARY, evaluated, line, said, write_run
from vitcomposer import config
from vitcomposer.cli import main
from vitcomposer.report.compare import comparison, difference, names_of, results
from vitcomposer.report.story import read_story
from vitcomposer.runs.identity import plain, write_identity

LABELS = [0, 1] * 100
FIRST = [*[1, 0] * 5, *LABELS[10:]]  # ten wrong
SECOND = [*[1, 0] * 10, *LABELS[20:]]  # the same ten, and ten more


def run(folder: Path, top1: float, *overrides: str, **files: Any) -> Path:
    lines = [line(step) for step in range(1, 10)] + [evaluated(10, top1 / 2, 0.1), evaluated(20, top1, 0.1)]
    page = config.to_yaml(config.load("demo", list(overrides)))
    return write_run(folder, lines, summary_json=SUMMARY, config_yaml=page, **files)


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    first = said(run(tmp_path / "my_photos", 0.95), LABELS, FIRST)
    return [first, said(run(tmp_path / "my_photos_lr", 0.90, "optimizer.lr=1e-3"), LABELS, SECOND)]


def test_command_prints_what_differs(two: list[Path], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, two)]) == 0
    weights = ", trained weights"
    assert capsys.readouterr().out.splitlines()[:5] == [
        "report.html: 2 runs",
        f"                my_photos{' ' * 24}my_photos_lr",
        f"optimizer.lr    0.004{' ' * 28}0.001",
        f"top-1           95.0 \u00b1 1.5 %{weights}    90.0 \u00b1 2.1 %{weights}   (-5.0; 200 images, paired: "
        "2 standard errors of a difference are 3.1: shown to differ)",
        f"GPU-hours       8.3{' ' * 30}8.3",
    ]
    page = (tmp_path / "report.html").read_text()
    assert "-5.0; 200 images, paired" in page and "Paired: b of the n images" in page
    assert page.count("<svg ") == 6, "accuracy and loss over images, seconds and FLOPs"


def test_of_other_images_only_their_number_counts(two: list[Path]) -> None:
    said(two[1], LABELS[1:], SECOND[1:])
    first, second = map(read_story, two)
    found = difference(first, second)
    assert found is not None and not found.paired and found.images == 199
    assert str(found).endswith("not shown to differ"), "of so few images, unless they are the same"
    text = comparison([first, second])
    assert "On different images" in text and "Paired" not in text


def test_other_images_are_named(two: list[Path]) -> None:
    for folder, index in zip(two, ("a", "b"), strict=True):
        cfg = config.load(folder / "config.yaml")
        write_identity(folder, {"config": plain(cfg), "images": {"val": {"samples": 200, "index": index}}})
    said(two[1], LABELS[1:], SECOND[1:])
    rows = results([read_story(folder) for folder in two])
    assert rows[0].remarks[1].endswith("; the images are others")


def test_accuracy_without_a_number_of_images_has_no_error(two: list[Path]) -> None:
    (two[1] / "predictions.csv").unlink()
    first, second = map(read_story, two)
    assert difference(first, second) is None
    assert "standard errors of a difference are" not in comparison([first, second])


def test_curves_are_drawn_over_the_flops_that_were_logged(tmp_path: Path) -> None:
    """A curriculum spends few FLOPs on its first images; without a log of them they count alike."""
    spent = [{**evaluated(step), "throughput/train_flops": 1e9 * step**2} for step in (1, 2, 3)]
    stories = [read_story(write_run(tmp_path / name, spent, summary_json=SUMMARY)) for name in "ab"]
    assert ">8G<" in comparison(stories)
    plain = read_story(write_run(tmp_path / "c", [evaluated(step) for step in (1, 2, 300)], summary_json=SUMMARY))
    assert ">6G<" in comparison([plain, plain]), "all images of the summary, all its FLOPs"


def test_three_runs_are_compared_with_the_first(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    third = said(run(tmp_path / "third", 0.95), LABELS, FIRST)
    assert main(["report", *map(str, [*two, third]), "--out", str(tmp_path / "x.html")]) == 0
    printed = capsys.readouterr().out
    assert "my_photos_lr: -5.0; 200 images, paired" in printed
    assert "third: +0.0; 200 images, paired: 2 standard errors of a difference are 0.0: not shown to differ" in printed


def test_of_unequal_classes_their_means_are_compared_first(two: list[Path]) -> None:
    for folder, lost in zip(two, (1, 3), strict=True):
        said(folder, [0] * 40 + [1] * 10, [0] * 40 + [0] * lost + [1] * (10 - lost))
    rows = results([read_story(folder) for folder in two])
    assert [row.name for row in rows[:2]] == ["mean of classes", "top-1"]
    assert rows[0].remarks[1].startswith("-10.0; 50 images, paired: 2 standard errors of a difference are 12.6: not")


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        folder.parent.mkdir()
        run(folder, 0.5)
    stories = [read_story(folder) for folder in folders]
    assert names_of(stories) == ["a/run", "b/run"] and names_of(stories[:1] * 2) == ["run", "run"]


def test_settings_and_names_act_neither_on_the_page_nor_on_the_terminal(tmp_path: Path, capsys: Any) -> None:
    hostile = HOSTILE.replace("/", "|")
    folders = [run(tmp_path / "plain", 0.5), run(tmp_path / hostile, 0.5, "data.local=<script>alert(1)")]
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "x.html")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out
    page = (tmp_path / "x.html").read_text()
    assert "<script" not in page and "\u202e" not in page and "data.<wbr>local" in page
