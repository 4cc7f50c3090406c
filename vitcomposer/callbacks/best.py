"""Follows the best evaluation of a run, keeps its checkpoint, and ends a run that gets no better or is out of hours."""

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from vitcomposer.callbacks.preemption import is_last_batch, never
from vitcomposer.callbacks.throughput import Throughput
from vitcomposer.models.weights.averages import EMA_LABEL
from vitcomposer.runs import layout
from vitcomposer.runs.checkpoints import keep_as_best

log = logging.getLogger(__name__)

Measure = Literal["top1", "class_top1", "loss"]


class Best(Callback):
    """Judges every evaluation by one number, of the trained weights or their average, whichever is better.

    The checkpoint of the best step has a second name in the folder ``best`` of the run, where no newer one takes its
    place. Put it before ``Checkpoints``, which asks it whether a step has to be saved.

    Args:
        folder: Of the run.
        measure: ``class_top1`` is the mean over the classes.
        keep: Whether the checkpoint stays.
        patience: Evaluations without a better one after which the run ends; None is never.
        max_hours: After which the run ends, of all its sessions together; None is never.

    Attributes:
        found: ``step, epoch, measure, value, weights`` (``raw`` or ``ema``) of the best evaluation; None before it.
        stopped_by: The key of ``run`` that ended the run early, or None.
    """

    def __init__(
        self,
        folder: Path,
        throughput: Throughput,
        *,
        measure: Measure = "top1",
        keep: bool = True,
        patience: int | None = None,
        max_hours: float | None = None,
    ) -> None:
        self._folder, self._throughput = folder, throughput
        self._measure: Measure = measure
        self._keep, self._patience, self._max_hours = keep, patience, max_hours
        self.found: dict[str, Any] | None = None
        self.stopped_by: str | None = None
        self._since = 0  # evaluations since the best one
        self._values: dict[str, float] = {}  # of this evaluation, by the label of the Evaluator
        self._to_keep: int | None = None  # a step whose checkpoint is not kept yet
        self._warned = False
        self._length: int | None = None  # steps of an epoch

    @property
    def out_of_patience(self) -> bool:
        """Whether the run has ended for it, as a checkpoint says too."""
        return self._patience is not None and self._since >= self._patience

    def wants(self, state: State) -> bool:
        """Whether the step that has just ended must be saved."""
        return self._to_keep == state.timestamp.batch.value

    def saved(self, state: State, path: Path) -> None:
        """Keep the checkpoint of the step that has just ended, if it is the best; all ranks have to call it."""
        if not self.wants(state):
            return
        self._to_keep = None
        if dist.get_global_rank() != 0:
            return
        try:
            keep_as_best(path, self._folder / layout.BEST)
        except OSError as error:
            if not self._warned:
                log.warning("The best checkpoint, %s, is not kept: %s. Training goes on.", path.name, error)
            self._warned = True

    def fit_start(self, state: State, logger: Logger) -> None:
        self._length = None if state.dataloader_len is None else state.dataloader_len.value

    def eval_before_all(self, state: State, logger: Logger) -> None:
        self._values.clear()

    def eval_end(self, state: State, logger: Logger) -> None:
        label = state.dataloader_label
        value = state.eval_metric_values.get(self._measure)
        if label is not None and value is not None and math.isfinite(value):
            self._values[label] = float(value)
        if state.evaluators and label == state.evaluators[-1].label and self._values:
            self._judge(state)

    def _judge(self, state: State) -> None:
        choose = min if self._measure == "loss" else max
        label = choose(self._values, key=lambda each: self._values[each])
        value = self._values[label]
        if self.found is not None and choose(value, self.found["value"]) == self.found["value"]:
            self._since += 1
            return
        step = state.timestamp.batch.value
        weights = "ema" if label == EMA_LABEL else "raw"
        epoch = state.timestamp.epoch.value + state.timestamp.batch_in_epoch.value / (self._length or math.inf)
        self.found = {
            "step": step,
            "epoch": round(epoch, 6),
            "measure": self._measure,
            "value": value,
            "weights": weights,
        }
        self._since = 0
        self._to_keep = step if self._keep else None

    def eval_after_all(self, state: State, logger: Logger) -> None:
        savers = [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]
        if any(saver.last_checkpoint_batch == state.timestamp.batch for saver in savers):  # before it was measured
            self.saved(state, (self._folder / layout.LATEST_CHECKPOINT).resolve())
        if self.out_of_patience and not is_last_batch(state):
            self._stop(state, "patience")
            for evaluator in state.evaluators:  # this step is measured
                evaluator.eval_interval = never

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._max_hours is None or is_last_batch(state):
            return
        over = torch.tensor([self._throughput.wall_seconds >= 3600 * self._max_hours], dtype=torch.uint8)
        if dist.get_world_size() > 1:  # whose clocks differ
            over = state.device.tensor_to_device(over)
            dist.all_reduce(over, reduce_operation="MAX")
        if over.item():
            self._stop(state, "max_hours")

    def _stop(self, state: State, key: str) -> None:
        self.stopped_by = key
        state.stop_training()

    def state_dict(self) -> dict[str, Any]:
        # One text, also before the first evaluation: of shares only the keys are read that a new run has.
        return {"kept": json.dumps({"found": self.found, "since": self._since})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (kept := json.loads(state["kept"])) is None:  # of a version without this callback
            return
        self.found, self._since = kept["found"], kept["since"]
        if self.out_of_patience:
            self.stopped_by = "patience"
