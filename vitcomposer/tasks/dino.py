"""DINO (arXiv:2104.14294) as a ComposerModel."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitcomposer.cost.flops import TRAIN_FACTOR, multi_crop_flops
from vitcomposer.losses import DINOLoss
from vitcomposer.losses.dino import GLOBAL_CROPS
from vitcomposer.models import DINOHead
from vitcomposer.tasks.self_supervised import CROPS, SelfSupervisedTask, encode, first_size, frozen_copy

Outputs = tuple[Tensor, Tensor]  # logits of the student for all crops, of the teacher for the first two


class DINOTask(SelfSupervisedTask):
    """A student learns from all crops what a teacher, the average of its past, says about the first two.

    ``teacher_trunk`` and ``teacher_head`` have no gradients; ``algorithms.MomentumEncoder`` moves them. The teacher's
    trunk is what is evaluated (section 3.2).

    Args:
        teacher_trunk: The structure of ``trunk``, without stochastic depth.
        teacher_temperature: After the warm-up, which is linear from ``teacher_temperature_start``.
    """

    def __init__(
        self,
        trunk: nn.Module,
        teacher_trunk: nn.Module,
        head: DINOHead,
        loss: DINOLoss,
        *,
        teacher_temperature: float,
        teacher_temperature_start: float,
        teacher_temperature_warmup_epochs: float,
    ) -> None:
        super().__init__(trunk)
        self.head = head
        self.teacher_trunk = frozen_copy(teacher_trunk, trunk)
        self.teacher_head = frozen_copy(copy.deepcopy(head), head)
        self.objective = loss
        self.teacher_temperature = teacher_temperature
        self.teacher_temperature_start = teacher_temperature_start
        self.teacher_temperature_warmup_epochs = teacher_temperature_warmup_epochs
        self._temperature = teacher_temperature_start

    @property
    def trunks(self) -> list[nn.Module]:
        return [self.trunk, self.teacher_trunk]

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, D) of the teacher's trunk."""
        return self.teacher_trunk(images)

    def begin_step(self, step: int, *, steps_per_epoch: int, total_steps: int) -> None:
        warmup = self.teacher_temperature_warmup_epochs * steps_per_epoch
        share = min(1.0, step / warmup) if warmup > 0 else 1.0
        start = self.teacher_temperature_start
        self._temperature = start + (self.teacher_temperature - start) * share

    def forward(self, batch: dict[str, Any]) -> Outputs:
        groups = batch[CROPS]
        logits = self.head(encode(self.trunk, groups))  # (V * B, K), crop-major
        with torch.no_grad():
            # Only global crops: the student learns the whole from its parts (section 3.1).
            seen = first_size(groups)[: GLOBAL_CROPS * len(batch["label"])]
            teacher_logits = self.teacher_head(self.teacher_trunk(seen))  # (2 * B, K)
        return logits, teacher_logits

    def loss(self, outputs: Outputs, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return self.objective(*outputs, self._temperature)

    def train_flops_per_image(self, crop_sizes: Sequence[int]) -> float:
        student = multi_crop_flops(self.trunk, crop_sizes, [self.head])
        # The teacher runs forward alone, on the global crops.
        teacher = multi_crop_flops(self.teacher_trunk, crop_sizes[:GLOBAL_CROPS], [self.teacher_head])
        return TRAIN_FACTOR * student + teacher
