"""Which of Composer's algorithms a yaml may name, checked and built; with the changes that two of them need here.

Every public algorithm of Composer stands in exactly one of two tables: ``ALLOWED``, shown by a test to work on a ViT
with our batches, or ``REJECTED``, with the reason and what to use instead. ``STAGED`` are ours: they follow a plan of
the steps, which a recipe makes before.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from composer.algorithms import CutOut, LabelSmoothing, LowPrecisionLayerNorm
from composer.core import Algorithm, Event
from torch import nn

from vitcomposer import curriculum
from vitcomposer.algorithms.curriculum import Curriculum
from vitcomposer.algorithms.ema import EvaluationEMA
from vitcomposer.algorithms.gradient_clipping import PER_PARAMETER, ParameterGradientClipping
from vitcomposer.algorithms.patch_dropout import PatchDropout
from vitcomposer.algorithms.sam import ResumableSAM
from vitcomposer.schema import ConfigError, did_you_mean, require

# Arguments that are ours to give: where a batch keeps images and targets, and when the layers are replaced.
ALLOWED: dict[str, tuple[type[Algorithm], dict[str, Any]]] = {
    "CutOut": (CutOut, {"input_key": "image"}),  # one square for the whole device batch, black before normalisation
    "EMA": (EvaluationEMA, {}),
    "GradientClipping": (ParameterGradientClipping, {}),
    "LabelSmoothing": (LabelSmoothing, {"target_key": "target"}),
    "LowPrecisionLayerNorm": (LowPrecisionLayerNorm, {"apply_at": Event.INIT}),
    "SAM": (ResumableSAM, {}),
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

_CLIPPING = ("norm", PER_PARAMETER, "value", "adaptive")

_Rule = tuple[Callable[[Any], bool], str, str]
# What Composer's classes do not check, or only in the middle of the first batch.
_RULES: dict[str, dict[str, _Rule]] = {
    "CutOut": {
        "num_holes": (lambda v: v >= 1, "1 or more", "Use 1."),
        "length": (lambda v: 0 < v < 1, "in (0, 1)", "It is a share of the image's side; use 0.5."),
    },
    "GradientClipping": {
        "clipping_type": (lambda v: v in _CLIPPING, f"one of {', '.join(_CLIPPING)}", "Use norm."),
        "clipping_threshold": (lambda v: v > 0, "above 0", "Use 1.0 with norm."),
    },
    "LabelSmoothing": {"smoothing": (lambda v: 0 <= v < 1, "in [0, 1)", "Use 0.1.")},
    "SAM": {
        "rho": (lambda v: v > 0, "above 0", "Use 0.05."),
        "interval": (lambda v: v >= 1, "1 or more", "Use 1; 10 costs a tenth as much."),
    },
}


def build_algorithms(
    algorithms: Mapping[str, Mapping[str, Any]], *, loss: str, precision: str, label_smoothing: float
) -> list[Algorithm]:
    """Composer algorithms from the ``algorithms`` block of a yaml, in its order, without those of ``STAGED``.

    Args:
        algorithms: Name to arguments; the keys of our batches are filled in.
        loss: ``loss`` of the recipe.
        precision: ``precision`` of the recipe.
        label_smoothing: What is already smoothed while mixing.

    Raises:
        ConfigError: A name or argument that is unknown, unfit for a ViT, or at odds with the three values above.
    """
    built = [_build(name, dict(arguments)) for name, arguments in algorithms.items()]
    if "LabelSmoothing" in algorithms:
        remedy = "Drop one of the two, or the targets are smoothed twice."
        require(
            label_smoothing == 0, "mixing.label_smoothing", "0 with algorithms.LabelSmoothing", label_smoothing, remedy
        )
        remedy = "Smoothed targets are all above 0, which this loss takes for present. Drop algorithms.LabelSmoothing."
        require(loss != "binary_cross_entropy", "loss", "a cross-entropy with algorithms.LabelSmoothing", loss, remedy)
    if "LowPrecisionLayerNorm" in algorithms:
        remedy = "It does nothing in fp32. Drop algorithms.LowPrecisionLayerNorm."
        require(precision != "fp32", "precision", "mixed with algorithms.LowPrecisionLayerNorm", precision, remedy)
    return built


def build_stage_algorithms(
    options: curriculum.Options | None, plan: curriculum.Plan, network: nn.Module
) -> list[Algorithm]:
    """The algorithm that has the run follow the plan made from ``options``, if there are any."""
    if isinstance(options, curriculum.Curriculum):
        return [Curriculum(plan)]
    return [] if options is None else [PatchDropout(plan, network)]


def _build(name: str, arguments: dict[str, Any]) -> Algorithm:
    key = f"algorithms.{name}"
    if name in REJECTED:
        raise ConfigError(f"{key} must be an algorithm that helps a ViT, but {name} {REJECTED[name]}")
    if name in STAGED:
        raise ConfigError(f"{key} must be left out of this recipe, whose images have one size in all steps.")
    if name not in ALLOWED:
        hint = did_you_mean(name, [*ALLOWED, *REJECTED, *STAGED])
        raise ConfigError(f"{key} must be one of {sorted([*ALLOWED, *STAGED])}.{hint} Mend the name.")
    cls, ours = ALLOWED[name]
    allowed = [argument for argument in inspect.signature(cls).parameters if argument not in ours]
    for argument in arguments:
        if argument not in allowed:
            hint = did_you_mean(argument, allowed)
            raise ConfigError(f"{key}.{argument} must be one of the arguments {allowed}.{hint} Mend the name.")
    try:
        for argument, (holds, rule, remedy) in _RULES.get(name, {}).items():
            if argument in arguments:
                require(holds(arguments[argument]), f"{key}.{argument}", rule, arguments[argument], remedy)
        return cls(**arguments, **ours)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} must be arguments that {name} accepts, got {arguments}. It says: {error}") from error
