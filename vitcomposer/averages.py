"""Which weights a checkpoint of a run holds: those that are trained, their average, or both. No Composer is needed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Under these names Composer keeps the state of an algorithm.
EMA_STATE = "EvaluationEMA"
SCHEDULE_FREE_STATE = "ScheduleFreeWeights"


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
