"""Writes what a run leaves in its folder: configuration, environment, class names, metrics and summary."""

import errno
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from composer.core import Event, State, Time
from composer.loggers import Logger, LoggerDestination
from composer.utils import create_interval_scheduler, dist

from vitcomposer.callbacks.best import Best
from vitcomposer.callbacks.throughput import Throughput
from vitcomposer.data.mds.shards import CLASS_NAMES, read_class_names
from vitcomposer.data.mds.stream import ImageStream
from vitcomposer.errors import ConfigError, SaveError
from vitcomposer.evaluation.confused import weakest
from vitcomposer.models.weights.averages import EMA_LABEL
from vitcomposer.runs import layout
from vitcomposer.runs.environment import describe_environment
from vitcomposer.runs.identity import write_identity
from vitcomposer.runs.metrics import split_metrics
from vitcomposer.runs.predictions import read_predictions
from vitcomposer.whole_files import BAD, set_aside, write_whole

FACTS = ("recipe", "model", "seed", "lr_peak", "class_imbalance")


class RunRecord(LoggerDestination):
    """Writes the run folder on rank 0 while the run goes on.

    ``metrics.jsonl`` has one line per logged step: ``step, epoch, sample, seconds, lr`` and the latest value of every
    number logged since the line before (a value that isn't finite is null). A resumed run first drops the lines
    after its checkpoint, and a line that a kill cut short.

    ``class_names.json`` is that of the training split, where it has one; one that is there stays. Lines of
    ``metrics.jsonl`` that cannot be read are moved to ``metrics.jsonl.bad``, and their number is said.

    ``summary.json`` appears at the end of training; ``finished`` is false after an early stop, and until the weights
    of the last step are evaluated. A field that doesn't apply is null, accuracies are fractions, ``seconds`` counts
    evaluation and checkpoints, ``images_per_sec`` doesn't.

    Args:
        run_folder: Created where missing.
        config_yaml: The resolved configuration.
        facts: ``recipe``, ``model``, ``seed``, ``lr_peak`` and ``class_imbalance``: training images of the largest
            class over those of the smallest, None where that is not known.
        throughput: The callback whose totals go into the summary.
        log_interval: Composer time string; evaluations and measurements of a monitor are always logged.
        identity: What ``identity.json`` shall hold; None writes none.
        best: Knows the best evaluation, and why a run ended early; None where nothing is evaluated.
    """

    def __init__(
        self,
        run_folder: Path,
        config_yaml: str,
        facts: Mapping[str, Any],
        *,
        throughput: Throughput,
        log_interval: str = "10ba",
        identity: Mapping[str, Any] | None = None,
        best: Best | None = None,
    ) -> None:
        if sorted(facts) != sorted(FACTS):
            raise ValueError(
                f"facts must have the keys {sorted(FACTS)}, got {sorted(facts)}. Add or remove the others."
            )
        self.run_folder = Path(run_folder)
        self.config_yaml = config_yaml
        self.facts = dict(facts)
        self.identity = identity
        self.throughput = throughput
        self.best = best
        self._due = create_interval_scheduler(log_interval, include_end_of_training=False, checkpoint_events=False)
        self._pending: dict[str, Any] = {}
        self._evaluated: dict[str, float] = {}
        self._evaluated_step = -1
        self._bad: dict[str, float] = {}  # images that could not be decoded
        self._knn: dict[str, float] = {}  # the last measurement of KNNMonitor
        self._measured = False  # since the line before
        self._lr: float | None = None
        self._file: BinaryIO | None = None
        self._last_line: dict[str, Any] = {}
        self._last_offset = 0
        self._ended = False

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if dist.get_global_rank() != 0:
            return
        for name, value in metrics.items():
            # Composer's time/batch and its kin lag one step behind the step, epoch and sample of the line.
            if not name.startswith("time/") and _is_scalar(value):
                self._pending[name] = value.detach() if isinstance(value, torch.Tensor) else value
            if name.startswith("data/bad_"):
                self._bad[name.removeprefix("data/")] = value
            if name.startswith("knn/"):
                self._knn[name.removeprefix("knn/")] = value
            self._measured |= name.startswith(("knn/", "attention/", "loss_spikes/", "skipped_steps/"))

    def fit_start(self, state: State, logger: Logger) -> None:
        assert state.max_duration is not None, "Composer has set it before training"
        self._max_duration: Time = state.max_duration  # kept: an early stop changes the state's
        self._ended = False
        if dist.get_global_rank() != 0 or self._file is not None:
            return
        self._batches_per_epoch = None if state.dataloader_len is None else state.dataloader_len.value
        self._environment = describe_environment()
        self.run_folder.mkdir(parents=True, exist_ok=True)
        # First: beside a new config.yaml, the summary of a shorter run would say that this one is finished.
        (self.run_folder / layout.SUMMARY).unlink(missing_ok=True)
        write_whole(self.run_folder / layout.CONFIG, self.config_yaml)
        if self.identity is not None:
            write_identity(self.run_folder, self.identity)
        write_whole(self.run_folder / layout.ENVIRONMENT, _to_json(self._environment))
        self._write_class_names(state)
        self._open_metrics(state.timestamp.batch.value)
        if self._measured:  # before the first step
            self._write_line(state)

    def _write_class_names(self, state: State) -> None:
        """A model outlives its data set: what its outputs stand for must be beside it."""
        dataset, path = getattr(state.dataloader, "dataset", None), self.run_folder / layout.CLASS_NAMES
        if not isinstance(dataset, ImageStream) or not (dataset.stream.folder / CLASS_NAMES).is_file():
            return
        try:
            is_there = read_class_names(path) is not None
        except ConfigError:
            is_there = False
            print(f"{path} cannot be read and is set aside as {set_aside(path).name}; it is written anew.")
        if not is_there:
            write_whole(path, (dataset.stream.folder / CLASS_NAMES).read_bytes())

    def _open_metrics(self, step: int) -> None:
        path = self.run_folder / layout.METRICS
        found, bad = split_metrics(path.read_bytes()) if path.exists() else ([], [])
        if bad:
            with path.with_name(path.name + BAD).open("ab") as file:
                file.writelines(text + b"\n" for text in bad)
            print(f"{path}: {len(bad)} of its lines cannot be read and are set aside in {path.name}{BAD}.")
        lines = [line for line in found if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._last_line = lines[-1] if lines else {}
        self._last_offset = self._file.seek(0, os.SEEK_END)
        if lines:
            self._last_offset -= len(json.dumps(lines[-1])) + 1

    def batch_start(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            # Here the optimizer holds what this step trains at; at BATCH_END it is already that of the next.
            self._lr = max(float(group["lr"]) for optimizer in state.optimizers for group in optimizer.param_groups)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._due(state, Event.BATCH_END) or self._measured:
            self._write_line(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self._due(state, Event.EPOCH_END) or self._measured:
            self._write_line(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        for name, value in self._pending.items():
            if name.startswith("metrics/"):
                self._evaluated[name] = float(value)
        self._evaluated_step = state.timestamp.batch.value
        self._write_line(state)
        # Composer runs an evaluation that is due at the end of training after FIT_END.
        if self._ended:
            self._write_summary(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._write_line(state)
        self._ended = True
        self._write_summary(state)

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated": dict(self._evaluated), "knn": dict(self._knn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._evaluated = dict(state["evaluated"])
        self._knn = dict(state["knn"])

    def _write_line(self, state: State) -> None:
        """Append what was logged since the last line; a second call in one step extends the line of that step."""
        if self._file is None or not self._pending:
            return
        line: dict[str, Any] = {
            "step": state.timestamp.batch.value,
            "epoch": self._epochs(state),
            "sample": state.timestamp.sample.value,
            "seconds": round(self.throughput.wall_seconds, 3),
        }
        if self._lr is not None:
            line["lr"] = self._lr
        line |= {name: _number(value) for name, value in self._pending.items()}
        self._pending.clear()
        self._measured = False
        if self._last_line.get("step") == line["step"]:
            line = {**self._last_line, **line}
            self._file.seek(self._last_offset)
            self._file.truncate()
        else:
            self._last_offset = self._file.seek(0, os.SEEK_END)
        self._check_still_there(state)
        # One unbuffered write per line: a kill can cut short nothing but the last line.
        data = (json.dumps(line) + "\n").encode()
        if self._file.write(data) < len(data):  # what a full disk does first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.run_folder / layout.METRICS))
        self._last_line = line

    def _check_still_there(self, state: State) -> None:
        """An open file can be written after it was deleted: the run would go on for hours and leave nothing."""
        assert self._file is not None
        path = self.run_folder / layout.METRICS
        try:
            same = os.path.samestat(os.stat(path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise SaveError(
                f"{path} was deleted or replaced while the run wrote to it, seen at step "
                f"{state.timestamp.batch.value}. Put the folder back, and the same command goes on from its last "
                "checkpoint; without it, it starts anew."
            )

    def _epochs(self, state: State) -> float:
        done = state.timestamp.batch_in_epoch.value
        if self._batches_per_epoch is None or done == 0:
            return state.timestamp.epoch.value
        return state.timestamp.epoch.value + round(done / self._batches_per_epoch, 6)

    def _write_summary(self, state: State) -> None:
        if self._file is None:
            return
        images = state.timestamp.sample.value
        summary = {
            "recipe": self.facts["recipe"],
            "model": self.facts["model"],
            "top1": self._metric("eval", "top1"),
            "top5": self._metric("eval", "top5"),
            "loss": self._metric("eval", "loss"),
            "class_top1": self._metric("eval", "class_top1"),
            "top1_ema": self._metric("ema", "top1"),
            "top5_ema": self._metric("ema", "top5"),
            "class_top1_ema": self._metric("ema", "class_top1"),
            "class_imbalance": self.facts["class_imbalance"],
            "weakest": self._weakest(state),
            "best": None if self.best is None else self.best.found,
            "knn": self._knn or None,
            "bad_images": self._bad.get("bad_images"),
            "bad_eval_images": self._bad.get("bad_eval_images"),
            "epochs": self._epochs(state),
            "steps": state.timestamp.batch.value,
            "images_seen": images,
            **self._times(state),
            "images_per_sec": self.throughput.images_per_sec,
            "data_wait_fraction": self.throughput.data_wait_fraction,
            "train_flops": self.throughput.train_flops,
            "mfu": self.throughput.mfu,
            "peak_memory_bytes": self.throughput.peak_memory_bytes,
            "world_size": dist.get_world_size(),
            "device": torch.cuda.get_device_name() if state.device.name == "gpu" else state.device.name,
            "seed": self.facts["seed"],
            "lr_peak": self.facts["lr_peak"],
            "git_commit": self._environment["git_commit"],
            "finished": self._is_finished(state),
            "stopped_by": None if self.best is None else self.best.stopped_by,
        }
        write_whole(self.run_folder / layout.SUMMARY, _to_json(summary))

    def _is_finished(self, state: State) -> bool:
        evaluated = not state.evaluators or self._evaluated_step == state.timestamp.batch.value
        early = self.best is not None and self.best.stopped_by is not None
        return evaluated and (early or bool(state.timestamp >= self._max_duration))

    def _times(self, state: State) -> dict[str, float | None]:
        whole, speed = self.throughput.wall_seconds, self.throughput
        on_gpu = state.device.name == "gpu"
        return {
            "seconds": whole,
            "train_seconds": whole - speed.evaluation_seconds - speed.saving_seconds,
            "evaluation_seconds": speed.evaluation_seconds,
            "saving_seconds": speed.saving_seconds,
            "gpu_hours": whole * dist.get_world_size() / 3600 if on_gpu else None,
        }

    def _weakest(self, state: State) -> list[dict[str, Any]] | None:
        """The classes of which most is wrong, with the better weights; None where no evaluation is of this step."""
        raw, average = (self._metric(label, "top1") or 0.0 for label in ("eval", EMA_LABEL))
        name = layout.PREDICTIONS_EMA if average > raw else layout.PREDICTIONS
        try:
            found = read_predictions(self.run_folder / name)
            names = read_class_names(self.run_folder / layout.CLASS_NAMES)
        except ValueError:  # a damaged file, which others name
            return None
        if found is None or found.step != state.timestamp.batch.value:
            return None

        def called(label: int) -> str:
            return names[label] if names is not None and label < len(names) else str(label)

        return [
            {"class": called(label), "images": images, "top1": right, "taken_for": called(guess), "share": share}
            for label, images, right, guess, share in weakest(found.label, found.prediction, most=5)
        ]

    def _metric(self, label: str, name: str) -> float | None:
        value = self._evaluated.get(f"metrics/{label}/{name}")
        return None if value is None else _number(value)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.ndim == 0
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(value: Any) -> int | float | None:
    """A number that JSON knows; None for NaN and infinity, which it doesn't."""
    if not isinstance(value, int):
        value = value.item() if isinstance(value, torch.Tensor) else float(value)
    return value if math.isfinite(value) else None


def _to_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
