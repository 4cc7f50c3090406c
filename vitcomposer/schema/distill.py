"""The keys of a yaml of the recipe ``distill``: those of ``supervised``, a teacher and what is learned from it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vitcomposer.errors import require, require_within
from vitcomposer.schema.blocks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_IMAGE_SIZE,
    check_colors,
    require_plain_address,
)
from vitcomposer.schema.supervised import Supervised


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A trained classifier of the same classes, frozen. ``name`` is one of ours or of timm's, ``timm/NAME``."""

    name: str
    weights: str  # file with all of its weights, read without running code in it
    image_size: int | None = None  # pixels; null: model.image_size
    options: dict[str, Any] = field(default_factory=dict)  # what differs from the published network, as in model
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] | None = None  # null: the run's

    def __post_init__(self) -> None:
        require_within("teacher.image_size", self.image_size, 1, MAX_IMAGE_SIZE, "null is the student's.")
        check_colors("teacher.", self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """DeiT's two ways (arXiv:2012.12877, section 4): ``(1 - alpha) * label loss + alpha * teacher loss``.

    hard: cross-entropy with the teacher's best class. soft: ``temperature ** 2`` times the KL divergence of the
    softened outputs; ``kl: batch`` divides its sum by the images, as the paper's equation 2, ``kl: elements`` by images
    times classes, as its code does.
    """

    kind: Literal["hard", "soft"]
    alpha: float
    temperature: float
    kl: Literal["batch", "elements"]
    teacher_sees: Literal["mixed", "unmixed"]  # unmixed: each image by itself, and its answers are mixed as labels are

    def __post_init__(self) -> None:
        remedy = "DeiT uses 0.5 with hard, its paper 0.1 with soft."
        require(0 <= self.alpha <= 1, "distillation.alpha", "in [0, 1]", self.alpha, remedy)
        require_within("distillation.temperature", self.temperature, 0.001, 1000, "DeiT's paper uses 3.")


@dataclass(frozen=True, kw_only=True)
class TeacherCache:
    """The teacher's answers to fixed views of every image, written by ``vitcomposer cache-teacher``."""

    local: str  # folder, or the cache of remote
    remote: str | None = None

    def __post_init__(self) -> None:
        require_plain_address("cache.remote", self.remote)


@dataclass(frozen=True, kw_only=True)
class Distill(Supervised):
    """Train a classifier from labels and a teacher: DeiT."""

    recipe: Literal["distill"]  # pyright: ignore[reportIncompatibleVariableOverride]
    teacher: Teacher
    distillation: Distillation
    cache: TeacherCache | None = None  # null: the teacher runs beside the student

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices()
        sees = self.distillation.teacher_sees
        mixes = self.mixing.mixup_alpha > 0 or self.mixing.cutmix_alpha > 0
        fits = self.cache is None or not mixes or sees == "unmixed"
        remedy = "Set distillation.teacher_sees=unmixed."
        require(fits, "distillation.teacher_sees", "unmixed with a cache, whose views are of one image", sees, remedy)

    def _check_choices(self) -> None:
        """Refuse those that say nothing."""
        chosen = self.distillation
        rule, remedy = "above 0, or the teacher works for nothing", "Use recipe: supervised to learn from labels alone."
        require(chosen.alpha > 0, "distillation.alpha", rule, chosen.alpha, remedy)
        rule = "below 1 with a distilled model, whose class head would learn nothing"
        fits = chosen.alpha < 1 or "distilled" not in self.model.name
        require(fits, "distillation.alpha", rule, chosen.alpha, "Use the name without _distilled.")
        fits = chosen.kind == "soft" or chosen.temperature == 1
        rule = "1 with kind: hard, which does not depend on it"
        require(fits, "distillation.temperature", rule, chosen.temperature, "Set distillation.temperature=1.")
        stages = self.algorithms.get("Curriculum")
        rule = "left out with a cache, whose views are all of model.image_size"
        require(not (self.cache and stages), "algorithms.Curriculum", rule, stages, "Drop it, or set cache=null.")
