"""Says what came out of a run, by its summary.json: time, accuracy, the weakest classes, and what to type next."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitcomposer.data.labels import UNEQUAL
from vitcomposer.escape import for_terminal
from vitcomposer.runs import layout

_UNLABELLED = ("swav", "simclr", "moco", "dino")


def closing(folder: Path, summary: Mapping[str, Any]) -> str:
    """The lines that end a run; what the summary does not have is left out."""
    lines = [
        _time(summary),
        _accuracy(summary),
        _weakest(summary),
        str(folder / layout.REPORT),
        *_next(folder, summary),
    ]
    return "\n".join(for_terminal(line) for line in lines if line)


def clock(seconds: float) -> str:
    """``7:02``, or ``1:07:02`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _time(summary: Mapping[str, Any]) -> str:
    shares = [
        f"{name} {clock(summary[key])}"
        for name, key in (
            ("train", "train_seconds"),
            ("evaluation", "evaluation_seconds"),
            ("saving", "saving_seconds"),
        )
        if summary.get(key) is not None
    ]
    key, epochs = summary.get("stopped_by"), f"{summary.get('epochs', 0):g}"
    how = "finished" if key is None else f"ended by run.{key} after {epochs} epochs,"
    cost = "" if summary.get("gpu_hours") is None else f", {summary['gpu_hours']:.2f} GPU-hours"
    split = f" ({', '.join(shares)})" if shares else ""
    return f"{how} in {clock(summary.get('seconds') or 0)}{split}{cost}"


def _accuracy(summary: Mapping[str, Any]) -> str:
    raw, average = summary.get("top1"), summary.get("top1_ema")
    parts = []
    better = "_ema" if average is not None and (raw is None or average > raw) else ""
    if summary.get(f"top1{better}") is not None:
        other = ""
        if raw is not None and average is not None:
            other = f" (EMA; raw {100 * raw:.1f})" if better else f" (raw; EMA {100 * average:.1f})"
        parts.append(f"top-1 {100 * summary[f'top1{better}']:.1f} %{other}")
    if summary.get(f"class_top1{better}") is not None:
        first = (summary.get("class_imbalance") or 1) > UNEQUAL  # then it tells more than the images do
        parts.insert(0 if first else 1, f"mean of classes {100 * summary[f'class_top1{better}']:.1f} %")
    if isinstance(summary.get("knn"), Mapping) and summary["knn"].get("top1") is not None:
        parts.append(f"k-NN top-1 {100 * summary['knn']['top1']:.1f} %")
    if summary.get("best"):
        parts.append(f"best epoch {summary['best']['epoch']:g}")
    if summary.get("loss") is not None:
        parts.append(f"loss {summary['loss']:.2f}")
    return "   ".join(parts)


def _weakest(summary: Mapping[str, Any]) -> str:
    rows = [
        f"{_named(row['class'])} {100 * row['top1']:.0f} % "
        f"(taken for {_named(row['taken_for'])} {100 * row['share']:.0f} %)"
        for row in (summary.get("weakest") or [])[:2]
    ]
    return f"weakest: {', '.join(rows)}" if rows else ""


def _named(name: str) -> str:
    return f"class {name}" if name.isdigit() else name


def _next(folder: Path, summary: Mapping[str, Any]) -> list[str]:
    run = shlex.quote(str(folder))
    if summary.get("recipe") in _UNLABELLED:
        commands = [
            f"vitcomposer train probe_linear init.weights={run}",
            f"vitcomposer train probe_knn init.weights={run}",
            f"vitcomposer attention {run} IMAGE --out pictures",
        ]
    elif summary.get("recipe") in ("supervised", "distill"):
        commands = [
            f"vitcomposer predict {run} FILE_OR_FOLDER",
            f"vitcomposer export {run} --out exported",
            f"vitcomposer report {run} OTHER_RUN        # side by side",
        ]
    else:
        commands = [f"vitcomposer report {run} OTHER_RUN        # side by side"]
    return ["Next:", *(f"  {command}" for command in commands)]
