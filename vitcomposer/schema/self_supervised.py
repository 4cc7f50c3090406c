"""The keys that all recipes without labels share: ``swav``, ``simclr``, ``moco`` and ``dino``."""

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
    Optimizer,
    Run,
    Schedule,
    check_colors,
)
from vitcomposer.schema.model import Init, Model
from vitcomposer.schema.probe import KNN
from vitcomposer.schema.recipe import check_no_balance, check_steps

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

    @property
    def pixels(self) -> int:
        """Of all crops of an image."""
        return sum(size**2 for size in self.sizes)


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
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16"]
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
            check_no_balance(self.data, self.recipe)
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


def check_dims(key: str, dims: list[int]) -> None:
    fits = len(dims) >= 2 and 1 <= min(dims) <= max(dims) <= 10**6
    require(fits, key, "two or more widths", dims, "Give input, hidden and output widths: [384, 2048, 128].")


def require_pair(recipe: SelfSupervised) -> None:
    """Two views of an image, and other images that they are told from."""
    batch, crops = recipe.global_train_batch_size, recipe.crops
    rule = "2 or more: a view is told from those of other images"
    require(batch >= 2, "global_train_batch_size", rule, batch, "SimCLR and MoCo-v3 use 4096.")
    given, remedy = crops.sizes, "Use num_crops [2] and one size, or two groups of one crop and one size."
    require(len(given) == 2 and len(set(given)) == 1, "crops.num_crops", "two crops of one size", given, remedy)
