"""The yamls that train a trunk without labels: of the recipes ``swav``, ``simclr``, ``moco`` and ``dino``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vitcomposer.errors import noting, require, require_within
from vitcomposer.schema.algorithms import check_algorithms, check_company, check_schedule_free
from vitcomposer.schema.blocks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_IMAGE_SIZE,
    Data,
    Evaluation,
    Init,
    Model,
    Optimizer,
    Run,
    Schedule,
    check_colors,
)
from vitcomposer.schema.probe import KNN
from vitcomposer.schema.times import check_steps

MAX_CROPS = 100  # of an image


@dataclass(frozen=True, kw_only=True)
class Crops:
    """The views of one image, in groups: VISSL's ``ImgPilToMultiCrop`` with what happens to each crop's colours.

    Group g is ``num_crops[g]`` random resized crops of ``size_crops[g]`` pixels with an area in ``crop_scales[g]``.
    Crops are numbered in the order of the groups, large ones first, so 0 and 1 are the two large ones. Two views that
    differ in blur or solarize only are two groups of one crop.
    """

    total_num_crops: int
    num_crops: list[int]
    size_crops: list[int]  # pixels
    crop_scales: list[list[float]]  # least and greatest share of the image's area, [0.14, 1.0]
    interpolation: Literal["bicubic", "bilinear"]
    flip_prob: float
    color_jitter: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    jitter_prob: float
    gray_prob: float
    blur_prob: list[float]  # of each group
    solarize_prob: list[float]  # of each group
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        groups = len(self.num_crops)
        for name in ("size_crops", "crop_scales", "blur_prob", "solarize_prob"):
            given = len(getattr(self, name))
            rule = f"as long as crops.num_crops, {groups}"
            require(given == groups, f"crops.{name}", rule, given, "Give one entry for each group of crops.")
        fits = groups > 0 and min(self.num_crops) > 0 and sum(self.num_crops) <= MAX_CROPS
        rule = f"one or more crops a group, at most {MAX_CROPS} in all"
        require(fits, "crops.num_crops", rule, self.num_crops, "Use [2, 4].")
        total, remedy = sum(self.num_crops), "Change it together with crops.num_crops."
        rule = f"{total}, the sum of crops.num_crops"
        require(self.total_num_crops == total, "crops.total_num_crops", rule, self.total_num_crops, remedy)
        remedy = "Two views of an image are compared."
        require_within("crops.total_num_crops", self.total_num_crops, 2, MAX_CROPS, remedy)
        require_within("crops.size_crops", self.size_crops, 1, MAX_IMAGE_SIZE, "Use [160, 96].")
        fits = all(len(scale) == 2 and 1e-6 <= scale[0] <= scale[1] <= 1 for scale in self.crop_scales)
        remedy = "Use [[0.08, 1.0], [0.05, 0.14]]."
        require(fits, "crops.crop_scales", "pairs with 0 < low <= high <= 1", self.crop_scales, remedy)
        fits = 0 <= min(self.color_jitter) <= max(self.color_jitter) <= 10 and self.color_jitter[3] <= 0.5
        remedy = "SwAV uses [0.8, 0.8, 0.8, 0.2]."
        require(fits, "crops.color_jitter", "from 0 to 10, hue at most 0.5", self.color_jitter, remedy)
        require_within(
            "crops.flip_prob", self.flip_prob, 0, 1, "Use 0.5, or 0 where left and right differ (digits, text)."
        )
        require_within("crops.jitter_prob", self.jitter_prob, 0, 1, "Use 0.8.")
        require_within("crops.gray_prob", self.gray_prob, 0, 1, "Use 0.2.")
        for name in ("blur_prob", "solarize_prob"):
            for value in getattr(self, name):
                require_within(f"crops.{name}", value, 0, 1, "Use 0.5, or 0 to switch it off.")
        check_colors("crops.", self.mean, self.std)

    @property
    def sizes(self) -> list[int]:
        """Pixels of each crop."""
        groups = zip(self.num_crops, self.size_crops, strict=True)
        return [size for count, size in groups for _ in range(min(count, MAX_CROPS))]  # more are refused


@dataclass(frozen=True, kw_only=True)
class SelfSupervised:
    """What every recipe without labels has; each adds its ``head`` and ``loss``.

    ``recipe`` is each one's own name. ``model.num_classes`` is 0: the trunk ends in its pooled features. ``sync_bn``
    says whose statistics the batch norms of trunk and head share: none, global, node, or that many neighbouring ranks
    (all of them where there are fewer); VISSL's 0 is global and its -1 node.
    """

    recipe: str
    seed: int
    max_duration: str  # Composer time string: 300ep, 1000ba
    global_train_batch_size: int  # images, not crops, per step over all devices
    precision: Literal["fp32", "amp_bf16", "amp_fp16"]
    model: Model
    sync_bn: str | int
    data: Data
    crops: Crops
    optimizer: Optimizer
    schedule: Schedule
    evaluation: Evaluation  # how the monitor sees images
    monitor: KNN | None  # nearest neighbours in the features of the trunk while it trains; null: none
    algorithms: dict[str, dict[str, Any]] = field(default_factory=dict)  # Composer's names
    init: Init = field(default_factory=Init)
    run: Run

    def __post_init__(self) -> None:
        check_steps(self, usual="SwAV uses 4096.")
        with noting():
            check_algorithms(self.algorithms, staged=False)
        with noting():
            rule = "left out of a recipe without labels, whose monitor measures the trunk and not an average of it"
            remedy = "Leave it out; the teacher of the recipe dino is an average, and measured."
            given = self.algorithms.get("EMA")
            require("EMA" not in self.algorithms, "algorithms.EMA", rule, given, remedy)
        with noting():
            check_company(self.algorithms, loss=self.recipe, precision=self.precision, label_smoothing=0.0)
            check_schedule_free(self.optimizer, self.schedule, self.algorithms)
        with noting():
            self.init.check_no_blocks(self.recipe)
            given, remedy = self.model.num_classes, "The head without labels is in the block head."
            require(given == 0, "model.num_classes", "0", given, remedy)
        named = self.sync_bn in ("none", "global", "node")
        named = named or (isinstance(self.sync_bn, int) and -1 <= self.sync_bn <= 10**6)
        require(named, "sync_bn", "none, global, node or a number of ranks", self.sync_bn, "Use global.")
        with noting():
            if self.monitor is not None:
                self.monitor.check("monitor")


@dataclass(frozen=True, kw_only=True)
class SwAVHead:
    """Multi-layer perceptron, then a bias-free linear layer of prototypes for each number in ``num_clusters``."""

    dims: list[int]  # input, hidden ..., output widths: [2048, 2048, 128]
    batch_norm: bool
    num_clusters: list[int]

    def __post_init__(self) -> None:
        _check_dims("head.dims", self.dims)
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


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Multi-layer perceptron over the features of the trunk."""

    dims: list[int]  # input, hidden ..., output widths: [768, 3072, 128]
    batch_norm: bool

    def __post_init__(self) -> None:
        _check_dims("head.dims", self.dims)


