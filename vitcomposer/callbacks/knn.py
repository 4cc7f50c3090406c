"""Measures features by their nearest neighbours (k-NN) before, during and after pre-training."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer.core import Callback, DataSpec, Event, State, Time, get_precision_context
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import create_interval_scheduler, dist
from torch import Tensor
from torch.distributed import ReduceOp
from tqdm import tqdm

from vitcomposer.callbacks.throughput import as_evaluation
from vitcomposer.collectives import all_reduce
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.errors import require
from vitcomposer.evaluation.knn import knn_accuracy
from vitcomposer.schema import KNN


class KNNMonitor(Callback):
    """Classifies held-out images by the nearest training images in the space of ``task.features``.

    Measures before the first step, every ``interval`` and at the end of training, in evaluation mode. No random number
    is drawn and every module gets its mode back, so training goes on as it would have done. Its loader workers are
    forked before the first step and stay: later there are threads, whose locks a fork would copy. Logs
    ``knn/top1_k<k>``, ``knn/top5_k<k>`` and ``knn/top1``, the highest of the former over ``k``.

    Args:
        task: A ComposerModel with ``features(images) -> (B, D)``.
        train, val: Of ``data.evaluation.build_centre_crops``: the neighbours, and the images to classify.
        interval: Composer time string.
    """

    def __init__(
        self,
        task: ComposerModel,
        train: DataSpec,
        val: DataSpec,
        *,
        k: Sequence[int],
        temperature: float,
        interval: str,
    ) -> None:
        self.task, self.train, self.val = task, train, val
        self.k, self.temperature = tuple(k), temperature
        self._due = create_interval_scheduler(
            interval, checkpoint_events=False, final_events={Event.BATCH_END, Event.EPOCH_END}
        )
        self._max_duration: Time | None = None
        self._measured_at = -1
        self.top1: float | None = None  # of the last measurement, the highest over k

    def fit_start(self, state: State, logger: Logger) -> None:
        self._max_duration = state.max_duration
        if state.timestamp.batch == 0:
            self._measure(state, logger)
            return
        for data in (self.train, self.val):
            iter(data.dataloader)  # has the workers forked

    def batch_end(self, state: State, logger: Logger) -> None:
        self._measure_if_due(state, logger, Event.BATCH_END)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._measure_if_due(state, logger, Event.EPOCH_END)

    def close(self, state: State, logger: Logger) -> None:
        for data in (self.train, self.val):
            iterator = getattr(data.dataloader, "_iterator", None)  # of workers that stay
            if iterator is not None:
                iterator._shutdown_workers()

    def _measure_if_due(self, state: State, logger: Logger, event: Event) -> None:
        # By a signal: the scheduler grants no time for this. Composer cannot compare a step with an epoch.
        stopped = state.max_duration is not self._max_duration
        if not stopped and self._measured_at != state.timestamp.batch.value and self._due(state, event):
            self._measure(state, logger)

    def _measure(self, state: State, logger: Logger) -> None:
        self._measured_at = state.timestamp.batch.value
        with as_evaluation(state):
            found = self.measure(state)
        self.top1 = best = max(value for name, value in found.items() if name.startswith("top1"))
        if dist.get_global_rank() == 0:
            each = ", ".join(f"k {k}: {100 * found[f'top1_k{k}']:.2f} %" for k in self.k)
            # Above the bar of progress, if there is one.
            tqdm.write(f"step {self._measured_at}: k-NN top-1 {each}", file=sys.stderr)
        logger.log_metrics({f"knn/{name}": value for name, value in {"top1": best, **found}.items()})

    def measure(self, state: State) -> dict[str, float]:
        """``top1_k<k>`` and ``top5_k<k>`` of the task as it is; all ranks have to call it."""
        task: Any = self.task
        modes = [(module, module.training) for module in task.modules()]
        task.eval()
        try:
            # Not compiled: a graph for each of the few sizes of a batch here would take longer than it saves.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                bank, queries = (_extract(task.features, data, state) for data in (self.train, self.val))
                return knn_accuracy(bank, queries, k=self.k, temperature=self.temperature)
        finally:
            for module, mode in modes:
                module.training = mode


def build_knn_monitor(knn: KNN, task: ComposerModel, train: DataSpec, val: DataSpec, *, key: str) -> KNNMonitor:
    """The monitor that a block of a yaml describes, whose name is ``key``.

    Raises:
        ConfigError: More neighbours than there are training samples, or a split with fewer samples than ranks.
    """
    size, queries, ranks = train.num_samples, val.num_samples, dist.get_world_size()
    assert size is not None and queries is not None, "our loaders know their length"
    require(max(knn.k) <= size, f"{key}.k", f"at most {size}, the number of training samples", knn.k, "Lower it.")
    rule, remedy = f"left out with fewer than {ranks} images in a split, one for each rank", "Start fewer ranks."
    require(min(size, queries) >= ranks, key, rule, f"{size} and {queries} images", remedy)
    return KNNMonitor(task, train, val, k=knn.k, temperature=knn.temperature, interval=knn.interval)


def _extract(features: Callable[[Tensor], Tensor], data: DataSpec, state: State) -> tuple[Tensor, Tensor]:
    """Features (n, D) float32 and labels (n,) of this rank's share, on the device."""
    found, labels = [], []
    loader: Any = data.dataloader
    # Shares differ by an image, and so perhaps by a batch: FSDP2 needs all ranks in each forward pass.
    most = int(all_reduce(state.device.tensor_to_device(torch.tensor(len(loader))), ReduceOp.MAX))
    for host_batch in loader:
        batch = data.microbatch_transforms(state.device.batch_to_device(host_batch))
        with get_precision_context(state.precision):
            found.append(features(batch["image"]).float())
            if len(found) == len(loader) < most:
                features(batch["image"])
        labels.append(batch["label"])
    known = torch.cat(labels) != IGNORE_LABEL  # which images have that cannot be decoded
    return torch.cat(found)[known], torch.cat(labels)[known]
