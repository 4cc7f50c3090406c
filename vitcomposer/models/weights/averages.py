"""Finds which weights a checkpoint of a run holds, and which of them to take. No Composer is needed.

They are those that are trained (``raw``), their moving average (``ema``), or both.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Under these names Composer keeps the state of an algorithm.
EMA_STATE = "EvaluationEMA"
SCHEDULE_FREE_STATE = "ScheduleFreeWeights"
EMA_LABEL = "ema"  # the Evaluator that measures the averaged weights


def averaged_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averaged weights and buffers of a loaded Composer checkpoint, by the names in its ``state.model``.

    Raises:
        ValueError: The run had no EMA, or the average had not started.
    """
    states = dict(checkpoint["state"]["algorithms"])
    ema = states.get(EMA_STATE)
    if ema is None or not ema["ema_started"]:
        why = f"holds {sorted(states)}" if ema is None else "was saved before ema_start"
        raise ValueError(f"The checkpoint must hold a started EMA, but it {why}. Evaluate its raw weights instead.")
    average = {**ema["ema_model"]["named_parameters_dict"], **ema["ema_model"]["named_buffers_dict"]}
    # Frozen parameters are not averaged, and buffers that are not saved have no place in a state dict.
    return {name: average.get(name, raw) for name, raw in checkpoint["state"]["model"].items()}


def saved_weights(checkpoint: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    """The state dicts of the task in a loaded Composer checkpoint: ``raw``, ``ema`` or both.

    With a schedule-free optimizer the model that is saved is the average, which is what such a run is meant to give.
    """
    state = checkpoint["state"]
    algorithms = dict(state["algorithms"])
    if SCHEDULE_FREE_STATE in algorithms:
        return {"ema": state["model"]}
    if algorithms.get(EMA_STATE, {}).get("ema_started", False):
        return {"raw": state["model"], "ema": averaged_weights(checkpoint)}
    return {"raw": state["model"]}


WINDOWS = 3  # in a run: after so many, exp(-3) = 5 % of the average is where it began


@dataclass(frozen=True)
class Window:
    """About how long a moving average looks back: 1 / (1 - smoothing) of its updates, in ``ba``, ``ep`` or ``dur``."""

    length: float
    unit: str

    def __str__(self) -> str:
        if self.unit == "dur":
            return f"{self.length:.0%} of the run"
        return f"{self.length:,.0f} {'steps' if self.unit == 'ba' else 'epochs'}"

    def is_long_for(self, length: float) -> bool:
        """Whether an average over so many steps or epochs still holds much of where it began."""
        return WINDOWS * self.length > length * (1 + 1e-9)


def averaging_window(
    half_life: str | None = None, smoothing: float | None = None, update_interval: str | None = None, **_: Any
) -> Window:
    """Of the arguments of ``algorithms.EMA``.

    Raises:
        ValueError: Arguments that EMA refuses.
    """
    if share := share_of_run(half_life):
        return Window(share / math.log(2), "dur")
    interval, unit = _time(update_interval or (f"1{_time(half_life)[1]}" if half_life else None))
    kept = float(2 ** (-interval / _time(half_life)[0])) if smoothing is None else smoothing
    if not 0 < kept < 1:
        raise ValueError(f"smoothing must be in (0, 1), got {smoothing}")
    return Window(interval / (1 - kept), unit)


def share_of_run(half_life: str | None) -> float:
    """The share of the run that a half-life in ``dur`` is; 0 for one in other units."""
    match = re.fullmatch(r"([\d.]+)dur", str(half_life))
    return float(match[1]) if match else 0.0


def _time(text: str | None) -> tuple[float, str]:
    match = re.fullmatch(r"([\d.e+]+)(ba|ep)", str(text))
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"half_life and update_interval must be above 0 in ep or ba, got {text!r}")
    return float(match[1]), match[2]


def better_weights(
    step: int, done: Mapping[str, float], measured: tuple[int, float, float] | None, window: Window | None
) -> tuple[str, str]:
    """Which of the two to take, ``raw`` or ``ema``, and a sentence that says why.

    The better by top-1 where a run has measured both, the average where they are equal. Else the average if it has run
    for ``WINDOWS`` of its windows.

    Args:
        step: Of the checkpoint.
        done: Steps and epochs of training, under ``ba`` and ``ep``, and the share of the run, under ``dur``.
        measured: Step, top-1 of the raw weights and of their average.
    """
    names = {"raw": "raw", "ema": "average"}
    if measured is not None:
        at, *found = measured
        top1 = dict(zip(names, found, strict=True))
        taken, left = ("ema", "raw") if top1["ema"] >= top1["raw"] else ("raw", "ema")
        when = "" if at == step else f" at step {at:,}"
        why = f"{names[taken]} ({100 * top1[taken]:.1f} % top-1{when}); the {names[left]} has {100 * top1[left]:.1f} %"
    elif window is None:
        taken, left, why = "raw", "ema", "raw: neither was measured, nor is it known how long the average looks back"
    else:
        long = window.is_long_for(done[window.unit])
        taken, left = ("raw", "ema") if long else ("ema", "raw")
        passed = f"{done['dur']:.0%}" if window.unit == "dur" else f"{done[window.unit]:,.0f}"
        why = f"{names[taken]}: neither was measured, and the average looks back over {window}, " + (
            f"more than a third of the {passed} done" if long else f"of {passed} done"
        )
    return taken, f"weights: {why}. --weights {left} takes the other."
