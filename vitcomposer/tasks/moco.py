"""MoCo-v3 (arXiv:2104.02057) as a ComposerModel, written from the paper."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitcomposer.cost.flops import TRAIN_FACTOR, multi_crop_flops
from vitcomposer.losses import moco_contrastive
from vitcomposer.models import MLPHead
from vitcomposer.tasks.self_supervised import CROPS, SelfSupervisedTask, encode, frozen_copy

Outputs = tuple[list[Tensor], list[Tensor]]  # queries and keys of the two views


class MoCoTask(SelfSupervisedTask):
    """The queries of one view find the keys of the other, which a momentum encoder makes, and the other way round.

    ``momentum_trunk`` and ``momentum_projector`` have no gradients; ``algorithms.MomentumEncoder`` moves them. Heads
    see one view at a time, so their batch norms do too (Algorithm 1).
    """

    def __init__(
        self, trunk: nn.Module, momentum_trunk: nn.Module, projector: MLPHead, predictor: MLPHead, *, temperature: float
    ) -> None:
        super().__init__(trunk)
        self.projector = projector
        self.predictor = predictor
        self.momentum_trunk = frozen_copy(momentum_trunk, trunk)
        self.momentum_projector = frozen_copy(copy.deepcopy(projector), projector)
        self.temperature = temperature

    @property
    def trunks(self) -> list[nn.Module]:
        return [self.trunk, self.momentum_trunk]

    def forward(self, batch: dict[str, Any]) -> Outputs:
        features = encode(self.trunk, batch[CROPS])  # (2 * B, D), view-major
        queries = [self.predictor(self.projector(view)) for view in features.chunk(2)]
        with torch.no_grad():
            features = encode(self.momentum_trunk, batch[CROPS])
            keys = [self.momentum_projector(view) for view in features.chunk(2)]
        return queries, keys

    def loss(self, outputs: Outputs, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        # Algorithm 1: each view's queries (B, D) against the keys of the other view.
        (query_0, query_1), (key_0, key_1) = outputs
        first = moco_contrastive(query_0, key_1, temperature=self.temperature)
        return first + moco_contrastive(query_1, key_0, temperature=self.temperature)

    def train_flops_per_image(self, crop_sizes: Sequence[int]) -> float:
        queries = multi_crop_flops(self.trunk, crop_sizes, [self.projector, self.predictor])
        # The momentum encoder runs forward alone.
        return TRAIN_FACTOR * queries + multi_crop_flops(self.momentum_trunk, crop_sizes, [self.momentum_projector])


def freeze_patch_projection(trunk: nn.Module) -> None:
    """Fix the patch projection of a ViT at its random weights (section 4, "a trick for improving stability")."""
    trunk.get_submodule("patch_embed.proj").requires_grad_(False)
