"""Lists the algorithms that a yaml may name, with their arguments, without importing Composer.

Every public algorithm of Composer stands in exactly one of two tables: ``ARGUMENTS``, shown by a test to work on a ViT
with our batches, or ``REJECTED``, with the reason and what to use instead.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from vitcomposer.errors import ConfigError, did_you_mean, require

# Of Composer's algorithms those that a yaml may give; of STAGED, which are ours and follow a plan of the steps, all.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "CutOut": ("num_holes", "length", "uniform_sampling"),
    "Curriculum": ("image_sizes", "compute", "rand_augment_from", "rand_augment_levels"),
    "EMA": ("half_life", "smoothing", "ema_start", "update_interval"),
    "GradientClipping": ("clipping_type", "clipping_threshold"),
    "LabelSmoothing": ("smoothing",),
    "LowPrecisionLayerNorm": (),
    "PatchDropout": ("keep_rates", "until"),
    "SAM": ("rho", "epsilon", "interval"),
}
STAGED = ("Curriculum", "PatchDropout")

_NO_CONVOLUTIONS = "changes convolutional networks, and a ViT has one convolution. Leave it out."
_LANGUAGE = "is made for language models. Leave it out."
REJECTED: dict[str, str] = {
    "Alibi": _LANGUAGE,
    "AugMix": "needs PIL images of a torchvision data set. Use augment.rand_augment or augment.three_augment.",
    "BlurPool": _NO_CONVOLUTIONS,
    "ChannelsLast": "gains nothing on a ViT, whose patch embedding is one matrix product. Leave it out.",
    "ColOut": "leaves image sizes that are no multiple of the patch. Use augment.crop_scale.",
    "CutMix": "mixes every batch and knows no switch with mixup. Use mixing.cutmix_alpha and mixing.switch_prob.",
    "Factorize": "replaces trained layers by low-rank ones, at a loss of accuracy. Choose a smaller model.name.",
    "GatedLinearUnits": _LANGUAGE,
    "GhostBatchNorm": "needs batch norms, and a ViT has layer norms. Leave it out.",
    "GyroDropout": "replaces dropout, which these recipes have at 0, and cannot be resumed. Use model.drop_path_rate.",
    "LayerFreezing": "saves nothing on a ViT, since backward still crosses every block. Leave it out.",
    "LowPrecisionGroupNorm": "needs group norms, and a ViT has layer norms. Use LowPrecisionLayerNorm.",
    "MixUp": "mixes every batch and knows no switch with CutMix. Use mixing.mixup_alpha and mixing.switch_prob.",
    "NoOpModel": "replaces the model by one parameter, for timing. Use vitcomposer bench.",
    "ProgressiveResizing": "resizes by nearest neighbour to sizes off the patch grid, after the decoding. Use "
    "Curriculum.",
    "RandAugment": "needs PIL images of a torchvision data set. Use augment.rand_augment.",
    "SWA": "cannot be resumed on several GPUs once the average has started. Use EMA, which averages too.",
    "SelectiveBackprop": "takes batches of (image, target) pairs and scores them before augmentation. Leave it out.",
    "SeqLengthWarmup": _LANGUAGE,
    "SqueezeExcite": _NO_CONVOLUTIONS,
    "StochasticDepth": "knows ResNet bottlenecks only and does nothing to a ViT. Use model.drop_path_rate.",
    "WeightStandardization": _NO_CONVOLUTIONS,
}

_CLIPPING = ("norm", "norm_per_parameter", "value", "adaptive")
_REQUIRED = {
    "Curriculum": ("image_sizes", "compute"),
    "GradientClipping": ("clipping_type", "clipping_threshold"),
    "PatchDropout": ("keep_rates", "until"),
}

_Rule = tuple[Callable[[Any], bool], str, str]
# What Composer's classes do not check, or only in the middle of the first batch.
_RULES: dict[str, dict[str, _Rule]] = {
    "CutOut": {
        "num_holes": (lambda v: 1 <= v <= 100 and isinstance(v, int), "from 1 to 100", "Use 1."),
        "length": (lambda v: 0 < v < 1, "in (0, 1)", "It is a share of the image's side; use 0.5."),
    },
    "GradientClipping": {
        "clipping_type": (lambda v: v in _CLIPPING, f"one of {', '.join(_CLIPPING)}", "Use norm."),
        "clipping_threshold": (lambda v: v > 0, "above 0", "Use 1.0 with norm."),
    },
    "EMA": {
        "half_life": (
            lambda v: v is None or _is_time(v, "ep|ba|dur"),
            "a time above 0 in ep, ba or dur",
            "Write 0.07dur, which looks back over a tenth of the run.",
        ),
        "smoothing": (lambda v: v is None or 0 < v < 1, "in (0, 1)", "DeiT uses 0.99996."),
        "ema_start": (lambda v: _is_time(v, "ep|ba|dur", zero=True), "a time in dur, ep or ba", "Write 0.0dur."),
        "update_interval": (lambda v: v is None or _is_time(v, "ep|ba"), "a time above 0 in ep or ba", "Write 1ba."),
    },
    "LabelSmoothing": {"smoothing": (lambda v: 0 <= v < 1, "in [0, 1)", "Use 0.1.")},
    "SAM": {
        "rho": (lambda v: v > 0, "above 0", "Use 0.05."),
        "epsilon": (lambda v: v >= 0, "0 or more", "Use 1e-12."),
        "interval": (lambda v: v >= 1 and isinstance(v, int), "1 or more", "Use 1; 10 costs a tenth as much."),
    },
}


def _is_time(text: Any, units: str, *, zero: bool = False) -> bool:
    found = re.fullmatch(rf"(\d+(?:\.\d*)?|\.\d+)({units})", text)
    if found is None:
        return False
    value = float(found[1])
    return (zero or value > 0) and (value <= 1 if found[2] == "dur" else value.is_integer())


def check_algorithms(algorithms: Mapping[str, Mapping[str, Any]], *, staged: bool = True) -> None:
    """Refuse names and arguments that are unknown, unfit for a ViT or out of range.

    Args:
        staged: Whether the recipe takes those of ``STAGED``.

    Raises:
        ConfigError: All of them.
    """
    problems = [each for name, arguments in algorithms.items() for each in _faults(name, arguments, staged)]
    if problems:
        raise ConfigError(*problems)


def _faults(name: str, arguments: Mapping[str, Any], staged: bool) -> list[str]:
    key = f"algorithms.{name}"
    if name in REJECTED:
        return [f"{key} must be an algorithm that helps a ViT, but {name} {REJECTED[name]}"]
    if name in STAGED and not staged:
        return [f"{key} must be left out of this recipe, whose images have one size in all steps."]
    if name not in ARGUMENTS:
        hint = did_you_mean(name, [*ARGUMENTS, *REJECTED])
        return [f"{key} must be one of {sorted(ARGUMENTS)}.{hint} Mend the name."]
    found = []
    for argument, value in arguments.items():
        if argument not in ARGUMENTS[name]:
            hint, known = did_you_mean(argument, ARGUMENTS[name]), list(ARGUMENTS[name])
            found.append(f"{key}.{argument} must be one of the arguments {known}.{hint} Mend the name.")
        elif argument in _RULES.get(name, {}):
            holds, rule, remedy = _RULES[name][argument]
            try:
                require(_holds(holds, value), f"{key}.{argument}", rule, value, remedy)
            except ConfigError as error:
                found += error.problems
    for argument in _REQUIRED.get(name, ()):
        if argument not in arguments:
            found.append(f"{key}.{argument} is required and missing. Add it to algorithms.{name}.")
    return found or (_ema_faults(key, arguments) if name == "EMA" else [])


def _ema_faults(key: str, arguments: Mapping[str, Any]) -> list[str]:
    half_life, smoothing, interval = (arguments.get(name) for name in ("half_life", "smoothing", "update_interval"))
    if (half_life is None) == (smoothing is None):
        rule, remedy = "exactly one of half_life and smoothing", "Use {smoothing: 0.99996, update_interval: 1ba}."
    elif interval is None and (smoothing is not None or str(half_life).endswith("dur")):
        rule, remedy = "given with update_interval, the time between two", f"Set {key}.update_interval=1ba."
    elif half_life and interval and not half_life.endswith("dur") and half_life[-2:] != interval[-2:]:
        rule, remedy = "half_life and update_interval in the same units", "Write both in ba."
    else:
        return []
    return [f"{key} must be {rule}, got {dict(arguments)}. {remedy}"]


def _holds(rule: Callable[[Any], bool], value: Any) -> bool:
    try:
        return not isinstance(value, bool) and rule(value)
    except TypeError:  # a text where a number belongs, or the other way round
        return False


def check_company(
    algorithms: Mapping[str, Any], *, loss: str, precision: str, label_smoothing: float, distilled: bool = False
) -> None:
    """Refuse algorithms that do not go with the rest of the recipe.

    Args:
        distilled: Whether the model has two outputs.

    Raises:
        ConfigError: The key that is at odds with one of them.
    """
    if "LabelSmoothing" in algorithms:
        key, rule = "mixing.label_smoothing", "0 with algorithms.LabelSmoothing"
        require(label_smoothing == 0, key, rule, label_smoothing, "Drop one, or the targets are smoothed twice.")
        remedy = "Smoothed targets are all above 0, which this loss takes for present. Drop algorithms.LabelSmoothing."
        require(loss != "binary_cross_entropy", "loss", "a cross-entropy with algorithms.LabelSmoothing", loss, remedy)
        rule = "left out with a distilled model, which has two outputs"
        remedy = "Set mixing.label_smoothing instead, which does the same."
        require(not distilled, "algorithms.LabelSmoothing", rule, algorithms["LabelSmoothing"], remedy)
    if "LowPrecisionLayerNorm" in algorithms:
        remedy = "It does nothing in fp32. Drop algorithms.LowPrecisionLayerNorm."
        require(precision != "fp32", "precision", "mixed with algorithms.LowPrecisionLayerNorm", precision, remedy)


SCHEDULE_FREE = "adamw_schedulefree"


def check_schedule_free(optimizer: Any, schedule: Any, algorithms: Mapping[str, Any]) -> None:
    """Refuse what the optimizer that needs no schedule does by itself."""
    if optimizer.name != SCHEDULE_FREE:
        return
    remedy = "Set schedule.alpha_f=1; schedule.t_warmup stays its warm-up."
    rule = f"1 with optimizer.name={SCHEDULE_FREE}, which averages instead of lowering the learning rate"
    require(schedule.alpha_f == 1, "schedule.alpha_f", rule, schedule.alpha_f, remedy)
    for name in {"EMA", "SAM"} & algorithms.keys():
        rule = f"left out with optimizer.name={SCHEDULE_FREE}, whose weights are an average already"
        remedy = f"Drop algorithms.{name}, or use optimizer.name=adamw."
        require(False, f"algorithms.{name}", rule, algorithms[name], remedy)
