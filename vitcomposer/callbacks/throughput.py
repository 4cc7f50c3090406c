"""Measures how fast a run trains: images per second, time lost waiting for data, share of the device's peak (MFU)."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from vitcomposer.cost.gpus import peak_flops


class Throughput(Callback):
    """Measures training steps by wall clock, without evaluation, checkpoints and the first batches.

    A step lasts from the request for its batch to BATCH_END, where Composer has just read the loss from the device,
    so nothing here synchronises. Waiting for data is the part until AFTER_DATALOADER; on several ranks it includes
    waiting for the slowest of them. The first ``warmup_batches`` of every session (compilation, start of workers, on a
    resume the search for the place in the epoch) are measured apart. Totals are part of the checkpoint, so a
    resumed run counts every step of its weights once.

    Logs ``throughput/images_per_sec``, ``throughput/data_wait_fraction`` and ``throughput/mfu`` over the last
    ``window`` batches, and ``throughput/train_flops`` of all steps since the first.

    Args:
        train_flops_per_image: FLOPs of one training image at a step; None leaves out the MFU.
        precision: Composer's name, which selects the peak of the device.

    Attributes:
        images, seconds, wait_seconds: Of all training steps after the warm-up; images count over all ranks.
        warmup_images, warmup_seconds: Of the steps left out above.
        flops, warmup_flops: Of the images of both; 0 where they are unknown.
        evaluation_seconds, saving_seconds: Of the whole run; callbacks that measure the network add to the former by
            :func:`as_evaluation`, ``Checkpoints`` to the latter.
    """

    def __init__(
        self,
        train_flops_per_image: Callable[[int], float] | None,
        precision: str,
        *,
        window: int = 100,
        warmup_batches: int = 2,
    ) -> None:
        self.train_flops_per_image = train_flops_per_image
        self.precision = precision
        self.warmup_batches = warmup_batches
        self.images = 0
        self.seconds = 0.0
        self.wait_seconds = 0.0
        self.warmup_images = 0
        self.warmup_seconds = 0.0
        self.flops: float = 0
        self.warmup_flops: float = 0
        self.evaluation_seconds = 0.0
        self.saving_seconds = 0.0
        self._evaluation_start: float | None = None
        self._recent: deque[tuple[int, float, float, float]] = deque(maxlen=window)  # images, s, s of waiting, FLOPs
        self._session_batches = 0
        self._step_start: float | None = None
        self._step_wait = 0.0
        self._epoch_end_wait = 0.0
        self._fit_start: float | None = None
        self._wall_before = 0.0
        self._peak_memory_before: int | None = None
        self._on_gpu = False
        self._peak: float | None = None

    @property
    def wall_seconds(self) -> float:
        """Seconds since the first FIT_START, with evaluation and checkpoints, without the time between sessions."""
        running = 0.0 if self._fit_start is None else time.perf_counter() - self._fit_start
        return self._wall_before + running

    @property
    def images_per_sec(self) -> float | None:
        """Mean over the run, all ranks together; None before the end of the warm-up."""
        return self.images / self.seconds if self.seconds else None

    @property
    def recent_images_per_sec(self) -> float | None:
        """Mean over the last ``window`` batches."""
        seconds = sum(step[1] for step in self._recent)
        return sum(step[0] for step in self._recent) / seconds if seconds else None

    @property
    def data_wait_fraction(self) -> float | None:
        """Share of the training time spent waiting for data, in [0, 1]."""
        return self.wait_seconds / self.seconds if self.seconds else None

    @property
    def recent_wait_fraction(self) -> float | None:
        """:attr:`data_wait_fraction` over the last ``window`` batches."""
        seconds = sum(step[1] for step in self._recent)
        return sum(step[2] for step in self._recent) / seconds if seconds else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation of the run, in [0, 1]; None where FLOPs or the peak of the device are unknown."""
        return self._mfu(self.flops, self.seconds)

    @property
    def train_flops(self) -> float | None:
        """FLOPs of all training steps, those of the warm-up included; None where they are unknown."""
        return None if self.train_flops_per_image is None else self.flops + self.warmup_flops

    @property
    def peak_memory_bytes(self) -> int | None:
        """Most memory that PyTorch held on this rank's device; None on a CPU."""
        now = torch.cuda.max_memory_allocated() if self._on_gpu else None
        return max((peak for peak in (now, self._peak_memory_before) if peak is not None), default=None)

    def _mfu(self, flops: float, seconds: float) -> float | None:
        if seconds == 0 or self.train_flops_per_image is None or self._peak is None:
            return None
        return flops / seconds / (self._peak * dist.get_world_size())

    def fit_start(self, state: State, logger: Logger) -> None:
        self._on_gpu = state.device.name == "gpu"
        self._peak = peak_flops(torch.cuda.get_device_name(), self.precision) if self._on_gpu else None
        self._session_batches = 0
        self._step_start = None
        if self._fit_start is None:
            self._fit_start = time.perf_counter()

    def epoch_start(self, state: State, logger: Logger) -> None:
        # Between this event and BEFORE_DATALOADER the loader starts its workers: that is waiting for data too.
        self._step_start = time.perf_counter() - self._epoch_end_wait
        self._epoch_end_wait = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        if self._step_start is None:
            self._step_start = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        assert self._step_start is not None, "BEFORE_DATALOADER comes first"
        self._step_wait = time.perf_counter() - self._step_start

    def epoch_end(self, state: State, logger: Logger) -> None:
        # The request that found the epoch exhausted has no step of its own: the first of the next epoch carries it.
        if self._step_start is not None:
            self._epoch_end_wait = time.perf_counter() - self._step_start
            self._step_start = None

    def batch_end(self, state: State, logger: Logger) -> None:
        assert self._step_start is not None and state.previous_timestamp is not None, "a step has begun"
        seconds = time.perf_counter() - self._step_start
        self._step_start = None
        images = state.timestamp.sample.value - state.previous_timestamp.sample.value
        of_image = self.train_flops_per_image
        flops = 0 if of_image is None else images * of_image(state.previous_timestamp.batch.value)
        self._session_batches += 1
        if self._session_batches <= self.warmup_batches:
            self.warmup_images += images
            self.warmup_seconds += seconds
            self.warmup_flops += flops
            return
        self.images += images
        self.seconds += seconds
        self.wait_seconds += self._step_wait
        self.flops += flops
        self._recent.append((images, seconds, self._step_wait, flops))
        logger.log_metrics(self._metrics())

    def _metrics(self) -> dict[str, float]:
        speed = self.recent_images_per_sec
        assert speed is not None, "the window holds a step"
        seconds, waited, flops = (sum(step[i] for step in self._recent) for i in (1, 2, 3))
        metrics = {"throughput/images_per_sec": speed, "throughput/data_wait_fraction": waited / seconds}
        if self.train_flops is not None:
            metrics["throughput/train_flops"] = self.train_flops
        mfu = self._mfu(flops, seconds)
        return metrics if mfu is None else {**metrics, "throughput/mfu": mfu}

    def eval_start(self, state: State, logger: Logger) -> None:
        self._evaluation_start = time.perf_counter()

    def eval_end(self, state: State, logger: Logger) -> None:
        if self._evaluation_start is not None:
            self.evaluation_seconds += time.perf_counter() - self._evaluation_start
            self._evaluation_start = None

    def close(self, state: State, logger: Logger) -> None:
        self._wall_before, self._fit_start = self.wall_seconds, None

    def state_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "seconds": self.seconds,
            "wait_seconds": self.wait_seconds,
            "warmup_images": self.warmup_images,
            "warmup_seconds": self.warmup_seconds,
            "flops": self.flops,
            "warmup_flops": self.warmup_flops,
            "wall_seconds": self.wall_seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "saving_seconds": self.saving_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images = state["images"]
        self.seconds = state["seconds"]
        self.wait_seconds = state["wait_seconds"]
        self.warmup_images = state["warmup_images"]
        self.warmup_seconds = state["warmup_seconds"]
        self.flops = state["flops"]
        self.warmup_flops = state["warmup_flops"]
        self._wall_before = state["wall_seconds"]
        self.evaluation_seconds = state.get("evaluation_seconds", 0.0)  # which older checkpoints lack
        self.saving_seconds = state.get("saving_seconds", 0.0)
        self._peak_memory_before = state["peak_memory_bytes"]


@contextmanager
def as_evaluation(state: State) -> Iterator[None]:
    """Within it the time of a callback between two steps is that of evaluation, in a run that is measured."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    for callback in state.callbacks:
        if isinstance(callback, Throughput):
            callback.evaluation_seconds += seconds
