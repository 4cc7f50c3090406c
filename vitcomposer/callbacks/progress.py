"""Shows how far a run is: a row for each evaluation, a bar for the epoch on a terminal, a row now and then in a log."""

import contextlib
import json
import math
import os
import sys
import time
from typing import Any, Literal, TextIO

from composer.core import Callback, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vitcomposer.callbacks.knn import KNNMonitor
from vitcomposer.callbacks.throughput import Throughput
from vitcomposer.data.labels import UNEQUAL
from vitcomposer.models.weights.averages import EMA_LABEL
from vitcomposer.runs.closing import clock

LOSS_SMOOTHING = 0.95  # share of the old value after each step
# Of a row: key of the facts, heading, width.
COLUMNS = (
    ("epoch", "epoch", 7),
    ("loss", "loss", 8),
    ("class_top1", "classes", 9),
    ("top1", "val top-1", 10),
    ("top1_ema", "EMA", 7),
    ("knn_top1", "k-NN", 7),
    ("images_per_sec", "images/s", 9),
    ("data_wait_fraction", "waited", 7),
    ("seconds_left", "left", 8),
)

Facts = dict[str, Any]


class Progress(Callback):
    """Shows on rank 0 how far a run is: epoch, loss (smoothed), accuracies in percent, speed, time left.

    A row follows each evaluation, or each epoch of a run without one. On a terminal it stays above a bar of the epoch;
    in a log a row comes every ``seconds_per_line`` too, and nothing moves the cursor. Put it behind ``throughput`` in
    the list of callbacks.

    Args:
        throughput: The source of images/s.
        class_imbalance: Training images of the largest class over those of the smallest; where it is above
            ``UNEQUAL`` the mean of the classes' top-1 (``classes``) is shown before the images'.
        output: ``json`` prints an object a row, with all digits, on stdout.
        stream: Defaults to ``sys.stderr`` at the start of training, and to stdout for json.
    """

    def __init__(
        self,
        throughput: Throughput,
        *,
        class_imbalance: float | None = None,
        output: Literal["text", "json"] = "text",
        stream: TextIO | None = None,
        seconds_per_line: float = 30.0,
    ) -> None:
        self.throughput, self.output = throughput, output
        self._unequal = class_imbalance is not None and class_imbalance > UNEQUAL
        self.stream = stream
        self.seconds_per_line = seconds_per_line
        self._file: TextIO | None = None  # None: not shown, on ranks above 0 and outside training
        self._bar: tqdm | None = None  # only on a terminal
        self._cleanup = contextlib.ExitStack()
        self._loss: float | None = None
        self._top1: dict[str, float] = {}  # by the label of the evaluator, since the last row
        self._class_top1: float | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None, "Composer has set it before training"
        self._last_row_batch = -1
        if dist.get_global_rank() != 0 or self._file is not None:
            return
        self._file = file = self.stream or (sys.__stdout__ if self.output == "json" else None) or sys.stderr
        self._max_duration = state.max_duration  # kept: an early stop changes the state's
        self._steps = None if state.dataloader_len is None else state.dataloader_len.value  # of an epoch
        self._first_batch = state.timestamp.batch.value
        self._start, self._last_row = time.monotonic(), -math.inf
        self._monitor = next((each for each in state.callbacks if isinstance(each, KNNMonitor)), None)
        labels = [evaluator.label for evaluator in state.evaluators]
        absent = {
            "class_top1": not self._unequal or "eval" not in labels,
            "top1": "eval" not in labels,
            "top1_ema": EMA_LABEL not in labels,
            "knn_top1": self._monitor is None,
        }
        self._columns = [column for column in COLUMNS if not absent.get(column[0])]
        if self.output == "text":
            self._print("".join(f"{heading:>{width}}" for _, heading, width in self._columns))
            if file.isatty() and os.environ.get("TERM") != "dumb":
                self._open_bar(file)

    def _open_bar(self, file: TextIO) -> None:
        self._bar = tqdm(total=self._steps, file=file, dynamic_ncols=True, leave=False, bar_format="starting")
        self._sides = "▕▏" if (file.encoding or "").lower().startswith("utf") else "||"
        # Log records go above the bar instead of into it, until both end.
        self._cleanup.enter_context(logging_redirect_tqdm())
        self._cleanup.callback(self._bar.close)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._file is None:
            return
        self._smooth_loss(state)
        if self._bar is not None:
            self._move(state)
        elif time.monotonic() - self._last_row >= self.seconds_per_line:
            self._print_row(state)

    def _smooth_loss(self, state: State) -> None:
        losses = state.total_loss_dict
        loss = losses.get("loss/train/total") if isinstance(losses, dict) else None
        if loss is not None and self._loss is not None and math.isfinite(loss) and math.isfinite(self._loss):
            loss = LOSS_SMOOTHING * self._loss + (1 - LOSS_SMOOTHING) * loss
        self._loss = self._loss if loss is None else loss

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        if self._bar is not None:
            done, of = state.eval_timestamp.batch.value, state.dataloader_len
            self._bar.bar_format = f"{state.dataloader_label} {done}/{'?' if of is None else of.value}"
            self._bar.refresh()

    def eval_end(self, state: State, logger: Logger) -> None:
        if state.dataloader_label is not None and "top1" in state.eval_metric_values:
            self._top1[state.dataloader_label] = float(state.eval_metric_values["top1"])
        if state.dataloader_label == "eval" and "class_top1" in state.eval_metric_values:
            self._class_top1 = float(state.eval_metric_values["class_top1"])

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._print_row(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if not state.evaluators and self._last_row_batch != state.timestamp.batch.value:
            self._print_row(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        if not state.evaluators and state.timestamp.batch.value != self._last_row_batch:
            self._print_row(state)

    def close(self, state: State, logger: Logger) -> None:
        self._cleanup.close()
        self._bar = self._file = None

    def _move(self, state: State) -> None:
        bar, done = self._bar, state.timestamp.batch_in_epoch.value
        assert bar is not None, "there is a terminal"
        if done < bar.n:  # another epoch
            bar.reset(self._steps)
        facts = self._facts(state)
        of = f"/{self._max_duration.value}" if self._max_duration.unit == TimeUnit.EPOCH else ""
        ahead = "" if facts["seconds_left"] is None else f"  {clock(facts['seconds_left'])} left"
        speed = "" if facts["images_per_sec"] is None else f"  {facts['images_per_sec']:,.0f} images/s"
        loss = "" if self._loss is None else f"  loss {self._loss:.3f}"
        tail = f"{loss}{speed}{ahead}"
        left, right = self._sides
        bar.bar_format = f"epoch {state.timestamp.epoch.value + 1}{of} {left}{{bar}}{right}{{percentage:3.0f}} %{tail}"
        bar.update(done - bar.n)

    def _print_row(self, state: State) -> None:
        if self._file is None:
            return
        self._last_row, self._last_row_batch = time.monotonic(), state.timestamp.batch.value
        facts = self._facts(state)
        if self.output == "json":
            self._print(json.dumps({"event": "row", "step": self._last_row_batch, **facts}))
        else:
            self._print("".join(f"{_cell(key, facts[key]):>{width}}" for key, _, width in self._columns))
        self._top1.clear()
        self._class_top1 = None

    def _print(self, line: str) -> None:
        assert self._file is not None, "training has begun"
        tqdm.write(line, file=self._file)  # above the bar, where there is one
        self._file.flush()

    def _facts(self, state: State) -> Facts:
        done = state.timestamp.batch_in_epoch.value
        return {
            "epoch": state.timestamp.epoch.value + (done / self._steps if done and self._steps else 0),
            "loss": self._loss if self._loss is None or math.isfinite(self._loss) else None,
            "class_top1": self._class_top1,
            "top1": self._top1.get("eval"),
            "top1_ema": self._top1.get(EMA_LABEL),
            "knn_top1": None if self._monitor is None else self._monitor.top1,
            "images_per_sec": self.throughput.recent_images_per_sec,
            "data_wait_fraction": self.throughput.recent_wait_fraction,
            "seconds_left": self._seconds_left(state),
        }

    def _seconds_left(self, state: State) -> float | None:
        done, total = state.timestamp.batch.value, self._total_batches(state)
        if total is None or done <= self._first_batch:
            return None
        return (time.monotonic() - self._start) * max(total - done, 0) / (done - self._first_batch)

    def _total_batches(self, state: State) -> int | None:
        """Steps of the whole run; None while that is unknown (a duration in samples, before the first step)."""
        value, unit = self._max_duration.value, self._max_duration.unit
        if unit == TimeUnit.BATCH:
            return value
        if unit == TimeUnit.EPOCH and self._steps is not None:
            return value * self._steps
        if unit == TimeUnit.SAMPLE and state.timestamp.batch.value:
            return math.ceil(value / (state.timestamp.sample.value / state.timestamp.batch.value))
        return None


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return ""
    if key == "epoch":
        return f"{value:.2f}".rstrip("0").rstrip(".")
    if key == "loss":
        return f"{value:.3f}"
    if key == "seconds_left":
        return clock(value)
    if key == "images_per_sec":
        return f"{value:,.0f}"
    return f"{100 * value:.0f} %" if key == "data_wait_fraction" else f"{100 * value:.1f}"
