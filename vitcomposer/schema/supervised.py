"""The yaml of the recipe ``supervised``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vitcomposer.schema.blocks import (
    Augment,
    Data,
    Evaluation,
    Init,
    Mixing,
    Model,
    Optimizer,
    Run,
    Schedule,
    require,
)


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Train a classifier from labels: ViT, DeiT, DeiT III and ConViT."""

    recipe: Literal["supervised"]
    seed: int
    max_duration: str  # Composer time string: 300ep, 1000ba
    global_train_batch_size: int  # images per step over all devices
    precision: Literal["fp32", "amp_bf16", "amp_fp16"]
    loss: Literal["soft_target_cross_entropy", "binary_cross_entropy"]
    model: Model
    data: Data
    augment: Augment
    mixing: Mixing
    evaluation: Evaluation
    optimizer: Optimizer
    schedule: Schedule
    algorithms: dict[str, dict[str, Any]] = field(default_factory=dict)  # Composer's names
    init: Init = field(default_factory=Init)
    run: Run

    def __post_init__(self) -> None:
        size = self.global_train_batch_size
        require(size >= 1, "global_train_batch_size", "1 or more", size, "DeiT uses 1024.")
        require(self.seed >= 0, "seed", "0 or more", self.seed, "Use 0.")
        classes = self.model.num_classes
        require(classes >= 1, "model.num_classes", "at least 1", classes, "Count your classes.")
