"""Trains and measures a classifier on labels, as Composer's Trainer wants it (ComposerModel).

A batch is a dict: ``image`` float32 (B, 3, H, W), normalised; ``label`` int64 (B,); in training also ``target`` float32
(B, num_classes), the label after smoothing and mixing.
"""

from collections.abc import Callable
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from vitcomposer.data.labels import IGNORE_LABEL

Loss = Callable[[Tensor, Tensor], Tensor]


class ClassificationTask(ComposerModel):
    """A classifier trained on soft targets and measured by top-1, top-5 and cross-entropy on labels.

    A distilled DeiT returns two logits in training. Without a teacher both heads learn from the targets with equal
    weight, and in evaluation the network returns the mean of the two.
    """

    def __init__(self, model: nn.Module, *, loss: Loss, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.loss_function = loss
        self.metrics = classification_metrics(num_classes)

    def forward(self, batch: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        return self.model(batch["image"])

    def loss(self, outputs: Tensor | tuple[Tensor, ...], batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        heads = (outputs,) if isinstance(outputs, Tensor) else outputs  # (B, num_classes) each
        return torch.stack([self.loss_function(logits, batch["target"]) for logits in heads]).mean()

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        # Top-1 on mixed images says little and costs a pass over the outputs: training logs the loss alone.
        return {} if is_train else dict(self.metrics)

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: Metric) -> None:
        metric.update(outputs, batch["label"])


def classification_metrics(num_classes: int) -> dict[str, Metric]:
    """``top1``, ``loss`` and, where it says something (above five classes), ``top5``: means over the images.

    ``class_top1`` is the mean of the classes' top-1, to which a rare class counts as much as a frequent one.

    Padding is left out, so neither the size of a batch nor the number of ranks changes them.
    """

    def accuracy(top_k: int) -> Metric:
        return MulticlassAccuracy(num_classes, average="micro", top_k=top_k, ignore_index=IGNORE_LABEL)

    metrics: dict[str, Metric] = {"top1": accuracy(1), "loss": MeanCrossEntropy()}
    metrics["class_top1"] = MeanClassAccuracy(num_classes)
    if num_classes > 5:
        metrics["top5"] = accuracy(5)
    return metrics


class MeanClassAccuracy(Metric):
    """Mean over the classes of the share of their images that are given their class; classes without images aside."""

    right: Tensor
    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        for name in ("right", "images"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")  # (C,)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, C), labels int64 (B,); padding is left out."""
        known = labels != IGNORE_LABEL  # (B,)
        classes = labels.where(known, 0)
        right = known & (logits.argmax(dim=1) == labels)
        self.right.index_add_(0, classes, right.long())
        self.images.index_add_(0, classes, known.long())

    def compute(self) -> Tensor:
        """In [0, 1]; NaN without an image."""
        seen = self.images > 0  # (C,)
        return (self.right.double() / self.images.clamp(min=1)).sum() / seen.sum()


class MeanCrossEntropy(Metric):
    """Cross-entropy of the images of all ranks over their number, in float64; padding is left out.

    Composer's metric of this name is a mean over batches: a short batch weighs as much as a full one, and one of
    padding alone makes it NaN.
    """

    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, C), labels int64 (B,)."""
        losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_LABEL, reduction="none")
        # A float32 sum over a whole split would lose the last digits of each batch.
        self.total += losses.double().sum()
        self.images += (labels != IGNORE_LABEL).sum()

    def compute(self) -> Tensor:
        """In nats; NaN without an image."""
        return self.total / self.images
