"""SwAV (arXiv:2006.09882) as a ComposerModel."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vitcomposer.collectives import all_reduce
from vitcomposer.cost.flops import TRAIN_FACTOR, multi_crop_flops
from vitcomposer.losses import SwAVLoss
from vitcomposer.models import SwAVHead
from vitcomposer.tasks.self_supervised import CROPS, SelfSupervisedTask, encode

_USAGE_STEPS = 100  # over which the use of the prototypes is averaged


class SwAVTask(SelfSupervisedTask):
    """Trunk, head and the swapped prediction of codes.

    Logs ``swav/prototype_usage``: the entropy of how often each prototype of the first set is the nearest one of a crop
    with codes, over about the last 100 global batches, as a share of its maximum. A collapse shows as a low value.

    Args:
        freeze_prototypes_epochs: So long the prototypes are not normalised either, which could change their last bits;
            that no optimizer changes them is up to ``algorithms.FreezeAtStart``.
        hard_assignment_epochs: So long codes are one-hot.
        queue_start_epoch: From here on the queue takes part in the codes, once it is full.
        queue_steps: Steps until the queue is full.
    """

    usage: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        head: SwAVHead,
        loss: SwAVLoss,
        *,
        freeze_prototypes_epochs: float,
        hard_assignment_epochs: float,
        queue_start_epoch: int,
        queue_steps: int,
    ) -> None:
        super().__init__(trunk)
        self.head = head
        self.objective = loss
        self.freeze_prototypes_epochs = freeze_prototypes_epochs
        self.hard_assignment_epochs = hard_assignment_epochs
        self.queue_start_epoch = queue_start_epoch
        self.queue_steps = queue_steps
        self.register_buffer("usage", torch.zeros(len(head.prototypes[0])))
        self._hard = self._use_queue = False

    def begin_step(self, step: int, *, steps_per_epoch: int, total_steps: int) -> None:
        if step >= round(self.freeze_prototypes_epochs * steps_per_epoch):
            self.head.normalize_prototypes()
        self._hard = step < round(self.hard_assignment_epochs * steps_per_epoch)
        start = max(self.queue_start_epoch * steps_per_epoch, self.queue_steps)
        self._use_queue = self.queue_steps > 0 and step >= start

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        return self.head(encode(self.trunk, batch[CROPS]))

    def loss(self, outputs: tuple[Tensor, list[Tensor]], batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        embeddings, scores = outputs
        self._log_usage(scores[0].detach())
        # The queue's embeddings meet the weights outside of the head, whose forward pass FSDP2 gathers them for.
        prototypes = [_whole(weight) for weight in self.head.prototypes] if self._use_queue else self.head.prototypes
        return self.objective(scores, embeddings, prototypes, use_queue=self._use_queue, hard=self._hard)

    def train_flops_per_image(self, crop_sizes: Sequence[int]) -> float:
        return TRAIN_FACTOR * multi_crop_flops(self.trunk, crop_sizes, [self.head])

    @torch.no_grad()
    def _log_usage(self, scores: Tensor) -> None:
        by_crop = scores.view(self.objective.num_crops, -1, scores.shape[-1])  # (V, B, K)
        # A list as an index would be copied to the device in every step.
        nearest = torch.cat([by_crop[crop].argmax(dim=-1) for crop in self.objective.crops_for_assign])  # (A * B,)
        counts = torch.zeros_like(self.usage).index_add_(0, nearest, torch.ones_like(nearest, dtype=self.usage.dtype))
        self.usage.lerp_(all_reduce(counts), 1 / _USAGE_STEPS)
        if self.logger is not None:
            shares = self.usage / self.usage.sum()
            # Divided by that of equal shares, so 1 where all prototypes are used alike.
            entropy = torch.special.entr(shares).sum() / math.log(len(shares))
            self.logger.log_metrics({"swav/prototype_usage": entropy})


def _whole(weight: Tensor) -> Tensor:
    """Of all ranks, where FSDP2 has each keep a share and the head's forward pass is over; without gradient."""
    return weight.full_tensor().detach() if isinstance(weight, DTensor) else weight
