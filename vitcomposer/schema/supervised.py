"""The keys of a yaml of the recipe ``supervised``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vitcomposer.errors import noting, require, require_within
from vitcomposer.schema.algorithms import check_algorithms, check_company, check_schedule_free
from vitcomposer.schema.blocks import Augment, Data, Evaluation, Mixing, Optimizer, Run, Schedule
from vitcomposer.schema.model import Init, Model
from vitcomposer.schema.recipe import check_balance, check_steps, require_labels_here


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Train a classifier from labels: ViT, DeiT, DeiT III and ConViT."""

    recipe: Literal["supervised"]
    seed: int
    max_duration: str  # Composer time string: 300ep, 1000ba
    global_train_batch_size: int  # images per step over all devices
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16"]
    loss: Literal["soft_target_cross_entropy", "binary_cross_entropy"]
    logit_adjustment: float = (
        0.0  # tau of arXiv:2007.07314: the loss sees logits + tau * log of a class's share; 0: off
    )
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
        check_steps(self, usual="DeiT uses 1024.")
        with noting():
            require_within("model.num_classes", self.model.num_classes, 2, 10**7, "Count your classes.")
        with noting():
            check_algorithms(self.algorithms)
        smoothing = self.mixing.label_smoothing
        check_company(
            self.algorithms,
            loss=self.loss,
            precision=self.precision,
            label_smoothing=smoothing,
            distilled="distilled" in self.model.name,
        )
        rule = "0 with loss: binary_cross_entropy, which counts every class with a target above 0 as present"
        fits = self.loss != "binary_cross_entropy" or smoothing == 0
        require(fits, "mixing.label_smoothing", rule, smoothing, "Set mixing.label_smoothing=0.")
        check_schedule_free(self.optimizer, self.schedule, self.algorithms)
        with noting():
            check_balance(self.data, self.augment)
        self._check_adjustment()

    def _check_adjustment(self) -> None:
        key, tau = "logit_adjustment", self.logit_adjustment
        require_within(key, tau, 0, 10, "1 is the paper's, 0 switches it off.")
        if not tau:
            return
        with noting():
            require_labels_here(self.data, key, "0", tau)
        fits, rule = self.data.balance is None, "0 with data.balance, which corrects for the same shares"
        require(fits, key, rule, tau, "Drop one of the two.")
        fits = self.loss == "soft_target_cross_entropy" and self.recipe == "supervised"
        rule = "0 but with recipe: supervised and loss: soft_target_cross_entropy, whose softmax it corrects"
        require(fits, key, rule, tau, "Set logit_adjustment=0, or use data.balance.")
