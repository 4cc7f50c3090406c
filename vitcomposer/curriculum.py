"""Plans which image size and which share of the patches each training step sees, and counts what the run costs.

``algorithms.Curriculum`` raises the image size in stages, as EfficientTrain++ does (arXiv:2405.08768): small images
first, for a given share of the run's compute each. ``algorithms.PatchDropout`` leaves the size and lets the network see
a share of the patches. ``max_duration`` keeps its meaning, passes over the data, so both make a run of the same length
cheaper; how much is exact and printed.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vitcomposer.errors import ConfigError, did_you_mean, require

if TYPE_CHECKING:  # `convert --for` reads the stages without a network
    from torch import nn

MAX_STAGES = 4  # each is a compiled graph, and torch gives up after eight with those of the evaluation


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Arguments of ``algorithms.Curriculum``.

    Args:
        image_sizes: Pixels, ascending; the last is that of the model.
        compute: Share of the run's training FLOPs that each size gets; their sum is 1.
        rand_augment_from: Factor on RandAugment's magnitude at the first step; at the last it is 1.
        rand_augment_levels: Number of factors, at equal distances, each for the same share of the compute.
    """

    image_sizes: Sequence[int]
    compute: Sequence[float]
    rand_augment_from: float = 1.0
    rand_augment_levels: int = 10  # of EfficientTrain++, whose magnitudes are 0, 1, ..., 9

    def __post_init__(self) -> None:
        key = "algorithms.Curriculum."
        sizes, compute, strength = self.image_sizes, self.compute, self.rand_augment_from
        ascending = _are_numbers(sizes) and all(isinstance(size, int) for size in sizes) and _ascend([0, *sizes])
        rule, remedy = f"2 to {MAX_STAGES} whole numbers of pixels, ascending", "Use [96, 160, 192, 224]."
        require(ascending and 2 <= len(sizes) <= MAX_STAGES, f"{key}image_sizes", rule, sizes, remedy)
        shares = _are_numbers(compute) and len(compute) == len(sizes) and all(share > 0 for share in compute)
        rule, remedy = f"{len(sizes)} shares above 0 whose sum is 1, one for each size", "Use [0.2, 0.4, 0.2, 0.2]."
        require(shares and abs(sum(compute) - 1) < 1e-6, f"{key}compute", rule, compute, remedy)
        is_factor = _are_numbers([strength]) and 0 <= strength <= 1
        remedy = "EfficientTrain++ uses 0.0; 1.0 leaves RandAugment as it is."
        require(is_factor, f"{key}rand_augment_from", "in [0, 1]", strength, remedy)
        levels, rule = self.rand_augment_levels, "a whole number above 1"
        is_count = isinstance(levels, int) and not isinstance(levels, bool) and levels > 1
        require(is_count, f"{key}rand_augment_levels", rule, levels, "EfficientTrain++ uses 10.")


@dataclass(frozen=True, kw_only=True)
class PatchDropout:
    """Arguments of ``algorithms.PatchDropout``.

    Args:
        keep_rates: Share of the patches that the network sees at each level, ascending.
        until: Share of the run's steps at which each level ends, ascending; the last is 1.
    """

    keep_rates: Sequence[float]
    until: Sequence[float]

    def __post_init__(self) -> None:
        key = "algorithms.PatchDropout."
        rates, until = self.keep_rates, self.until
        fit = _are_numbers(rates) and 1 <= len(rates) <= MAX_STAGES and _ascend([0, *rates]) and rates[-1] <= 1
        rule = f"1 to {MAX_STAGES} shares in (0, 1], ascending"
        require(fit, f"{key}keep_rates", rule, rates, "Use [0.5, 0.75, 1.0].")
        fit = _are_numbers(until) and len(until) == len(rates) and _ascend([0, *until]) and until[-1] == 1
        rule = f"{len(rates)} shares of the run, ascending to 1, one for each keep rate"
        require(fit, f"{key}until", rule, until, "Use [0.4, 0.8, 1.0].")


