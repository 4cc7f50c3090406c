"""Takes the first steps of a run in a folder that is deleted, and measures what the whole run will take."""

import contextlib
import io
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import psutil
import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from torch.utils.data import DataLoader

from vitcomposer.algorithms.run_length import steps_per_epoch, total_steps
from vitcomposer.callbacks import Checkpoints, KeptPredictions, Preemption, Throughput
from vitcomposer.cost.input_speed import measure_loader
from vitcomposer.foundations import lean_steps
from vitcomposer.runs.devices import with_precision
from vitcomposer.runs.folder import already_finished, unlock_run_folder
from vitcomposer.schema import DINO, Distill, SelfSupervised, SimCLR, Supervised, SwAV
from vitcomposer.schema.probe import NO_STEP
from vitcomposer.schema.recipe import Recipe
from vitcomposer.schema.times import parse_time
from vitcomposer.training.execution import attention_order
from vitcomposer.training.fit import end_workers, let_go

_SECONDS, _STEPS = 2.0, 20  # of steps that are measured, whichever comes first
_SECONDS_OF_LOADER = 2.0
_EVALUATION_BATCHES = 2  # the second is measured
_HARD = ("hard", "soft_target_cross_entropy")  # a distillation whose two losses are alike
_SAMPLED_STEPS = 500  # of a run, whose FLOPs are looked at
_Recipe = TypeVar("_Recipe", bound=Recipe)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What the first steps of a run showed. Rates are images a second of this process alone.

    Attributes:
        finished: Whether the run folder holds this run, complete.
        said: Lines that the run prints at its start: what was loaded of the weights, what is rounded.
        steps, steps_per_epoch: Of the whole run; 0 where a recipe takes no step, and all below is None.
        seconds_per_step: Mean of the steps after the first, from the batch on the device to the updated weights.
        first_seconds: Of the first step, with what is compiled or chosen in it.
        loss: Of the first step, before the weights have changed.
        chance: The loss of a network that knows nothing; None where the recipe has no such number.
        memory_bytes: The most that the device held; of this process and its workers on a CPU.
        loader_rate: The loader alone, with nothing else at work.
        model_rate: Forward, backward and optimizer, with the batch already there.
        train_seconds: Of all steps, by the slower of loader and network.
        evaluation_seconds: Of all evaluations; None where the recipe has none.
    """

    device: str
    finished: bool
    said: list[str]
    images: int
    steps: int
    steps_per_epoch: int
    seconds_per_step: float | None = None
    first_seconds: float | None = None
    loss: float | None = None
    chance: float | None = None
    memory_bytes: int | None = None
    memory_total_bytes: int | None = None
    loader_rate: float | None = None
    model_rate: float | None = None
    train_seconds: float | None = None
    evaluations: int = 0
    evaluation_seconds: float | None = None

    @property
    def loader_limits(self) -> bool:
        """Whether the network would wait for the loader."""
        return self.loader_rate is not None and self.model_rate is not None and self.loader_rate < self.model_rate

    def to_dict(self) -> dict[str, Any]:
        """All of it, as ``--json`` prints it."""
        return {**asdict(self), "limit": "loader" if self.loader_limits else "model"}


def try_run(cfg: Recipe, build: Callable[[Any], Trainer]) -> Trial:
    """Build a run and take its first steps; neither its folder nor anything else is left.

    Args:
        build: Of its recipe.

    Raises:
        ConfigError: What a start of the run would raise.
    """
    cfg = with_precision(cfg)
    finished = _is_finished(cfg)
    with tempfile.TemporaryDirectory(prefix="vitcomposer-check-") as folder:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            trainer = build(_elsewhere(cfg, folder))
            measured = _take_steps(trainer, cfg)
        lines = [line for line in said.getvalue().splitlines() if folder not in line]
        return Trial(finished=finished, said=lines, **measured)


def _is_finished(cfg: Recipe) -> bool:
    """Whether the run is done, by its own folder, which may also hold another run or be in use."""
    try:
        return already_finished(replace(cfg, run=replace(cfg.run, remote=None)))
    finally:
        unlock_run_folder(cfg)


def _elsewhere(cfg: _Recipe, folder: str) -> _Recipe:
    """The same run with a folder of its own, and without what only a whole run measures."""
    run = replace(cfg.run, folder=folder, remote=None, loggers=[], progress_bar=False, attention_interval=None)
    cfg = replace(cfg, run=run)
    return replace(cfg, monitor=None) if isinstance(cfg, SelfSupervised) else cfg


class _StepTimes(Callback):
    """Measures steps with their batch on the device, and stops the run after some."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._began = 0.0

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._began = _now(state)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.seconds.append(_now(state) - self._began)
        losses = state.total_loss_dict
        self.losses.append(float(losses.get("loss/train/total", math.nan)) if isinstance(losses, dict) else math.nan)
        measured = self.seconds[1:]
        if measured and (sum(measured) >= _SECONDS or len(measured) >= _STEPS):
            state.stop_training()


