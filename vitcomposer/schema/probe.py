"""The keys of yamls that evaluate features: recipes ``probe`` and ``knn``, and the k-NN monitor in pre-training."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vitcomposer.errors import noting, require, require_within
from vitcomposer.schema.blocks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    Data,
    Evaluation,
    Mixing,
    Optimizer,
    Run,
    Schedule,
    check_colors,
)
from vitcomposer.schema.model import Init, Model
from vitcomposer.schema.recipe import check_balance, check_no_balance, check_steps
from vitcomposer.schema.times import check_interval, check_seed

NO_STEP = "0ba"  # max_duration of a recipe that trains nothing
NO_MIXING = Mixing(mixup_alpha=0.0, cutmix_alpha=0.0, prob=0.0, switch_prob=0.0, mode="batch", label_smoothing=0.0)


def _check_run(run: Run) -> None:
    """Refuse what only training a trunk has a use for."""
    given, remedy = run.attention_interval, "Draw its attention with `vitcomposer attention`."
    require(given is None, "run.attention_interval", "null for a trunk that does not learn", given, remedy)


@dataclass(frozen=True, kw_only=True)
class KNN:
    """Weighted nearest neighbours (Wu et al., arXiv:1805.01978; DINO, arXiv:2104.14294): weights exp(cosine / T)."""

    k: list[int]
    temperature: float
    train_samples: int | None = None  # a random subset of the training split as neighbours; null: all of it
    interval: str = "10ep"  # of the monitor, which also measures before the first step and at the end

    def check(self, key: str) -> None:
        """Refuse values that no measurement has; ``key`` is what the yaml calls this block."""
        check_interval(f"{key}.interval", self.interval)
        fits, remedy = bool(self.k) and 1 <= min(self.k) <= max(self.k) <= 10**6, "Use [10, 20, 100, 200]."
        require(fits, f"{key}.k", "numbers of 1 or more, up to a million", self.k, remedy)
        require_within(f"{key}.temperature", self.temperature, 0.001, 1000, "Use 0.07.")
        size = self.train_samples
        rule, remedy = f"at least {max(self.k)}, the largest k", "null takes the whole split."
        require(size is None or max(1, *self.k) <= size <= 10**9, f"{key}.train_samples", rule, size, remedy)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Linear classifiers on a frozen trunk, all trained in one pass: every feature with every factor and norm."""

    features: list[str]  # lastCLS, concatCLS<n>, mean, pooled
    lr_factors: list[float]  # of the peak learning rate
    batch_norm: list[bool]  # whether a batch norm without parameters comes before the classifier

    def __post_init__(self) -> None:
        for name in ("features", "lr_factors", "batch_norm"):
            given = getattr(self, name)
            remedy = "Each combination of the three lists is a head."
            require(bool(given), f"heads.{name}", "one or more", given, remedy)
            require(len(set(given)) == len(given), f"heads.{name}", "different from each other", given, remedy)
        remedy = "1 is the learning rate of the block optimizer."
        require(min(self.lr_factors) > 0, "heads.lr_factors", "above 0", self.lr_factors, remedy)
        require_within("heads.lr_factors", self.lr_factors, 1e-6, 1e6, remedy)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Train linear classifiers on the frozen features of a trunk."""

    recipe: Literal["probe"]
    seed: int
    max_duration: str  # Composer time string: 100ep
    global_train_batch_size: int  # images per step over all devices
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16"]
    model: Model
    data: Data
    augment: Augment
    heads: Heads
    evaluation: Evaluation
    optimizer: Optimizer
    schedule: Schedule
    init: Init = field(default_factory=Init)
    run: Run

    def __post_init__(self) -> None:
        check_steps(self, usual="DINO uses 1024.")
        with noting():
            require_within("model.num_classes", self.model.num_classes, 2, 10**7, "Count your classes.")
        with noting():
            check_balance(self.data, self.augment)
        self.init.check_no_blocks(self.recipe)
        _check_run(self.run)

    @property
    def mixing(self) -> Mixing:
        """Off: a linear classifier is trained on the labels as they are."""
        return NO_MIXING

    @property
    def algorithms(self) -> dict[str, dict[str, Any]]:
        """None: the protocol has one way to train the heads."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """Measure the features of a trunk by their nearest neighbours; nothing is trained."""

    recipe: Literal["knn"]
    seed: int  # of the subset knn.train_samples
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16"]
    model: Model
    data: Data
    evaluation: Evaluation
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    knn: KNN
    init: Init = field(default_factory=Init)
    run: Run

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        check_colors("", self.mean, self.std)
        self.knn.check("knn")
        check_no_balance(self.data, self.recipe)
        self.init.check_no_blocks(self.recipe)
        size, remedy = self.evaluation.global_batch_size, "There is no training batch to follow: use 256."
        require(size is not None, "evaluation.global_batch_size", "a number of images", size, remedy)
        given, remedy = self.model.num_classes, "The features before the head are compared."
        require(given == 0, "model.num_classes", "0", given, remedy)
        _check_run(self.run)
        for name, off in (("compile", False), ("activation_checkpointing", 0.0), ("sharded_checkpoints", False)):
            given, rule = getattr(self.run, name), "left out in the recipe knn, which takes no step"
            require(given == off, f"run.{name}", rule, given, "Drop it.")

    @property
    def global_train_batch_size(self) -> int:
        """Images that all devices take at once."""
        assert self.evaluation.global_batch_size is not None
        return self.evaluation.global_batch_size

    @property
    def max_duration(self) -> str:
        """No step is taken."""
        return NO_STEP

    @property
    def algorithms(self) -> dict[str, dict[str, Any]]:
        """None: no step is taken."""
        return {}
