"""``metrics.jsonl``, in which a run keeps what it measures. No Composer is needed to read it."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any, TypeGuard


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; one that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if isinstance(line, dict) and "step" in line:
                lines.append(line)
    return lines


def last_evaluation(path: Path, step: int) -> tuple[int, float, float] | None:
    """The last step, up to this one, at which raw weights and their average were both measured, and their top-1.

    None where there is no such step, or no file.
    """
    lines = read_metrics(path) if path.is_file() else []
    for line in reversed(lines):
        raw, average = line.get("metrics/eval/top1"), line.get("metrics/ema/top1")
        if line["step"] <= step and _is_number(raw) and _is_number(average):
            return line["step"], raw, average
    return None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
