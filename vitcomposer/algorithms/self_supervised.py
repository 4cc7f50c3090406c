"""Algorithms of training without labels: momentum encoder, layers frozen at the start, weight decay by a cosine."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.optim import Optimizer

from vitcomposer.algorithms.ema import keep_shares, to_local
from vitcomposer.algorithms.run_length import steps_per_epoch, total_steps


class Stepped(Protocol):
    """A task that wants to know how far the run is."""

    def begin_step(self, step: int, *, steps_per_epoch: int, total_steps: int) -> None: ...


class BeginStep(Algorithm):
    """Tells the task which step begins, before its forward pass."""

    def __init__(self, task: Stepped) -> None:
        self.task = task

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        self.task.begin_step(step, steps_per_epoch=steps_per_epoch(state), total_steps=total_steps(state))


class FreezeAtStart(Algorithm):
    """Parameters that no optimizer moves or decays in the first ``epochs``: their gradients are taken away.

    In a list of algorithms it comes after one that clips gradients: Composer runs the last one first at this event.

    Args:
        parameters: Called for them in each step, since FSDP2 puts shares in the place of those that there are before.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]], epochs: float) -> None:
        self.parameters = parameters
        self.epochs = epochs

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.FIT_START, Event.AFTER_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        frozen = state.timestamp.batch.value < round(self.epochs * steps_per_epoch(state))
        if event == Event.FIT_START:
            for optimizer in state.optimizers:
                optimizer.register_state_dict_post_hook(_name_every_parameter)
        for parameter in self.parameters() if frozen else ():
            parameter.grad = None
            if event == Event.FIT_START:
                # To load a checkpoint under FSDP2 torch takes a step without gradients, which gives them all a state.
                for optimizer in state.optimizers:
                    optimizer.state.pop(parameter, None)


class MomentumEncoder(Algorithm):
    """After every step, ``average <- m average + (1 - m) source`` with m on a cosine from ``momentum`` to 1.

    m is 1 - (1 - momentum) (1 + cos(pi t / T)) / 2 after t of T steps (arXiv:2104.02057, section 3; arXiv:2104.14294,
    section 3.1). Buffers are left alone: batch norms of the averaged network see its own activations.

    Under FSDP2 every rank averages the share of the weights that it keeps.

    Args:
        pairs: Averaged networks and their sources, with the same parameters.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]], momentum: float) -> None:
        self.momentum = momentum
        self.averages = [average for average, _ in pairs]
        self.sources = [source for _, source in pairs]

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_END

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger) -> None:
        done = state.timestamp.batch.value / total_steps(state)
        # 1 - m: lerp computes average + (1 - m) (source - average).
        rate = (1 - self.momentum) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        averages, sources = _shares(self.averages), _shares(self.sources)
        torch._foreach_lerp_(averages, sources, rate)  # pyright: ignore[reportPrivateImportUsage]


class CosineWeightDecay(Algorithm):
    """Takes the weight decay of every group that has one to ``end``, along a cosine over the run (arXiv:2104.14294)."""

    def __init__(self, start: float, end: float) -> None:
        self.start = start
        self.end = end

    def match(self, event: Event, state: State) -> bool:
        return event == Event.BATCH_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        done = state.timestamp.batch.value / total_steps(state)
        decay = self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                if group["weight_decay"] > 0:
                    group["weight_decay"] = decay


def _shares(networks: Sequence[nn.Module]) -> list[Tensor]:
    for network in networks:
        keep_shares(network)
    # In every step: FSDP2 puts others in their place at the first forward pass and when a checkpoint is loaded.
    return [to_local(p) for network in networks for p in network.parameters()]


def _name_every_parameter(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Have a checkpoint say that a parameter has no state yet: torch refuses to load one that says nothing about it."""
    for group in state_dict["param_groups"]:
        for index in group["params"]:
            state_dict["state"].setdefault(index, {})
