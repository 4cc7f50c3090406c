"""Keeps a moving average of the weights (EMA) beside them: training, checkpoints and exports never mix the two up."""

import logging
import math
from typing import Any

import torch
from composer.algorithms import EMA
from composer.core import Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vitcomposer.algorithms.run_length import steps_per_epoch, total_steps
from vitcomposer.foundations import average_should_start, new_average
from vitcomposer.models.weights.averages import EMA_LABEL, averaging_window, share_of_run

log = logging.getLogger(__name__)


class EvaluationEMA(EMA):
    """Composer's moving average of the weights, seen only by the Evaluator labelled ``ema``.

    Composer's EMA swaps the average into the model for every evaluation and every checkpoint, and leaves it there until
    the next batch starts. Here the model always holds the raw weights, in training, in checkpoints and after ``fit``;
    only between the start and the end of the evaluation labelled ``ema`` does it hold the average. So ``eval`` measures
    the raw weights, ``ema`` the averaged ones, and a checkpoint has the raw weights in its model and the average in the
    state of this algorithm (``vitcomposer.models.weights.averages`` reads it). Before ``ema_start`` both are the same.

    The average starts as a copy of the weights after the first batch (or epoch, by ``update_interval``) at or after
    ``ema_start``, then ``average <- smoothing * average + (1 - smoothing) * weights`` every ``update_interval``.
    Floating-point buffers are averaged too; integer buffers, which Composer's EMA rounds down, are copied. Names are
    those of the model without its DDP wrapper, and the checkpoint holds whole tensors, so a run can be resumed on
    another number of ranks. Under FSDP2 every rank averages the share of the weights that it keeps.

    Args:
        half_life: Time string in ep, ba or dur; with ``update_interval`` it gives
            ``smoothing = 2 ** (-update_interval / half_life)``. ``0.07dur`` looks back over a tenth of the run,
            however long ``max_duration`` makes it.
        smoothing: In (0, 1), instead of ``half_life``: DeiT's ``decay``, 0.99996 per batch.
        ema_start: Time string in dur, ep or ba.
        update_interval: Time string in ep or ba, in the units of ``half_life``; required with ``smoothing`` and dur.

    Raises:
        ValueError: Not exactly one of ``half_life`` and ``smoothing``, or a value out of its range.
    """

    def __init__(
        self,
        half_life: str | None = None,
        smoothing: float | None = None,
        ema_start: str = "0.0dur",
        update_interval: str | None = None,
    ) -> None:
        if (half_life is None) == (smoothing is None):
            raise ValueError(f"set exactly one of half_life and smoothing, got {half_life!r} and {smoothing!r}")
        if smoothing is not None and not 0 < smoothing < 1:
            raise ValueError(f"smoothing must be in (0, 1), got {smoothing}")
        self.half_life_share = share_of_run(half_life)
        if (smoothing is not None or self.half_life_share) and update_interval is None:
            raise ValueError("smoothing, or half_life in dur, needs update_interval, the time between two, such as 1ba")
        for text in (half_life, update_interval):
            if text is not None and Time.from_timestring(text).value <= 0:
                raise ValueError(f"half_life and update_interval must be above 0, got {text!r}")
        if self.half_life_share:  # the run's length is known when it starts
            super().__init__(None, 0.5, ema_start, update_interval)
        else:
            super().__init__(half_life, smoothing, ema_start, update_interval)
        self.window = averaging_window(half_life, smoothing, update_interval)
        if self.ema_start.unit not in (TimeUnit.DURATION, TimeUnit.EPOCH, TimeUnit.BATCH):
            raise ValueError(f"ema_start must be in dur, ep or ba, got {ema_start!r}")

    def match(self, event: Event, state: State) -> bool:
        if event == self.update_event:
            return self.ema_started or average_should_start(self, state)
        return event in (Event.INIT, Event.FIT_START, Event.BATCH_START, Event.EVAL_START, Event.EVAL_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        model = _without_ddp(state.model)
        if event == Event.INIT:
            self.ema_model = new_average(model)  # a checkpoint loads into it
            return
        assert self.ema_model is not None, "Event.INIT runs before every other event"
        keep_shares(model)
        if event == Event.FIT_START:
            self._fit_to_run(state)
            self._warn(state)
            self._start_anew(model, state)
        # A loaded average lies, whole, where the checkpoint was read to.
        if event in (Event.FIT_START, Event.EVAL_START):
            self.ema_model.move_params_to_device(destination_model=model)
            self._shard(model)
        averaged = event == Event.EVAL_START and state.dataloader_label == EMA_LABEL and self.ema_started
        if averaged != self.ema_weights_active:
            self.ema_model.swap_params(model)
            self.ema_weights_active = averaged
        if event == self.update_event:
            self._update(model, state)

    def _fit_to_run(self, state: State) -> None:
        """Turn a half-life that is a share of the run into steps or epochs."""
        if not self.half_life_share:
            return
        unit = self.update_interval.unit
        run = total_steps(state) / (1 if unit == TimeUnit.BATCH else steps_per_epoch(state))
        half_life = self.half_life_share * run
        self.smoothing = 2 ** (-self.update_interval.value / half_life)
        self.window = averaging_window(f"{half_life}{unit.value}", None, self.update_interval.to_timestring())

    def _warn(self, state: State) -> None:
        """Say before the first step where the average will still hold much of where it began."""
        per_epoch = 1 if self.window.unit == "ba" else steps_per_epoch(state)
        run = total_steps(state) / per_epoch
        if not self.window.is_long_for(run) or dist.get_global_rank() > 0:
            return
        tenth = 1 - 10 * self.update_interval.value / run
        better = f"{{smoothing: {tenth:.4g}, update_interval: {self.update_interval.to_timestring()}}}"
        remedy = f"Set algorithms.EMA={better}." if tenth > 0 else "Leave it out."
        log.warning(
            "algorithms.EMA averages %s of %s: too long, it lags behind. %s", self.window, f"{run:,.0f}", remedy
        )

    def _start_anew(self, model: nn.Module, state: State) -> None:
        """Have the average of a resumed run start where ``ema_start`` says now, as a share of a run that is longer."""
        start, done = self._start_step(state), state.timestamp.batch.value
        if self.ema_started and start >= done:
            self.ema_model, self.ema_started = new_average(model), start == done

    def _start_step(self, state: State) -> int:
        """The step after which the average starts."""
        assert state.max_duration is not None, "the Trainer sets it before it trains"
        value, unit, per_epoch = float(self.ema_start.value), self.ema_start.unit, steps_per_epoch(state)
        if unit == TimeUnit.DURATION:
            value, unit = value * state.max_duration.value, state.max_duration.unit
        if unit == TimeUnit.SAMPLE:
            value, unit = value * total_steps(state) / state.max_duration.value, TimeUnit.BATCH
        least = math.ceil(value - 1e-9)
        by_epoch = self.update_event == Event.EPOCH_END
        if unit == TimeUnit.EPOCH:  # which Composer counts as done behind the last BATCH_END in it
            return max(1, least) * per_epoch if by_epoch else least * per_epoch + 1
        return math.ceil(max(1, least) / per_epoch) * per_epoch if by_epoch else max(1, least)

    @torch.no_grad()
    def _update(self, model: nn.Module, state: State) -> None:
        if not self.ema_started:
            self.ema_model = new_average(model)
            self.ema_started = True
        elif state.timestamp.get(self.update_interval.unit).value % self.update_interval.value == 0:
            assert self.ema_model is not None and self.smoothing is not None
            average = {**self.ema_model.named_parameters_dict, **self.ema_model.named_buffers_dict}
            current = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            floating = [name for name in average if average[name].is_floating_point()]
            # average + (1 - smoothing) (weights - average), of all tensors in a few kernels.
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                [to_local(average[name]) for name in floating],
                [to_local(current[name]) for name in floating],
                1 - self.smoothing,
            )
            for name in average.keys() - set(floating):
                average[name].copy_(current[name])

    def _shard(self, model: nn.Module) -> None:
        assert self.ema_model is not None
        average = self.ema_model.named_parameters_dict
        for name, weight in model.named_parameters():
            if isinstance(weight, DTensor) and name in average and not isinstance(average[name], DTensor):
                average[name] = distribute_tensor(average[name], weight.device_mesh, weight.placements)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        average = state["ema_model"]["named_parameters_dict"]
        # All ranks come here, with the names in the same order: each gives its part.
        whole = {name: t.full_tensor().cpu() if isinstance(t, DTensor) else t for name, t in average.items()}
        return {**state, "ema_model": {**state["ema_model"], "named_parameters_dict": whole}}


def keep_shares(model: nn.Module) -> None:
    """Have FSDP2 let go of the weights that it still holds whole after a forward pass without a backward one.

    They are copies, which a change of the shares would miss.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """The share of a tensor that FSDP2 has this rank keep, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _without_ddp(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model
