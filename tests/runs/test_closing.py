"""The words at the end of a run: what its summary says, and commands that can be typed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitcomposer import cli
from vitcomposer.evaluation.confused import weakest
from vitcomposer.runs.closing import closing

SUMMARY: dict[str, Any] = {
    "recipe": "supervised",
    "top1": 0.931,
    "top1_ema": 0.939,
    "class_top1": 0.9,
    "class_top1_ema": 0.902,
    "loss": 0.312,
    "best": {"step": 1876, "epoch": 28, "measure": "top1", "value": 0.939, "weights": "ema"},
    "weakest": [
        {"class": "wasp", "images": 41, "top1": 0.71, "taken_for": "bee", "share": 0.24},
        {"class": "3", "images": 9, "top1": 0.78, "taken_for": "5", "share": 0.11},
        {"class": "cat", "images": 9, "top1": 0.89, "taken_for": "dog", "share": 0.11},
    ],
    "epochs": 30,
    "seconds": 458.0,
    "train_seconds": 418.0,
    "evaluation_seconds": 34.0,
    "saving_seconds": 6.0,
    "gpu_hours": 0.1272,
    "stopped_by": None,
}


def test_result_is_told_as_the_summary_has_it() -> None:
    assert closing(Path("runs/my photos"), SUMMARY).splitlines() == [
        "finished in 7:38 (train 6:58, evaluation 0:34, saving 0:06), 0.13 GPU-hours",
        "top-1 93.9 % (EMA; raw 93.1)   mean of classes 90.2 %   best epoch 28   loss 0.31",
        "weakest: wasp 71 % (taken for bee 24 %), class 3 78 % (taken for class 5 11 %)",
        "runs/my photos/report.html",
        "Next:",
        "  vitcomposer predict 'runs/my photos' FILE_OR_FOLDER",
        "  vitcomposer export 'runs/my photos' --out exported",
        "  vitcomposer report 'runs/my photos' OTHER_RUN        # side by side",
    ]


def test_what_was_not_measured_is_left_out() -> None:
    bare = {"recipe": "swav", "seconds": 61.0, "epochs": 3.5, "stopped_by": "max_hours", "knn": {"top1": 0.91}}
    lines = closing(Path("runs/x"), {**dict.fromkeys(SUMMARY), **bare}).splitlines()
    assert lines[:3] == ["ended by run.max_hours after 3.5 epochs, in 1:01", "k-NN top-1 91.0 %", "runs/x/report.html"]
    worse = {**SUMMARY, "top1": 0.95, "weakest": []}
    assert "top-1 95.0 % (raw; EMA 93.9)   mean of classes 90.0 %" in closing(Path("runs/x"), worse)
    assert "weakest" not in closing(Path("runs/x"), worse)
    rare = closing(Path("runs/x"), {**SUMMARY, "class_imbalance": 20.0}).splitlines()[1]
    assert rare.startswith("mean of classes 90.2 %   top-1 93.9 % (EMA; raw 93.1)")


@pytest.mark.parametrize("recipe", ["supervised", "distill", "swav", "dino", "probe", "knn"])
def test_next_commands_are_commands(recipe: str) -> None:
    lines = closing(Path("runs/x"), {**SUMMARY, "recipe": recipe}).partition("Next:\n")[2].splitlines()
    names = {command.name for command in cli.COMMANDS}
    assert lines and all(line.split()[0] == "vitcomposer" and line.split()[1] in names for line in lines)


def test_weakest_classes_are_those_of_which_most_is_wrong() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1, 2, 2, 4])
    guesses = np.array([0, 0, 0, 1, 2, 0, 4, 2, 4])
    assert weakest(truth, guesses, most=2) == [(1, 2, 0.0, 0, 0.5), (2, 2, 0.5, 4, 0.5)]
    assert weakest(truth, truth, most=2) == []
