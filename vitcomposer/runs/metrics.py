"""Reads ``metrics.jsonl`` and the other small files of a run, whatever a disk or an editor has made of them.

No Composer is needed to read them.
"""

import json
from pathlib import Path
from typing import Any, NoReturn, TypeGuard


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that can be read, see :func:`split_metrics`."""
    return split_metrics(path.read_bytes())[0]


def split_metrics(content: bytes) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The lines of a metrics.jsonl, and those that are none: no JSON, no step, or a value that is no number.

    A last line without an end, which a kill cut short, is in neither.
    """
    *whole, rest = content.split(b"\n")
    lines = [(text, _parse(text)) for text in whole if text.strip()]
    last = [found] if (found := _parse(rest)) is not None else []
    return [line for _, line in lines if line is not None] + last, [text for text, line in lines if line is None]


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    return line if all(value is None or _is_number(value) for value in line.values()) and line["step"] >= 0 else None


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def read_object(path: Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None where there is no such file or none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


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
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
