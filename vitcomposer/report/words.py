"""Writes numbers as a person reads them: percent with their error, durations, hours, FLOPs, settings."""

import json
from typing import Any

from vitcomposer.report.charts import si


def percent(share: float | None, error: float | None = None) -> str:
    """``93.9 %`` or, with a standard error, ``93.9 ± 1.1 %``; a dash for what is not known."""
    if share is None:
        return "-"
    return f"{100 * share:.1f} %" if error is None else f"{100 * share:.1f} \u00b1 {100 * error:.1f} %"


def whole_percent(share: float) -> str:
    """``94 %``."""
    return f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """``7 min 38 s``: the two largest units."""
    whole = round(seconds)
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {smaller}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"


def hours(value: float) -> str:
    """``0.13``, ``1,234``: two digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"


def flops(value: float) -> str:
    """``1.2 PFLOP``."""
    text = si(value)
    letter = text[-1] if text[-1].isalpha() else ""
    return f"{text.removesuffix(letter)} {letter}FLOP" if letter else f"{text} FLOP"


def setting(value: Any) -> str:
    """A value of a configuration, as a yaml has it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