Options = Curriculum | PatchDropout
_OPTIONS: dict[str, type[Options]] = {"Curriculum": Curriculum, "PatchDropout": PatchDropout}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps in a row that see images of one size and a given number of patches.

    Args:
        num_patches_kept: None where all are.
        train_flops_per_image: Forward and backward pass.
    """

    first_step: int
    steps: int
    image_size: int
    num_patches_kept: int | None
    train_flops_per_image: float


class Plan:
    """The stages of a run, in order; a run without Curriculum and PatchDropout has one.

    Args:
        steps_per_epoch: Batches of one pass over the data.
        images_per_step: Over all devices.
        full_flops: Of one training image at the model's size with all its patches.
        rand_augment_from, rand_augment_levels: See Curriculum.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        steps_per_epoch: int,
        images_per_step: int,
        full_flops: float,
        rand_augment_from: float = 1.0,
        rand_augment_levels: int = 10,
    ) -> None:
        self.stages = tuple(stages)
        self.steps = sum(stage.steps for stage in stages)
        self.steps_per_epoch = steps_per_epoch
        self.images_per_step = images_per_step
        self.full_flops = full_flops
        self.rand_augment_from = rand_augment_from
        self.rand_augment_levels = rand_augment_levels
        self._first_steps = [stage.first_step for stage in stages]

    def stage_of(self, step: int) -> Stage:
        """The stage of a step, which is Composer's ``timestamp.batch``; after the last step the last stage."""
        return self.stages[bisect_right(self._first_steps, step) - 1]

    def train_flops_per_image(self, step: int) -> float:
        """FLOPs of one image in the forward and backward pass of a step."""
        return self.stage_of(step).train_flops_per_image

    def compute_share(self, step: float) -> float:
        """Share of the run's training FLOPs that is spent when a step begins; a fraction of a step counts as such."""
        flops = [stage.steps * stage.train_flops_per_image for stage in self.stages]
        if not sum(flops):  # of a network that costs nothing
            return min(1.0, step / self.steps)
        done = [max(0.0, min(1.0, (step - stage.first_step) / stage.steps)) for stage in self.stages]
        return sum(share * cost for share, cost in zip(done, flops, strict=True)) / sum(flops)

    def rand_augment(self, step: int) -> float:
        """The factor on RandAugment's magnitude, which grows by the same amount after equal shares of the compute."""
        highest = self.rand_augment_levels - 1
        # By the middle of the step: whole steps leave the beginning of a stage a fraction of one off its share.
        level = min(highest, int(self.rand_augment_levels * self.compute_share(step + 0.5)))
        return self.rand_augment_from + (1 - self.rand_augment_from) * level / highest

    def view(self, step: int) -> tuple[int, float]:
        """What the loader makes for a step: image size and factor on RandAugment's magnitude."""
        return self.stage_of(step).image_size, self.rand_augment(step)

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.steps / self.steps_per_epoch

    @property
    def equal_compute_epochs(self) -> float:
        """Passes at the model's size with all patches that would cost the same training FLOPs."""
        return sum(s.steps * s.train_flops_per_image for s in self.stages) / (self.full_flops * self.steps_per_epoch)

    def table(self) -> str:
        """The accounting of the run: a line for each stage and a sum."""
        total = self.images_per_step * sum(stage.steps * stage.train_flops_per_image for stage in self.stages)
        lines = ["  pixels  patches  from step      steps   epochs        images  GFLOPs/image       FLOPs   share"]
        for s in self.stages:
            images = s.steps * self.images_per_step
            flops = images * s.train_flops_per_image
            lines.append(
                f"  {s.image_size:6}  {s.num_patches_kept or 'all':>7}  {s.first_step:9,}  {s.steps:9,}  "
                f"{s.steps / self.steps_per_epoch:7.2f}  {images:12,}  {s.train_flops_per_image / 1e9:12.4f}  "
                f"{flops:10.4e}  {flops / total if total else 0:6.2%}"
            )
        saved = self.epochs / self.equal_compute_epochs if total else 1.0
        lines.append(
            f"  {self.epochs:.2f} epochs of images for the training FLOPs of {self.equal_compute_epochs:.2f} at full "
            f"size: {saved:.2f}x cheaper"
        )
        return "\n".join(lines)


def split_options(algorithms: Mapping[str, Mapping[str, Any]]) -> tuple[Options | None, dict[str, Mapping[str, Any]]]:
    """What of the block ``algorithms`` plans the stages, checked, and the algorithms that are left.

    Raises:
        ConfigError: An argument that is unknown, missing or out of range, or Curriculum together with PatchDropout.
    """
    found = [name for name in algorithms if name in _OPTIONS]
    remedy = "Both save by showing fewer tokens, and their gains do not add up: choose one."
    require(len(found) < 2, "algorithms.PatchDropout", "left out with algorithms.Curriculum", found, remedy)
    others = {name: arguments for name, arguments in algorithms.items() if name not in found}
    return (_read(found[0], algorithms[found[0]]) if found else None), others


def _read(name: str, arguments: Mapping[str, Any]) -> Options:
    cls, key = _OPTIONS[name], f"algorithms.{name}"
    known = [field.name for field in fields(cls)]
    for argument in arguments:
        if argument not in known:
            hint = did_you_mean(argument, known)
            raise ConfigError(f"{key}.{argument} must be one of the arguments {known}.{hint} Mend the name.")
    for argument in known[:2]:
        require(argument in arguments, f"{key}.{argument}", "given", None, f"{name} needs {known[0]} and {known[1]}.")
    return cls(**arguments)


