"""Reads the files that ``plan --measured`` takes: of benchmarks/gpu.py, and of ``vitcomposer bench --json``."""

from pathlib import Path
from typing import Any

from vitcomposer.cost.inputs import Input
from vitcomposer.errors import require
from vitcomposer.escape import for_terminal
from vitcomposer.json_file import read_json

_WRITERS = "what benchmarks/gpu.py writes without --quick, or vitcomposer bench --json"


def read_measured(path: Path) -> dict[str, Any]:
    """What was measured: ``device``, rows of steps by ``sections``, and in a file of bench ``input``.

    Raises:
        ConfigError: It is another file, or measured nothing (``--quick``).
    """
    try:
        found = read_json(path)
        rows = [row for section in found["sections"].values() for row in section]
        whole = isinstance(found["device"], str) and all(isinstance(row, dict) for row in rows)
        whole = whole and not found.get("smoke")
        if "input" in found:
            _input(found, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ZeroDivisionError):
        whole, found = False, {}
    remedy = "Run it on that machine, or plan without the file."
    require(whole, str(path), _WRITERS, "something else", remedy)
    return found


def measured_input(path: Path, kind: str) -> Input | None:
    """What bench measured of the loader; None where the file is of benchmarks/gpu.py.

    Raises:
        ConfigError: It measured another kind of input than ``kind``.
    """
    found = read_measured(path)
    if "input" not in found:
        return None
    given = _input(found, path)
    rule = f"a bench of a recipe whose workers do the same ({kind})"
    remedy = "Run vitcomposer bench with this yaml, and with data.augment_on as the run will have it."
    require(given.kind == kind, "--measured", rule, f"{path} of {given.kind}", remedy)
    return given


def _input(found: dict[str, Any], path: Path) -> Input:
    block = found["input"]
    rates = {int(pixels): float(rate) for pixels, rate in block["images_per_cpu_second"].items()}
    if not rates or min(rates) <= 0 or min(rates.values()) <= 0 or not block["bytes_per_image"] > 0:
        raise ValueError("rates and sizes are above 0")
    data = "synthetic images" if found["data"] == "synthetic" else for_terminal(str(found["data"]))
    label = f"{data} on a core of {for_terminal(str(found['cpu']))}"
    return Input(
        kind=str(block["kind"]),
        label=label,
        source=path.name,
        rates=rates,
        bytes_per_image=float(block["bytes_per_image"]),
    )
