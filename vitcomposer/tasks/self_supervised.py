"""The base of the tasks without labels: a trunk, crops in groups, and how far the run is.

A batch comes from data.MultiCrop: ``crops``, one float32 (count * B, 3, S, S) per group of crops, crop-major.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

from vitcomposer.data.batch import CROPS

__all__ = ["CROPS", "SelfSupervisedTask", "encode", "first_size", "frozen_copy"]


class SelfSupervisedTask(ComposerModel):
    """A trunk that learns from crops of the same image.

    Attributes:
        trunk: The network that is kept: images (B, 3, S, S) to pooled features (B, D).
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    @property
    def trunks(self) -> list[nn.Module]:
        """The networks that nearly all of the time goes to, each called once for a crop size."""
        return [self.trunk]

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of images (B, 3, S, S)."""
        return self.trunk(images)

    def begin_step(self, step: int, *, steps_per_epoch: int, total_steps: int) -> None:
        """Called before every training step, which is number ``step`` from 0."""

    def train_flops_per_image(self, crop_sizes: Sequence[int]) -> float:
        """FLOPs of a training step for one image with crops of these sizes, in their order."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not one-dimensional and still have no weight decay: those of the trunk."""
        listed = cast(Callable[[], set[str]], self.trunk.no_weight_decay)
        return {f"trunk.{name}" for name in listed()}

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {}

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> None:
        raise AssertionError("there are no labels to measure by")


def encode(network: nn.Module, groups: Sequence[Tensor]) -> Tensor:
    """Outputs of ``network`` for every crop in the order of the groups; one forward pass per run of equal sizes.

    Args:
        network: Images (N, 3, S, S) to (N, D), for any N and every S of the groups.
        groups: (count * B, 3, S, S) each, crop-major.

    Returns:
        (V * B, D), crop-major, of all V crops.
    """
    return torch.cat([network(images) for images in _same_size(groups)])


def first_size(groups: Sequence[Tensor]) -> Tensor:
    """The leading crops of one size, as one batch (count * B, 3, S, S), crop-major."""
    return next(_same_size(groups))


def _same_size(groups: Sequence[Tensor]) -> Iterator[Tensor]:
    for _, run in groupby(groups, key=lambda images: images.shape[-1]):
        images = list(run)
        yield images[0] if len(images) == 1 else torch.cat(images)


def frozen_copy(average: nn.Module, source: nn.Module) -> nn.Module:
    """``average`` with the weights of ``source`` and without gradients: a momentum encoder or teacher at its start."""
    average.load_state_dict(source.state_dict())
    return average.requires_grad_(False)