def check_network(options: Options | None, network: "nn.Module", *, image_size: int, rand_augment: str | None) -> None:
    """Whether the stages fit the network, and a RandAugment string what is asked of it.

    Args:
        image_size: The network's, of ``model.image_size``.

    Raises:
        ConfigError: The argument that does not fit.
    """
    if isinstance(options, PatchDropout):
        rule = "left out where positions attend as one matrix for the batch (ConViT), or where there are no patches"
        has_patches = hasattr(network, "num_patches_kept")
        require(has_patches, "algorithms.PatchDropout", rule, type(network).__name__, "Use algorithms.Curriculum.")
    if not isinstance(options, Curriculum):
        return
    key, sizes = "algorithms.Curriculum.", list(options.image_sizes)
    remedy = f"End it with {image_size}."
    require(sizes[-1] == image_size, f"{key}image_sizes", f"ending at model.image_size={image_size}", sizes, remedy)
    patch = int(getattr(network, "patch_size", 1))
    rule, better = (
        f"multiples of the patch of {patch} pixels",
        sorted({max(1, round(s / patch)) * patch for s in sizes}),
    )
    require(all(size % patch == 0 for size in sizes), f"{key}image_sizes", rule, sizes, f"Use {better}.")
    # Without inc1 a magnitude of 0 is the strongest change: colours become gray, Posterize leaves no bits.
    rises = options.rand_augment_from == 1 or (rand_augment is not None and "-inc1" in rand_augment)
    rule = "1 unless augment.rand_augment is a string with inc1, whose magnitude 0 means no change"
    remedy = "Set augment.rand_augment=rand-m9-mstd0.5-inc1 or rand_augment_from=1.0."
    require(rises, f"{key}rand_augment_from", rule, options.rand_augment_from, remedy)


def build_plan(
    options: Options | None,
    network: "nn.Module",
    *,
    image_size: int,
    max_duration: str,
    steps_per_epoch: int,
    images_per_step: int,
    train_flops: Callable[..., float],
) -> Plan:
    """The stages of a run, with what an image costs in each.

    With Curriculum, the steps n of a stage are proportional to c / f, its share of the compute over the FLOPs of one
    of its images, and rounded by largest remainder. With PatchDropout, ``until`` is rounded to whole steps.

    Args:
        max_duration: A whole number of ep, ba or sp; a batch that is begun is finished.
        train_flops: Of one image forward and backward, from the network, the pixels of a side and, for PatchDropout,
            ``patch_keep_rate``: ``flops.train_flops``, or more where more than the network runs.

    Raises:
        ConfigError: Fewer steps than stages need.
    """
    value, unit = int(float(max_duration[:-2])), max_duration[-2:]
    steps = {"ep": value * steps_per_epoch, "ba": value, "sp": -(-value // images_per_step)}[unit]
    full = train_flops(network, image_size)
    if options is None:
        parts: list[tuple[int, int, int | None, float]] = [(steps, image_size, None, full)]
    elif isinstance(options, Curriculum):
        flops = [train_flops(network, size) for size in options.image_sizes]
        weights = [share / f for share, f in zip(options.compute, flops, strict=True)]
        counts = _share_out(steps, weights)
        parts = [(n, size, None, f) for n, size, f in zip(counts, options.image_sizes, flops, strict=True)]
    else:
        parts = _levels(options, network, image_size, steps, train_flops)
    rule, remedy = f"long enough for a step of each of the {len(parts)} stages", "Train longer or use fewer stages."
    require(all(part[0] > 0 for part in parts), "max_duration", rule, f"{steps} steps", remedy)
    stages, first = [], 0
    for n, size, kept, f in parts:
        stages.append(Stage(first_step=first, steps=n, image_size=size, num_patches_kept=kept, train_flops_per_image=f))
        first += n
    rises = isinstance(options, Curriculum)
    return Plan(
        stages,
        steps_per_epoch=steps_per_epoch,
        images_per_step=images_per_step,
        full_flops=full,
        rand_augment_from=options.rand_augment_from if rises else 1.0,
        rand_augment_levels=options.rand_augment_levels if rises else 10,
    )


def _levels(
    options: PatchDropout, network: "nn.Module", image_size: int, steps: int, train_flops: Callable[..., float]
) -> list[tuple[int, int, int | None, float]]:
    patches = (image_size // int(getattr(network, "patch_size", 1))) ** 2
    ends = [round(share * steps) for share in options.until]
    levels = []
    for rate, begin, end in zip(options.keep_rates, [0, *ends], ends, strict=False):
        kept = max(1, round(rate * patches))
        flops = train_flops(network, image_size, patch_keep_rate=kept / patches)
        levels.append((end - begin, image_size, kept if kept < patches else None, flops))
    return levels


def _share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers of sum ``total`` nearest to proportional, by largest remainder."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _are_numbers(values: Any) -> bool:
    is_list = isinstance(values, list | tuple)
    return is_list and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _ascend(values: Sequence[float]) -> bool:
    return all(low < high for low, high in zip(values, values[1:], strict=False))
