"""A classifier as a ComposerModel.

A batch is a dict: ``image`` float32 (B, 3, H, W), normalised; ``label`` int64 (B,); in training also ``target`` float32
(B, num_classes), the label after smoothing and mixing.
"""

from collections.abc import Callable
from typing import Any

import torch
from composer.metrics import CrossEntropy
from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from vitcomposer.data.labels import IGNORE_LABEL

Loss = Callable[[Tensor, Tensor], Tensor]


class Classification(ComposerModel):
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
        heads = (outputs,) if isinstance(outputs, Tensor) else outputs
        return torch.stack([self.loss_function(logits, batch["target"]) for logits in heads]).mean()

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        # Top-1 on mixed images says little and costs a pass over the outputs: training logs the loss alone.
        return {} if is_train else dict(self.metrics)

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: Metric) -> None:
        metric.update(outputs, batch["label"])


def classification_metrics(num_classes: int) -> dict[str, Metric]:
    """``top1``, ``loss`` and, where it says something (above five classes), ``top5``; padding is left out."""

    def accuracy(top_k: int) -> Metric:
        return MulticlassAccuracy(num_classes, average="micro", top_k=top_k, ignore_index=IGNORE_LABEL)

    metrics: dict[str, Metric] = {"top1": accuracy(1), "loss": CrossEntropy(ignore_index=IGNORE_LABEL)}
    if num_classes > 5:
        metrics["top5"] = accuracy(5)
    return metrics
