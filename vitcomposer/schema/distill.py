"""The yaml of the recipe ``distill``: that of ``supervised``, a teacher and what is learned from it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from vitcomposer.schema.blocks import IMAGENET_MEAN, IMAGENET_STD, require, require_plain_address
from vitcomposer.schema.supervised import Supervised


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A trained classifier of the same classes, frozen. ``name`` is one of ours or of timm's."""

    name: str
    weights: str  # file with all of its weights, read without running code in it
    image_size: int | None = None  # pixels; null: model.image_size
    options: dict[str, Any] = field(default_factory=dict)  # what differs from the published network, as in model
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] | None = None  # null: the run's

    def __post_init__(self) -> None:
        size = self.image_size
        require(size is None or size >= 1, "teacher.image_size", "a number of pixels", size, "null is the student's.")
        require(all(s > 0 for s in self.std), "teacher.std", "positive", self.std, "Use the ImageNet values.")


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
        remedy = "DeiT's paper uses 3."
        require(self.temperature > 0, "distillation.temperature", "above 0", self.temperature, remedy)


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
        sees = self.distillation.teacher_sees
        mixes = self.mixing.mixup_alpha > 0 or self.mixing.cutmix_alpha > 0
        fits = self.cache is None or not mixes or sees == "unmixed"
        remedy = "Set distillation.teacher_sees=unmixed."
        require(fits, "distillation.teacher_sees", "unmixed with a cache, whose views are of one image", sees, remedy)
