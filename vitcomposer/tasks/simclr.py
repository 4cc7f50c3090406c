"""SimCLR (arXiv:2002.05709) as a ComposerModel."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitcomposer.cost.flops import TRAIN_FACTOR, multi_crop_flops
from vitcomposer.losses import info_nce
from vitcomposer.models import MLPHead
from vitcomposer.tasks.self_supervised import CROPS, SelfSupervisedTask, encode


class SimCLRTask(SelfSupervisedTask):
    """Trunk and projection head; the two views of an image find each other among all images of all ranks."""

    def __init__(self, trunk: nn.Module, head: MLPHead, *, temperature: float) -> None:
        super().__init__(trunk)
        self.head = head
        self.temperature = temperature

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.head(encode(self.trunk, batch[CROPS]))  # (2 * B, D), view-major

    def loss(self, outputs: Tensor, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return info_nce(*outputs.chunk(2), temperature=self.temperature)

    def train_flops_per_image(self, crop_sizes: Sequence[int]) -> float:
        return TRAIN_FACTOR * multi_crop_flops(self.trunk, crop_sizes, [self.head])
