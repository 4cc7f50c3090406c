"""Linear classifiers on frozen features, many at once, as a ComposerModel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import Metric

from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.models.features import FrozenFeatures


@dataclass(frozen=True)
class Head:
    """One classifier: what it sees, and how fast it learns."""

    feature: str
    lr_factor: float  # of the run's learning rate
    batch_norm: bool  # without parameters, before the linear layer

    @property
    def name(self) -> str:
        return f"{self.feature}{'_bn' if self.batch_norm else ''}_lr{self.lr_factor:g}"


class Classifiers(nn.Sequential):
    """All heads beside each other, with a forward pass of their own, which FSDP2 gathers their weights for."""

    def __init__(self, heads: Sequence[Head], widths: Mapping[str, int], num_classes: int) -> None:
        super().__init__(*(_classifier(widths[head.feature], num_classes, head.batch_norm) for head in heads))
        self.features = [head.feature for head in heads]

    def forward(self, input: Mapping[str, Tensor]) -> list[Tensor]:
        """Logits (B, num_classes) of every head, of the features (B, width) by name."""
        return [classifier(input[name]) for name, classifier in zip(self.features, self, strict=True)]


class LinearProbeTask(ComposerModel):
    """Trains all heads on the features of one forward pass of a trunk that stays as it is.

    The loss is the sum of the heads' cross-entropies. They share no parameter, so each learns what it would alone.
    Every linear layer starts at N(0, 0.01^2), as SwAV's, DINO's and MoCo-v3's do. Metrics are ``top1_<head>`` and
    ``top1``, that of the best head, which is chosen on the very images it is measured on.
    """

    def __init__(self, trunk: nn.Module, heads: Sequence[Head], *, num_classes: int) -> None:
        super().__init__()
        features = list(dict.fromkeys(head.feature for head in heads))
        self.frozen = FrozenFeatures(trunk, features)
        self.heads = tuple(heads)
        self.classifiers = Classifiers(heads, self.frozen.widths, num_classes)
        accuracies = {f"top1_{head.name}": HeadAccuracy(len(heads), i) for i, head in enumerate(heads)}
        self.metrics: dict[str, Metric] = {**accuracies, "top1": HeadAccuracy(len(heads))}

    @property
    def trunk(self) -> nn.Module:
        """What is probed."""
        return self.frozen.trunk

    def forward(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Logits (B, num_classes) of every head."""
        return self.classifiers(self.frozen(batch["image"]))

    def loss(self, outputs: list[Tensor], batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        # A sum, not a mean: the rate of a head must not depend on how many others there are.
        return torch.stack([F.cross_entropy(logits, batch["label"]) for logits in outputs]).sum()

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else dict(self.metrics)

    def update_metric(self, batch: dict[str, Tensor], outputs: list[Tensor], metric: Metric) -> None:
        metric.update(outputs, batch["label"])

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beside the biases: none."""
        return set()

    def apply_lr_factors(self, optimizer: Optimizer) -> None:
        """Give every head parameter groups of its own at its factor of the rate; the schedule then scales all alike.

        Args:
            optimizer: Over the classifiers, before its first step.
        """
        groups = []
        for head, classifier in zip(self.heads, self.classifiers, strict=True):
            own = {id(parameter) for parameter in classifier.parameters()}
            for group in optimizer.param_groups:
                parameters = [p for p in group["params"] if id(p) in own]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": head.lr_factor * group["lr"]})
        optimizer.param_groups[:] = groups


class EmbeddingTask(ComposerModel):
    """A trunk whose features are measured; nothing is trained."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False).eval()

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised, to the pooled features (B, D)."""
        return self.trunk(images)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.features(batch["image"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("nothing is trained")


def _classifier(width: int, num_classes: int, batch_norm: bool) -> nn.Module:
    linear = nn.Linear(width, num_classes)
    # From the seed alone, so that a head starts alike whichever others there are.
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(torch.initial_seed()))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False), linear) if batch_norm else nn.Sequential(linear)


class HeadAccuracy(Metric):
    """Top-1 of one of several heads, or of the best of them; padding is left out."""

    correct: Tensor
    total: Tensor

    def __init__(self, num_heads: int, head: int | None = None) -> None:
        super().__init__()
        self.head = head
        self.add_state("correct", torch.zeros(num_heads, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, outputs: list[Tensor], labels: Tensor) -> None:
        """Count a batch: logits (B, C) of every head, labels (B,)."""
        heads = range(len(outputs)) if self.head is None else [self.head]
        for head in heads:
            self.correct[head] += (outputs[head].argmax(dim=1) == labels).sum()
        self.total += (labels != IGNORE_LABEL).sum()

    def compute(self) -> Tensor:
        """In [0, 1]."""
        return (self.correct / self.total).max() if self.head is None else self.correct[self.head] / self.total[0]
