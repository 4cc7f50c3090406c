"""The speed-run harness: what it counts, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speedrun import entry, table
from benchmarks.speedrun.tracks import TRACKS, Track
from tests.conftest import ROOT

RUN = {"images": 359, "bad_images": 0, "cpu_seconds": 50.0, "wall_seconds": 30.0, "steps": 10, "gpu_hours": None}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """An entry of three seeds that counts."""
    folder = tmp_path / "digits" / "one"
    (folder / "logs").mkdir(parents=True)
    shutil.copy(ROOT / "yamls/demo.yaml", folder / entry.RECIPE)
    write(folder, [0.985, 0.986, 0.984])
    return folder


def write(folder: Path, top1: list[float], **changes: Any) -> None:
    runs = [{**RUN, "seed": seed, "top1": value, "cpu_seconds": 50.0 + seed} for seed, value in enumerate(top1)]
    found = {"track": "digits", "weights": "ema", "runs": [{**run, **changes} for run in runs]}
    found |= {"machine": {"cpu": "x", "cores": 2, "load": 0.5}, "commit": "abc", "date": "2026-11-30"}
    (folder / entry.RESULT).write_text(json.dumps(found))
    for seed in range(len(top1)):
        (folder / "logs" / f"seed{seed}.jsonl").write_text('{"step": 5}\n{"step": 10}\n')


def test_chance_is_students_of_one_side() -> None:
    # t = (0.985 - 0.98) / (0.001 / sqrt(3)) = 8.66 with 2 degrees of freedom, whose tail is 1/2 - t / (2 sqrt(2 + t^2))
    t = 0.005 / (0.001 / 3**0.5)
    assert entry.chance([0.985, 0.986, 0.984], 0.98) == pytest.approx(0.5 - t / (2 * (2 + t * t) ** 0.5))
    assert entry.chance([0.98], 0.9) == 1.0, "one seed shows nothing"
    assert (entry.chance([0.99] * 3, 0.98), entry.chance([0.98] * 3, 0.98)) == (0.0, 1.0)


def test_entry_that_keeps_the_rules_counts(written: Path) -> None:
    verdict = entry.check(written)
    assert verdict.faults == [] and verdict.mean == pytest.approx(0.985) and verdict.seconds == pytest.approx(51)


@pytest.mark.parametrize(
    ("top1", "changes", "said"),
    [
        ([0.985, 0.986], {}, "3 or more"),
        ([0.985, 0.986, 0.984], {"seed": 0}, "3 or more"),
        ([0.98, 0.985, 0.979], {}, "is not shown"),
        ([0.985, 0.986, 0.984], {"images": 300}, "measured on 300 images"),
        ([0.985, 0.986, 0.984], {"bad_images": 2}, "2 of them bad"),
        ([0.985, 0.986, 0.984], {"steps": 20}, "ends at step 10 of 20"),
    ],
)
def test_what_breaks_a_rule_does_not_count(written: Path, top1: list[float], changes: dict, said: str) -> None:
    write(written, top1, **changes)
    assert said in " ".join(entry.check(written).faults)


@pytest.mark.parametrize("key", ["init: {weights: x.pt}", "run: {remote: s3://a}"])
def test_weights_from_elsewhere_do_not_count(written: Path, key: str) -> None:
    (written / entry.RECIPE).write_text(key)
    assert "is set in its recipe" in " ".join(entry.check(written).faults)


def test_missing_log_does_not_count(written: Path) -> None:
    (written / "logs/seed1.jsonl").unlink()
    assert entry.check(written).faults == ["logs/seed1.jsonl is missing"]


def test_table_of_the_page_is_that_of_the_entries(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    shutil.copy(table.PAGE, page)
    table.write_table(page)
    assert page.read_text() == table.PAGE.read_text(), "run python -m benchmarks.speedrun table"


@pytest.mark.parametrize("track", TRACKS.values(), ids=TRACKS)
def test_every_entry_counts(track: Track) -> None:
    for result in track.entries.glob(f"*/{entry.RESULT}"):
        assert entry.check(result.parent).faults == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_trains_measures_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "short.yaml"
    short.write_text(
        (ROOT / "yamls/demo.yaml").read_text().replace("60ep", "2ep").replace("t_warmup: 8ep", "t_warmup: 1ep")
    )
    command = [sys.executable, "-m", "benchmarks.speedrun", "run", "digits", str(short), "--name", "short"]
    places = ["--work", str(tmp_path), "--out", str(tmp_path / "entries")]
    done = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 1 and "is not shown" in done.stdout, done.stderr
    runs = json.loads((tmp_path / "entries/short" / entry.RESULT).read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 1, 2] and all(run["cpu_seconds"] > 1 for run in runs)
    assert all(run["images"] == 359 and 0.1 < run["top1"] < 0.95 for run in runs)
