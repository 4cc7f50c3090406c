"""The keys of a yaml of the recipe ``dino``."""

from dataclasses import dataclass
from typing import Literal

from vitcomposer.errors import require, require_within
from vitcomposer.schema.self_supervised import SelfSupervised


@dataclass(frozen=True, kw_only=True)
class DINOHead:
    """Perceptron over the features to ``out_dim`` logits (arXiv:2104.14294, appendix C)."""

    out_dim: int
    norm_last_layer: bool  # keep the norm of each output's weights at 1
    batch_norm: bool

    def __post_init__(self) -> None:
        require_within("head.out_dim", self.out_dim, 2, 10**7, "DINO uses 65536.")


@dataclass(frozen=True, kw_only=True)
class DINOObjective:
    """Cross-entropy with a centred and sharpened teacher, the average of the student."""

    student_temperature: float
    teacher_temperature: float
    teacher_temperature_start: float
    teacher_temperature_warmup_epochs: float
    center_momentum: float
    momentum: float  # of the teacher at the first step; a cosine takes it to 1
    freeze_last_layer_epochs: float
    weight_decay_end: float  # a cosine takes optimizer.weight_decay there

    def __post_init__(self) -> None:
        for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            require_within(f"loss.{name}", getattr(self, name), 0.001, 1000, "DINO uses 0.1 and 0.04.")
        for name in ("teacher_temperature_warmup_epochs", "freeze_last_layer_epochs", "weight_decay_end"):
            require_within(f"loss.{name}", getattr(self, name), 0, 10**7, "0 switches it off.")
        require_within("loss.center_momentum", self.center_momentum, 0, 1, "DINO uses 0.9.")
        require_within("loss.momentum", self.momentum, 0, 1, "DINO uses 0.996.")


@dataclass(frozen=True, kw_only=True)
class DINO(SelfSupervised):
    """Self-distillation with no labels (arXiv:2104.14294). Crops 0 and 1 are those that the teacher sees."""

    recipe: Literal["dino"]
    head: DINOHead
    loss: DINOObjective

    def __post_init__(self) -> None:
        super().__post_init__()
        first = self.crops.sizes[:2]
        remedy = "Make the first group two crops, or the first two groups one crop each of the same size."
        require(len(set(first)) == 1, "crops.size_crops", "the same for crops 0 and 1", first, remedy)
        decay, remedy = self.optimizer.weight_decay, "A group of weights without decay has none to raise. Use 0.04."
        fits = decay > 0 or self.loss.weight_decay_end == 0
        require(fits, "optimizer.weight_decay", "above 0 with loss.weight_decay_end", decay, remedy)
