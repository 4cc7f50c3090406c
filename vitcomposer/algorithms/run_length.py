"""Counts the steps of an epoch and of the whole run, by which every schedule knows how far the run is."""

import math

from composer.core import State
from composer.utils import dist
from torch.utils.data import DataLoader


def steps_per_epoch(state: State) -> int:
    """Steps of an epoch."""
    assert state.dataloader_len is not None, "our loaders know their length"
    return int(state.dataloader_len)


def total_steps(state: State) -> int:
    """Steps of the whole run."""
    assert state.max_duration is not None, "the Trainer sets it before it trains"
    value, unit = state.max_duration.value, state.max_duration.unit.value
    if unit == "ep":
        return value * steps_per_epoch(state)
    if unit == "sp":
        assert isinstance(state.dataloader, DataLoader) and state.dataloader.batch_size is not None
        return math.ceil(value / (state.dataloader.batch_size * dist.get_world_size()))
    return value
