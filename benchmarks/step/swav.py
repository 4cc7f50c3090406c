"""A SwAV step of DeiT-S with 2 x 224 + 6 x 96 crops: our task against timm's trunk in a plain loop of the same method.

For benchmarks.step. The plain side is what a careful author writes from the paper (arXiv:2006.09882):
one forward pass per crop size, the head once on all crops, codes by Sinkhorn on the exponentials, a loop over pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcomposer.losses import SwAVLoss
from vitcomposer.models import SwAVHead, build_model
from vitcomposer.tasks import SwAVTask
from vitcomposer.tasks.self_supervised import CROPS

COUNTS = (2, 6)
TEMPERATURE, EPSILON, ITERATIONS = 0.1, 0.05, 3


@dataclass(frozen=True)
class Sizes:
    """Of crops, heads and prototypes; ``trunk`` holds what differs from DeiT-S."""

    crops: tuple[int, int] = (224, 96)
    dims: tuple[int, int, int] = (384, 2048, 128)
    prototypes: int = 3000
    trunk: Mapping[str, Any] = field(default_factory=dict)


class PlainSwAV(nn.Module):
    """timm's DeiT-S with a head; the loss of a list of crops."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        options = {"num_classes": 0, "img_size": sizes.crops[0], "dynamic_img_size": True, **sizes.trunk}
        self.trunk = timm.create_model("deit_small_patch16_224", **options)
        width, hidden, out = sizes.dims
        self.head = nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
        )
        self.prototypes = nn.Linear(out, sizes.prototypes, bias=False)

    def forward(self, crops: list[Tensor]) -> Tensor:
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        features = torch.cat([self.trunk(images) for images in crops])
        scores = self.prototypes(F.normalize(self.head(features), dim=1)).float()
        by_crop = scores.chunk(sum(COUNTS))
        loss = scores.new_zeros(())
        for assigned in range(COUNTS[0]):
            codes = plain_sinkhorn(by_crop[assigned].detach())
            others = [by_crop[other] for other in range(len(by_crop)) if other != assigned]
            for other in others:
                loss = loss - (codes * F.log_softmax(other / TEMPERATURE, dim=1)).sum(dim=1).mean() / len(others)
        return loss / COUNTS[0]


@torch.no_grad()
def plain_sinkhorn(scores: Tensor) -> Tensor:
    """Codes (B, K) of scores (B, K): rows and columns of the exponentials made equal in turn."""
    codes = (scores / EPSILON).exp().T
    codes /= codes.sum()
    for _ in range(ITERATIONS):
        codes /= codes.sum(dim=1, keepdim=True) * codes.shape[0]
        codes /= codes.sum(dim=0, keepdim=True) * codes.shape[1]
    return (codes * codes.shape[1]).T


class OurSwAV(nn.Module):
    """The recipe's task, called as its Trainer calls it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        loss = SwAVLoss(num_crops=sum(COUNTS), temperature=TEMPERATURE, epsilon=EPSILON, iterations=ITERATIONS)
        self.task = SwAVTask(
            build_model("deit_small_patch16", num_classes=0, image_size=sizes.crops[0], **sizes.trunk),
            SwAVHead(list(sizes.dims), True, [sizes.prototypes]),
            loss,
            freeze_prototypes_epochs=0.0,
            hard_assignment_epochs=0.0,
            queue_start_epoch=0,
            queue_steps=0,
        )

    def forward(self, crops: list[Tensor]) -> Tensor:
        self.task.begin_step(1, steps_per_epoch=10, total_steps=100)
        batch = {CROPS: crops}
        return self.task.loss(self.task(batch), batch)


class WithCrops(nn.Module):
    """Either side with its crops in memory, so that a step needs no other images."""

    def __init__(self, method: nn.Module, sizes: Sizes, batch: int, device: torch.device) -> None:
        super().__init__()
        self.method = method
        groups = zip(COUNTS, sizes.crops, strict=True)
        self.crops = [torch.randn(count * batch, 3, size, size, device=device) for count, size in groups]

    def forward(self, images: Tensor) -> Tensor:
        return self.method(self.crops)


def both_sides(batch: int, device: torch.device, sizes: Sizes | None = None) -> dict[str, WithCrops]:
    """The plain loop's network and ours."""
    sizes = sizes or Sizes()
    methods = {"timm": PlainSwAV(sizes), "vitcomposer": OurSwAV(sizes)}
    return {who: WithCrops(method, sizes, batch, device) for who, method in methods.items()}


def loss_itself(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return model(images)
