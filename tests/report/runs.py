"""Run folders for the tests of reports, written as a run writes them, with whatever is given in them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitcomposer.runs.predictions import Predictions, write_predictions

HOSTILE = '<script>alert(1)</script>"&\u202e\x1b[31m\n</pre>'
SUMMARY = {
    "recipe": "supervised",
    "model": "deit_small",
    "top1": 0.7981,
    "steps": 375300,
    "seconds": 3725.4,
    "images_per_sec": 5321.0,
    "images_seen": 3000,
    "data_wait_fraction": 0.02,
    "train_flops": 6e9,
    "world_size": 8,
    "device": "NVIDIA H200",
    "peak_memory_bytes": 3 * 2**30,
    "finished": True,
}


def line(step: int, **metrics: float | None) -> dict[str, Any]:
    speed = {"throughput/images_per_sec": 900.0 + step, "throughput/data_wait_fraction": 0.1}
    where = {"step": step, "epoch": step / 10, "sample": 10 * step, "seconds": step / 2}
    return {**where, "lr": 0.1 / step, "loss/train/total": 5.0 / step, **speed, **metrics}


def evaluated(step: int, top1: float = 0.5, ema: float = 0.6) -> dict[str, Any]:
    return line(step) | {"metrics/eval/top1": top1, "metrics/ema/top1": ema, "metrics/eval/loss": 2.0}


def write_run(folder: Path, lines: list[dict[str, Any]], **files: Any) -> Path:
    """``summary_json={...}`` becomes ``summary.json``."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("_json", ".json").replace("_yaml", ".yaml")).write_text(text)
    return folder


def predictions(labels: Sequence[int], guesses: Sequence[int], step: int = 300) -> Predictions:
    """The confidence falls with the place of the image."""
    count = len(labels)
    sure = np.linspace(0.9, 0.4, count)
    return Predictions(np.arange(count), np.array(labels), np.array(guesses), sure, sure / 2, step)


def said(folder: Path, labels: Sequence[int], guesses: Sequence[int], name: str = "predictions.csv") -> Path:
    """Write what the evaluation of a run said."""
    write_predictions(folder / name, predictions(labels, guesses))
    return folder
