"""The keys of a yaml of the recipe ``swav``."""

from dataclasses import dataclass
from typing import Literal

from vitcomposer.errors import require, require_within
from vitcomposer.schema.self_supervised import SelfSupervised, check_dims


@dataclass(frozen=True, kw_only=True)
class SwAVHead:
    """Multi-layer perceptron, then a bias-free linear layer of prototypes for each number in ``num_clusters``."""

    dims: list[int]  # input, hidden ..., output widths: [2048, 2048, 128]
    batch_norm: bool
    num_clusters: list[int]

    def __post_init__(self) -> None:
        check_dims("head.dims", self.dims)
        fits = bool(self.num_clusters) and 2 <= min(self.num_clusters) <= max(self.num_clusters) <= 10**6
        require(fits, "head.num_clusters", "numbers of 2 or more, up to a million", self.num_clusters, "Use [3000].")


@dataclass(frozen=True, kw_only=True)
class SwAVObjective:
    """Swapped prediction (arXiv:2006.09882, section 3.1 and A.1). Shares of an epoch are given as 0.25."""

    temperature: float
    epsilon: float
    sinkhorn_iterations: int
    crops_for_assign: list[int]
    freeze_prototypes_epochs: float  # from the first step; 313 steps at 4096 images are 1
    hard_assignment_epochs: float  # from the first step; 0 uses soft codes throughout
    queue_length: int  # features of earlier batches over all ranks; 0 is none
    queue_start_epoch: int

    def __post_init__(self) -> None:
        require_within("loss.temperature", self.temperature, 0.001, 1000, "SwAV uses 0.1.")
        require_within("loss.epsilon", self.epsilon, 0.001, 1000, "SwAV uses 0.05.")
        require_within("loss.sinkhorn_iterations", self.sinkhorn_iterations, 1, 1000, "SwAV uses 3.")
        crops = self.crops_for_assign
        fits = bool(crops) and min(crops) >= 0 and len(set(crops)) == len(crops)
        require(fits, "loss.crops_for_assign", "different crops, counted from 0", crops, "Use [0, 1].")
        for name in ("freeze_prototypes_epochs", "hard_assignment_epochs", "queue_length", "queue_start_epoch"):
            require_within(f"loss.{name}", getattr(self, name), 0, 10**7, "0 switches it off.")


@dataclass(frozen=True, kw_only=True)
class SwAV(SelfSupervised):
    """Unsupervised learning by swapping assignments between views (arXiv:2006.09882)."""

    recipe: Literal["swav"]
    head: SwAVHead
    loss: SwAVObjective

    def __post_init__(self) -> None:
        super().__post_init__()
        crops, total = self.loss.crops_for_assign, self.crops.total_num_crops
        rule = f"numbers below crops.total_num_crops, {total}"
        require(max(crops) < total, "loss.crops_for_assign", rule, crops, "Crops are counted from 0: use [0, 1].")
        sizes = {self.crops.sizes[crop] for crop in crops}
        require(len(sizes) == 1, "loss.crops_for_assign", "crops of one size", crops, "Name crops of one size.")
        batch, length = self.global_train_batch_size, self.loss.queue_length
        rule = f"0, or at least global_train_batch_size, {batch}"
        require(length == 0 or length >= batch, "loss.queue_length", rule, length, f"Use {batch}, or 0 for no queue.")

    @property
    def queue_length(self) -> int:
        """Features of earlier batches that are kept: whole batches, as in VISSL."""
        return self.loss.queue_length // self.global_train_batch_size * self.global_train_batch_size
