"""Parses Composer's time strings (300ep, 500ba), and checks durations, intervals, warm-ups and seeds."""

import math
import re
from typing import Any

from vitcomposer.errors import ConfigError, require, require_within

MAX_SEED = 4_294_000_000  # NumPy takes 32 bits, and every rank adds its number
_TIME = re.compile(r"(\d+(?:\.\d*)?(?:e\+?\d+)?|\.\d+)(ep|ba|sp|dur)")


def parse_time(key: str, text: str) -> tuple[float, str]:
    """Value and unit of a Composer time string.

    Composer also knows tok, iter and sec; a run of image batches never counts a token and so would never end.

    Raises:
        ConfigError: ``key`` holds no such text.
    """
    match = _TIME.fullmatch(str(text).strip())
    value, unit = (float(match[1]), match[2]) if match else (math.nan, "")
    remedy = "Write 300ep, 1000ba or 100000sp" + (", or 0.05dur." if key == "schedule.t_warmup" else ".")
    if match is None or not math.isfinite(value):
        raise ConfigError(f"{key} must be a time string in ep, ba or sp, got {text!r}. {remedy}")
    if unit != "dur" and not value.is_integer():
        raise ConfigError(f"{key} must be a whole number of {unit}, got {text!r}. {remedy}")
    return value, unit


def check_interval(key: str, text: str | None) -> None:
    """Refuse what is no time between two measurements, or never comes; None is a measurement that is not made."""
    if text is None:
        return
    match = _TIME.fullmatch(text)
    value = float(match[1]) if match else math.nan
    share = match is not None and match[2] == "dur"
    fits = 0 < value <= 1 if share else 0 < value < math.inf and value.is_integer()
    require(fits, key, "a time above 0 in ep, ba, sp or dur", text, "Write 1ep, 100ba, 10000sp or 0.1dur.")


def check_schedule(max_duration: str, t_warmup: str) -> None:
    """Refuse what Composer takes without a word: durations that never end and warm-ups that never reach the peak.

    A warm-up in other units than ``max_duration`` is compared when the Trainer knows the length of an epoch.

    Raises:
        ConfigError: The key that cannot be used.
    """
    total, total_unit = parse_time("max_duration", max_duration)
    if total_unit == "dur" or total <= 0:
        remedy = "Write 300ep, 1000ba or 100000sp."
        raise ConfigError(f"max_duration must be above 0 in ep, ba or sp, got {max_duration!r}. {remedy}")
    warmup, unit = parse_time("schedule.t_warmup", t_warmup)
    longest = {"dur": 1.0, total_unit: total}.get(unit, math.inf)
    remedy = "The peak would never be reached: shorten the warm-up."
    require(warmup <= longest, "schedule.t_warmup", f"at most max_duration ({max_duration})", t_warmup, remedy)


def check_seed(key: str, seed: Any) -> None:
    """Refuse a seed that the generators do not take."""
    require_within(key, seed, 0, MAX_SEED, "Use 0.")