@dataclass(frozen=True, kw_only=True)
class InfoNCE:
    """Which of the other images' views is the partner (arXiv:2002.05709, section 2.1)."""

    temperature: float

    def __post_init__(self) -> None:
        require_within("loss.temperature", self.temperature, 0.001, 1000, "SimCLR uses 0.1.")


@dataclass(frozen=True, kw_only=True)
class SimCLR(SelfSupervised):
    """A simple framework for contrastive learning (arXiv:2002.05709)."""

    recipe: Literal["simclr"]
    head: Projection
    loss: InfoNCE

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_pair(self)


@dataclass(frozen=True, kw_only=True)
class MoCoHead:
    """Projector after the trunk and predictor after that, both with batch norm (arXiv:2104.02057, section 4)."""

    projector_dims: list[int]  # [384, 4096, 4096, 256]
    predictor_dims: list[int]  # [256, 4096, 256]

    def __post_init__(self) -> None:
        _check_dims("head.projector_dims", self.projector_dims)
        _check_dims("head.predictor_dims", self.predictor_dims)
        out = self.projector_dims[-1]
        fits = self.predictor_dims[0] == self.predictor_dims[-1] == out
        rule = f"from and to {out}, the end of head.projector_dims"
        require(fits, "head.predictor_dims", rule, self.predictor_dims, f"Use [{out}, 4096, {out}].")


@dataclass(frozen=True, kw_only=True)
class MoCoObjective:
    """Contrast with the keys of a momentum encoder."""

    temperature: float
    momentum: float  # of the momentum encoder at the first step; a cosine takes it to 1
    freeze_patch_projection: bool

    def __post_init__(self) -> None:
        require_within("loss.temperature", self.temperature, 0.001, 1000, "MoCo-v3 uses 0.2.")
        require_within("loss.momentum", self.momentum, 0, 1, "MoCo-v3 uses 0.99.")


@dataclass(frozen=True, kw_only=True)
class MoCo(SelfSupervised):
    """Momentum contrast, version 3 (arXiv:2104.02057)."""

    recipe: Literal["moco"]
    head: MoCoHead
    loss: MoCoObjective

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_pair(self)


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


def _check_dims(key: str, dims: list[int]) -> None:
    fits = len(dims) >= 2 and 1 <= min(dims) <= max(dims) <= 10**6
    require(fits, key, "two or more widths", dims, "Give input, hidden and output widths: [384, 2048, 128].")


def _require_pair(recipe: SimCLR | MoCo) -> None:
    """Two views of an image, and other images that they are told from."""
    batch, crops = recipe.global_train_batch_size, recipe.crops
    rule = "2 or more: a view is told from those of other images"
    require(batch >= 2, "global_train_batch_size", rule, batch, "SimCLR and MoCo-v3 use 4096.")
    given, remedy = crops.sizes, "Use num_crops [2] and one size, or two groups of one crop and one size."
    require(len(given) == 2 and len(set(given)) == 1, "crops.num_crops", "two crops of one size", given, remedy)
