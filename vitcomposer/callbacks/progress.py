"""Shows how far a run is: a bar on a terminal, a printed line now and then in a log file."""

import contextlib
import math
import sys
import time
from typing import TextIO

from composer.core import Callback, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vitcomposer.callbacks.throughput import Throughput
from vitcomposer.data.labels import UNEQUAL
from vitcomposer.models.weights.averages import EMA_LABEL

LOSS_SMOOTHING = 0.95  # share of the old value after each step


class Progress(Callback):
    """Shows epoch, step, smoothed loss, last evaluated top-1 (and the average's), images/s and times on rank 0.

    Put it behind ``throughput`` in the list of callbacks. Where ``stream`` is no terminal, a plain line appears every
    ``seconds_per_line``, after each evaluation and at the end.

    Args:
        throughput: The source of images/s.
        class_imbalance: Training images of the largest class over those of the smallest; where it is above
            ``UNEQUAL`` the mean of the classes' top-1 is shown before the images'.
        stream: Defaults to ``sys.stderr`` at the start of training.
    """

    def __init__(
        self,
        throughput: Throughput,
        *,
        class_imbalance: float | None = None,
        stream: TextIO | None = None,
        seconds_per_line: float = 30.0,
    ) -> None:
        self.throughput = throughput
        self._unequal = class_imbalance is not None and class_imbalance > UNEQUAL
        self.stream = stream
        self.seconds_per_line = seconds_per_line
        self._file: TextIO | None = None  # None: not shown, on ranks above 0 and outside training
        self._bar: tqdm | None = None  # only on a terminal
        self._cleanup = contextlib.ExitStack()
        self._loss: float | None = None
        self._top1: dict[str, float] = {}  # by the label of the evaluator
        self._class_top1: dict[str, float] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None, "Composer has set it before training"
        self._last_line_batch = -1
        if dist.get_global_rank() != 0 or self._file is not None:
            return
        self._file = file = self.stream or sys.stderr
        self._max_duration = state.max_duration  # kept: an early stop changes the state's
        self._first_batch = state.timestamp.batch.value
        self._total = self._total_batches(state)
        self._start, self._last_line = time.monotonic(), -math.inf
        if file.isatty():
            self._bar = tqdm(
                total=self._total,
                initial=self._first_batch,
                file=file,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )
            # Log records go above the bar instead of into it, until both end.
            self._cleanup.enter_context(logging_redirect_tqdm())
            self._cleanup.callback(self._bar.close)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._file is None:
            return
        self._smooth_loss(state)
        if self._total is None:
            self._total = self._total_batches(state)
        if self._bar is not None:
            self._bar.total = self._total
            self._describe(state)
            self._bar.update(state.timestamp.batch.value - self._bar.n)
        elif time.monotonic() - self._last_line >= self.seconds_per_line:
            self._print_line(state)

    def _smooth_loss(self, state: State) -> None:
        losses = state.total_loss_dict
        loss = losses.get("loss/train/total") if isinstance(losses, dict) else None
        if loss is not None and self._loss is not None and math.isfinite(loss) and math.isfinite(self._loss):
            loss = LOSS_SMOOTHING * self._loss + (1 - LOSS_SMOOTHING) * loss
        self._loss = self._loss if loss is None else loss

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        if self._bar is not None:
            done, of = state.eval_timestamp.batch.value, state.dataloader_len
            self._bar.set_description_str(f"{state.dataloader_label} {done}/{'?' if of is None else of.value}")

    def eval_end(self, state: State, logger: Logger) -> None:
        if state.dataloader_label is not None and "top1" in state.eval_metric_values:
            self._top1[state.dataloader_label] = float(state.eval_metric_values["top1"])
        if self._unequal and state.dataloader_label is not None and "class_top1" in state.eval_metric_values:
            self._class_top1[state.dataloader_label] = float(state.eval_metric_values["class_top1"])

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._show(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value != self._last_line_batch:
            self._show(state)

    def close(self, state: State, logger: Logger) -> None:
        self._cleanup.close()
        self._bar = self._file = None

    def _show(self, state: State) -> None:
        if self._bar is not None:
            self._describe(state)
            self._bar.refresh()
        elif self._file is not None:
            self._print_line(state)

    def _describe(self, state: State) -> None:
        assert self._bar is not None, "there is a terminal"
        self._bar.set_description_str(self._epoch(state), refresh=False)
        self._bar.set_postfix_str("  ".join(self._facts()), refresh=False)

    def _print_line(self, state: State) -> None:
        self._last_line = time.monotonic()
        done, elapsed = state.timestamp.batch.value, self._last_line - self._start
        self._last_line_batch = done
        step = f"step {done}" + ("" if self._total is None else f"/{self._total}")
        times = f"{tqdm.format_interval(elapsed)} elapsed"
        if self._total is not None and done > self._first_batch:
            left = elapsed * max(self._total - done, 0) / (done - self._first_batch)
            times += f", {tqdm.format_interval(left)} left"
        print("  ".join([self._epoch(state), step, *self._facts(), times]), file=self._file, flush=True)

    def _epoch(self, state: State) -> str:
        # The epoch in progress, counted from 1; once it is done the number stays until the next begins.
        under_way = state.timestamp.batch_in_epoch.value > 0 or state.timestamp.epoch.value == 0
        of = f"/{self._max_duration.value}" if self._max_duration.unit == TimeUnit.EPOCH else ""
        return f"epoch {state.timestamp.epoch.value + under_way}{of}"

    def _facts(self) -> list[str]:
        facts = []
        if self._loss is not None:
            facts.append(f"loss {self._loss:.4f}")
        for name, found in (("mean of classes", self._class_top1), ("top-1", self._top1)):
            facts += [f"{name} {100 * found['eval']:.2f} %"] if "eval" in found else []
            facts += [f"EMA {100 * found[EMA_LABEL]:.2f} %"] if EMA_LABEL in found else []
        speed = self.throughput.recent_images_per_sec
        if speed is not None:
            facts.append(f"{speed:,.0f} images/s")
        return facts

    def _total_batches(self, state: State) -> int | None:
        """Steps of the whole run; None while that is unknown (a duration in samples, before the first step)."""
        value, unit = self._max_duration.value, self._max_duration.unit
        if unit == TimeUnit.BATCH:
            return value
        if unit == TimeUnit.EPOCH and state.dataloader_len is not None:
            return value * state.dataloader_len.value
        if unit == TimeUnit.SAMPLE and state.timestamp.batch.value:
            return math.ceil(value / (state.timestamp.sample.value / state.timestamp.batch.value))
        return None
