"""Chooses the settings that fit a data set by stated rules: the table of docs/your_data.md, with its reasons."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from vitcomposer.data.labels import UNEQUAL
from vitcomposer.survey.photos import Survey

_Value = TypeVar("_Value")

PRETRAINED, FROM_SCRATCH, UNLABELLED = "finetune_photos", "photos_scratch", "dino_vit_s"  # pages of yamls/
SMALL, MEDIUM = 10_000, 100_000  # training images
FEW = 300
_EPOCHS = {SMALL: 30, MEDIUM: 15, math.inf: 8}  # with pre-trained weights, below that many training images
_CROPS = {SMALL: 0.35, MEDIUM: 0.2, math.inf: 0.08}  # least share of the area, likewise
MINUTES = 10.0  # of a run from scratch, unless --minutes says otherwise
PER_MINUTE = 30_000  # images that one core trains of it, 500 a second: an AMD EPYC with one thread, evaluation included
_SCRATCH_EPOCHS = (5, 500)
MANY_PASSES = 100  # epochs from scratch, from which on images are mixed: the network would know them by heart
SEEN = 240_000  # images that a run without classes sees, within these epochs
_UNLABELLED_EPOCHS = (30, 300)
BALANCED = 10  # training images of the largest class over those of the smallest, above which they are balanced
LARGEST_BATCH = 64
_STEPS = {PRETRAINED: 10, FROM_SCRATCH: 7, UNLABELLED: 10}  # of an epoch, at least
_SIZES = {PRETRAINED: (16, 96, 224), FROM_SCRATCH: (16, 32, 96)}  # patch, smallest and largest image in pixels
_PATCH = 12  # of the small network without classes; its small crops are half an image
_SIDES = (4 * _PATCH, 8 * _PATCH)


@dataclass
class Choice:
    """A page of ``yamls/`` and what differs from it: values as yaml text, with a reason for each."""

    page: str
    values: dict[str, tuple[str, str]] = field(default_factory=dict)
    image_size: int = 0  # pixels
    epochs: int = 0
    batch: int = 0  # images a step
    reasons: list[str] = field(default_factory=list)

    def set(self, key: str, value: object, reason: str) -> None:
        """Give a key of the yaml its value."""
        self.values[key] = str(value), reason


def choose(found: Survey, *, pretrained: bool, minutes: float = MINUTES) -> Choice:
    """The settings for a data set with classes.

    Args:
        found: What it holds.
        pretrained: Whether the weights that the page of that name starts from are there.
        minutes: That a run from scratch shall take on one core; not of a run from pre-trained weights.
    """
    choice = Choice(PRETRAINED if pretrained else FROM_SCRATCH)
    count = found.training_images
    choice.set("model.num_classes", "null", f"as many as the data set has, {len(found.class_names)} now")
    _choose_size(choice, found)
    _choose_batch(choice, count)
    if pretrained:
        _choose_length(choice, count)
        _choose_tuning(choice, count)
    else:
        _choose_stages(choice)
        _choose_epochs_of(choice, count, minutes)
    _choose_balance(choice, found.imbalance)
    return choice


def choose_unlabelled(found: Survey) -> Choice:
    """The settings for images without classes: DINO, of a network that fits their number."""
    choice, count = Choice(UNLABELLED), found.training_images
    choice.set("monitor", "null", "nearest neighbours need classes")
    if count < MEDIUM:
        _choose_small_network(choice, found)
        _choose_batch(choice, count)
        _choose_epochs_seen(choice, count)
        choice.set("schedule.t_warmup", "0.1dur", "a tenth of the run")
        choice.reasons.append(f"no classes -> DINO; under {MEDIUM:,} images -> a small network, {choice.image_size} px")
    else:
        choice.image_size, choice.epochs, choice.batch = 224, 100, 512  # as the page has them
        choice.reasons.append(f"no classes -> DINO; {MEDIUM:,} images or more -> ViT-S as its paper has it")
    return choice


def _choose_small_network(choice: Choice, found: Survey) -> None:
    smallest, largest = _SIDES
    side = min(found.size)
    choice.image_size = size = min(max(side // (2 * _PATCH) * 2 * _PATCH, smallest), largest)
    choice.set("model.name", "vit_tiny_patch16", f"under {MEDIUM:,} images")
    choice.set("model.patch_size", _PATCH, f"for images of at most {largest} pixels")
    choice.set("model.depth", 6, "half of ViT-Ti's: a size that a CPU can train")
    choice.set("model.image_size", size, f"the median shorter side is {side:,}; from {smallest} to {largest}")
    choice.set("head.out_dim", 4096, "the paper's 65,536 are for 1.28 million images")
    choice.set("crops.total_num_crops", 6, "the paper has 10")
    choice.set("crops.num_crops", "[1, 1, 4]", "two large ones and four small ones")
    choice.set("crops.size_crops", f"[{size}, {size}, {size // 2}]", "small ones have half the side")


def _choose_size(choice: Choice, found: Survey) -> None:
    patch, smallest, largest = _SIZES[choice.page]
    side = min(found.size)
    choice.image_size = min(max(side // patch * patch, smallest), largest)
    reason = f"the median shorter side is {side:,}"
    choice.set("model.image_size", choice.image_size, f"{reason}; from {smallest} to {largest}")


def _choose_batch(choice: Choice, count: int) -> None:
    steps = _STEPS[choice.page]
    fitting = 2 ** int(math.log2(max(count / steps, 1)))
    choice.batch = min(max(fitting, min(4, count)), LARGEST_BATCH)
    reason = f"{LARGEST_BATCH}, or what gives {steps} steps an epoch"
    choice.set("global_train_batch_size", choice.batch, f"{reason} ({count:,} training images)")


def _choose_length(choice: Choice, count: int) -> None:
    choice.epochs, limit = _by_size(_EPOCHS, count)
    choice.reasons.append(f"{limit} images -> {choice.epochs} epochs from pre-trained weights")
    choice.set("max_duration", f"{choice.epochs}ep", f"{limit} training images, from pre-trained weights")


def _choose_stages(choice: Choice) -> None:
    """Sizes that go with that of the network, whose patches they are multiples of."""
    patch, size = _SIZES[choice.page][0], choice.image_size
    first = max(2 * size // 3 // patch * patch, patch)
    stages = f"{{image_sizes: [{first}, {size}], compute: [0.4, 0.6]}}"
    choice.set("algorithms.Curriculum", stages, "smaller images first: more of them in the same time")
    choice.set("evaluation.image_size", size + patch, "crops show things larger than the whole image does")


def _choose_epochs_of(choice: Choice, count: int, minutes: float) -> None:
    """As many as one core trains in that time."""
    least, most = _SCRATCH_EPOCHS
    choice.epochs = min(max(round(minutes * PER_MINUTE / count), least), most)
    spent = choice.epochs * count / PER_MINUTE
    choice.set("max_duration", f"{choice.epochs}ep", f"about {spent:.1f} minutes of a core that trains 500 images/s")
    if choice.epochs >= MANY_PASSES:
        choice.set("mixing.cutmix_alpha", "1.0", f"{MANY_PASSES} epochs or more")
        choice.set("mixing.switch_prob", "1.0", "CutMix alone")
        choice.set("mixing.prob", "0.5", "of the batches")
    choice.reasons.append(f"no pre-trained weights -> a small ConViT, about {spent:.1f} minutes of a core (--minutes)")


def _choose_epochs_seen(choice: Choice, count: int) -> None:
    least, most = _UNLABELLED_EPOCHS
    choice.epochs = min(max(round(SEEN / count / 10) * 10, least), most)
    reason = f"about {SEEN:,} images are seen, in {least} to {most} epochs"
    choice.set("max_duration", f"{choice.epochs}ep", reason)


def _choose_balance(choice: Choice, imbalance: float) -> None:
    if imbalance > UNEQUAL:
        choice.reasons.append(f"{imbalance:.0f}:1 imbalance -> the mean of the classes' accuracies is told first")
    if imbalance > BALANCED:
        choice.set("data.balance", "sqrt", f"{imbalance:.0f}:1 training images of the largest class to the smallest")
        choice.reasons[-1] += ", and classes are shown by the square root of their number"


def _choose_tuning(choice: Choice, count: int) -> None:
    least, limit = _by_size(_CROPS, count)
    choice.set("augment.crop_scale", f"[{least}, 1.0]", f"{limit} training images")
    if count < FEW:
        choice.set("init.train_blocks", 4, f"under {FEW} training images: the last third alone learns")
        choice.reasons.append(f"under {FEW} training images -> the last 4 of 12 blocks learn")


def _by_size(table: Mapping[float, _Value], count: int) -> tuple[_Value, str]:
    """The value of the first row that a number of images is below, and that row in words."""
    limit = next(limit for limit in table if count < limit)
    return table[limit], f"under {limit:,}" if math.isfinite(limit) else f"{MEDIUM:,} or more"