class _EvaluationTimes(Callback):
    """Measures batches of an evaluation with their images on the device."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        self._began = _now(state)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self.seconds.append(_now(state) - self._began)


def _now(state: State) -> float:
    """Seconds of the clock, once the device has done what it was given."""
    if state.device.name == "gpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def _take_steps(trainer: Trainer, cfg: Recipe) -> dict[str, Any]:
    """The fields of a :class:`Trial` that the steps tell."""
    state = trainer.state
    # A trial keeps nothing, and Ctrl-C ends it at once.
    kept = [c for c in state.callbacks if not isinstance(c, Checkpoints | KeptPredictions | Preemption)]
    steps, evaluation = _StepTimes(), _EvaluationTimes()
    state.callbacks = [*kept, steps, evaluation]
    for evaluator in state.evaluators:  # the end of a fit would evaluate everything
        evaluator.eval_interval = lambda *_: False
        evaluator.subset_num_batches = _EVALUATION_BATCHES
    try:
        loader = cast(DataLoader, state.train_dataloader)
        found: dict[str, Any] = {"device": state.device.name, "images": len(loader) * cfg.global_train_batch_size}
        if cfg.max_duration == NO_STEP:
            return {**found, "steps": 0, "steps_per_epoch": 0}
        epoch, whole = steps_per_epoch(state), total_steps(state)
        found |= {"steps": whole, "steps_per_epoch": epoch}
        with attention_order(cfg.run.attention_backends), lean_steps(trainer):
            trainer.fit()
            found |= _memory(state) | {"loss": steps.losses[0], "chance": chance_loss(cfg)}
            count, seconds = _evaluate(trainer, cfg, evaluation, epoch, whole)
        measured = steps.seconds[1:] or steps.seconds
        step = sum(measured) / len(measured)
        rate = measure_loader(loader, _SECONDS_OF_LOADER, "").per_second
        slower = max(step * _later_steps(trainer, whole), cfg.global_train_batch_size / rate)
        return found | {
            "first_seconds": steps.seconds[0],
            "seconds_per_step": step,
            "model_rate": cfg.global_train_batch_size / step,
            "loader_rate": rate,
            "train_seconds": whole * slower,
            "evaluations": count,
            "evaluation_seconds": seconds,
        }
    finally:
        end_workers(trainer)
        trainer.engine.close()
        let_go(trainer)


def _evaluate(
    trainer: Trainer, cfg: Recipe, times: _EvaluationTimes, epoch: int, whole: int
) -> tuple[int, float | None]:
    """How many evaluations the run has, and the seconds of them all, by a batch of one."""
    evaluators = list(trainer.state.evaluators)
    if not evaluators:
        return 0, None
    trainer.state.evaluators = evaluators[:1]
    trainer.eval()
    trainer.state.evaluators = evaluators
    value, unit = parse_time("run.eval_interval", cfg.run.eval_interval)
    every = {"ep": value * epoch, "ba": value, "sp": value / cfg.global_train_batch_size, "dur": value * whole}[unit]
    count = math.ceil(whole / max(every, 1))
    batches = len(cast(DataLoader, evaluators[0].dataloader.dataloader))
    return count, count * len(evaluators) * batches * times.seconds[-1]


def _later_steps(trainer: Trainer, whole: int) -> float:
    """The mean cost of a step over that of the first ones, in FLOPs; 1 where all steps cost the same."""
    throughput = next(c for c in trainer.state.callbacks if isinstance(c, Throughput))
    of_image = throughput.train_flops_per_image
    if of_image is None or not of_image(0):
        return 1.0
    sampled = np.linspace(0, whole - 1, min(whole, _SAMPLED_STEPS)).astype(int)
    return float(np.mean([of_image(int(step)) for step in sampled])) / of_image(0)


def _memory(state: State) -> dict[str, int]:
    if state.device.name == "gpu":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return {"memory_bytes": torch.cuda.max_memory_allocated(), "memory_total_bytes": total}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    workers = sum(child.memory_full_info().uss for child in psutil.Process().children(recursive=True))
    return {"memory_bytes": peak + workers, "memory_total_bytes": psutil.virtual_memory().total}


def chance_loss(cfg: Recipe) -> float | None:
    """What the loss of a recipe is while the network tells nothing apart; None where no formula says."""
    if isinstance(cfg, Supervised):
        of_labels = math.log(2 if cfg.loss == "binary_cross_entropy" else cfg.model.num_classes)
        as_teacher = not isinstance(cfg, Distill) or (cfg.distillation.kind, cfg.loss) == _HARD
        return of_labels if as_teacher else None
    if isinstance(cfg, SwAV):
        return sum(map(math.log, cfg.head.num_clusters)) / len(cfg.head.num_clusters)
    if isinstance(cfg, DINO):
        return math.log(cfg.head.out_dim)
    if isinstance(cfg, SimCLR):
        return math.log(2 * cfg.global_train_batch_size - 1)
    return None
