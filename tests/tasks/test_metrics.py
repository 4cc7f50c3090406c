"""What a run measures is a sum over images by their number: for any batches, with padding, on any number of ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.mds.order import PADDING, Layout, arrange
from vitcomposer.losses import DistillationLoss, soft_target_cross_entropy
from vitcomposer.tasks import ClassificationTask, DistillationTask, Head, LinearProbeTask

CLASSES = 7
HEADS = [Head("tokens", 1.0, False), Head("tokens", 2.0, True)]


class Trunk(nn.Module):
    """As much as a probe asks of one."""

    num_features = 4


def classification() -> ComposerModel:
    return ClassificationTask(nn.Identity(), loss=soft_target_cross_entropy, num_classes=CLASSES)


def distillation() -> ComposerModel:
    loss = DistillationLoss(soft_target_cross_entropy, kind="hard", alpha=0.5, temperature=1.0, kl="batch")
    return DistillationTask(nn.Identity(), loss=loss, num_classes=CLASSES, teacher=None, sees_unmixed=False)


def batches(images: int, ranks: int, rank: int, per_step: int) -> list[list[tuple[int, bool]]]:
    """Number of each image of a rank's batches, and whether it is padding, in the order of an evaluation."""
    size = per_step // ranks
    plan = arrange(np.array([images]), Layout(ranks_per_node=ranks, batch_size=size), epoch=0)
    found = [[int(v) for v in step if v != PADDING] for step in plan[0, rank].reshape(-1, size)]
    return [[(v % images, v >= images) for v in step] for step in found if step]


def over_ranks(metrics: Sequence[Metric]) -> float:
    """What torchmetrics computes where each of these is of a rank."""
    first = metrics[0]
    names = {id(getattr(first, name)): name for name in first._defaults}
    first.dist_sync_fn = lambda tensor, group=None: [getattr(metric, names[id(tensor)]) for metric in metrics]
    first.distributed_available_fn = lambda: True
    return float(first.compute())


@pytest.mark.parametrize("task", [classification, distillation])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("images", "per_step"), [(9, 6), (37, 12), (13, 6), (24, 12), (5, 6)])
def test_metrics_of_a_classifier_are_means_over_images(
    task: Callable[[], ComposerModel], ranks: int, images: int, per_step: int
) -> None:
    """13 and 37 images end, on 2 and 3 ranks, with a batch of padding alone on all but the first of them."""
    generator = torch.Generator().manual_seed(images)
    logits = 3 * torch.randn(images, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    measured: dict[str, list[Metric]] = {}
    for rank in range(ranks):
        metrics = (model := task()).get_metrics(is_train=False)
        for step in batches(images, ranks, rank, per_step):
            at = torch.tensor([image for image, _ in step])
            given = torch.where(torch.tensor([padded for _, padded in step]), IGNORE_LABEL, labels[at])
            for metric in metrics.values():
                model.update_metric({"label": given}, logits[at], metric)
        for name, metric in metrics.items():
            measured.setdefault(name, []).append(metric)
    best = logits.topk(5).indices
    expected = {
        "loss": float(F.cross_entropy(logits.double(), labels)),
        "top1": float((best[:, 0] == labels).double().mean()),
        "class_top1": float(np.mean([float((best[labels == k, 0] == k).double().mean()) for k in labels.unique()])),
        "top5": float((best == labels[:, None]).any(dim=1).double().mean()),
    }
    assert {name: over_ranks(metrics) for name, metrics in measured.items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_metrics_of_a_probe_are_means_over_images(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitcomposer.tasks import probe

    class Frozen(nn.Module):
        def __init__(self, trunk: nn.Module, features: Any) -> None:
            super().__init__()
            self.widths = dict.fromkeys(features, 4)

    monkeypatch.setattr(probe, "FrozenFeatures", Frozen)
    generator = torch.Generator().manual_seed(0)
    logits: list[Tensor] = [torch.randn(37, CLASSES, generator=generator) for _ in HEADS]
    labels = torch.randint(CLASSES, (37,), generator=generator)
    measured: dict[str, list[Metric]] = {}
    for rank in range(ranks):
        task = LinearProbeTask(Trunk(), HEADS, num_classes=CLASSES)
        for step in batches(37, ranks, rank, 12):
            at = torch.tensor([image for image, _ in step])
            given = torch.where(torch.tensor([padded for _, padded in step]), IGNORE_LABEL, labels[at])
            for metric in task.metrics.values():
                task.update_metric({"label": given}, [each[at] for each in logits], metric)
        for name, metric in task.metrics.items():
            measured.setdefault(name, []).append(metric)
    right = [float((each.argmax(dim=1) == labels).double().mean()) for each in logits]
    expected = {f"top1_{head.name}": share for head, share in zip(HEADS, right, strict=True)} | {"top1": max(right)}
    assert {name: over_ranks(metrics) for name, metrics in measured.items()} == pytest.approx(expected, abs=1e-6)
