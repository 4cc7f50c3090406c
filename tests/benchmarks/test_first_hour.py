"""The bench of the first hour: CPU seconds of everything a command starts, the first step, one split for all tools."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.accuracy.first_hour import measure, split_photos, table, take_part

BURN = "import time\nwhile time.process_time() < 0.4: pass\n"


def typed(code: str) -> str:
    return f"{sys.executable} -c '{code}'"


def test_processes_below_a_command_count_and_the_first_step_is_seen(tmp_path: Path) -> None:
    below = f"{typed(BURN)}; echo step 1; {typed(BURN)}; exit 0"
    found = measure([typed(BURN), below], "^step 1", tmp_path, "/usr/bin")
    assert 0.6 < found["cpu_to_first_step"] < found["cpu"], "two burn before the step, and one behind it"
    assert found["cpu"] > 1.15 and found["seconds_to_first_step"] < found["seconds"]


@pytest.mark.parametrize(("line", "says"), [("echo no; exit 3", "exit 3\nno"), ("echo no", "nothing like 'step'")])
def test_a_command_that_fails_or_shows_no_step_ends_the_bench(line: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=says):
        measure([line], "step", tmp_path, "/usr/bin")


def test_one_folder_is_split_once_for_all_tools_and_trials_take_a_part(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for at in range(200):
            Image.new("RGB", (2, 2)).save(tmp_path / "photos" / name / f"{at}.png")
    photos = split_photos(tmp_path / "photos", tmp_path / "work")
    splits = {
        split: {path.relative_to(photos / split) for path in photos.glob(f"{split}/*/*")} for split in ("train", "val")
    }
    assert {split: len(paths) for split, paths in splits.items()} == {"train": 360, "val": 40}
    assert len(splits["train"] | splits["val"]) == 400
    part, share = take_part(photos, tmp_path / "part", batch=32)
    assert share == 5 / 11 and len(list(part.glob("train/*/*"))) == 160, "5 of 11 steps"
    assert len(list(part.glob("val/*/*"))) == 20


def test_rows_have_what_was_typed_and_the_last_and_best_evaluation() -> None:
    run = {"photos": "bees", "tool": "yolo", "seconds_to_first_step": 9.6, "cpu_to_first_step": 2.6, "cpu": 121.7}
    run |= {"commands": ["yolo classify train"], "characters": 19, "epochs": 60}
    rows = table([{**run, "top1": [50.0, 75.0, 73.9]}, {**run, "top1": [71.0]}]).splitlines()
    assert rows[-1] == "| yolo classify, YOLO11n-cls | 1 | 19 | 10 (3) | 60 | 122 | 73.9, 71.0 | 75.0, 71.0 |"
