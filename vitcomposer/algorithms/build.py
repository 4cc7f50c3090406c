"""Builds the algorithms that a yaml names, two of them with mends of Composer's own.

``ALLOWED`` are the classes of the names that :mod:`vitcomposer.schema.algorithms` lists. Those of its ``STAGED`` are
ours: they follow a plan of the steps, which a recipe makes before.
"""

from collections.abc import Mapping
from typing import Any

from composer.algorithms import CutOut, LabelSmoothing, LowPrecisionLayerNorm
from composer.core import Algorithm, Event
from torch import nn

from vitcomposer import curriculum
from vitcomposer.algorithms.curriculum import Curriculum
from vitcomposer.algorithms.ema import EvaluationEMA
from vitcomposer.algorithms.gradient_clipping import ParameterGradientClipping
from vitcomposer.algorithms.patch_dropout import PatchDropout
from vitcomposer.algorithms.sam import ResumableSAM
from vitcomposer.errors import ConfigError
from vitcomposer.schema.algorithms import check_algorithms, check_company

# Arguments that are ours to give: where a batch keeps images and targets, and when the layers are replaced.
ALLOWED: dict[str, tuple[type[Algorithm], dict[str, Any]]] = {
    "CutOut": (CutOut, {"input_key": "image"}),  # one square for the whole device batch, black before normalisation
    "EMA": (EvaluationEMA, {}),
    "GradientClipping": (ParameterGradientClipping, {}),
    "LabelSmoothing": (LabelSmoothing, {"target_key": "target"}),
    "LowPrecisionLayerNorm": (LowPrecisionLayerNorm, {"apply_at": Event.INIT}),
    "SAM": (ResumableSAM, {}),
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
    check_algorithms(algorithms, staged=False)
    check_company(algorithms, loss=loss, precision=precision, label_smoothing=label_smoothing)
    return [_build(name, dict(arguments)) for name, arguments in algorithms.items()]


def build_stage_algorithms(
    options: curriculum.Options | None, plan: curriculum.Plan, network: nn.Module
) -> list[Algorithm]:
    """The algorithm that has the run follow the plan made from ``options``, if there are any."""
    if isinstance(options, curriculum.Curriculum):
        return [Curriculum(plan)]
    return [] if options is None else [PatchDropout(plan, network)]


def _build(name: str, arguments: dict[str, Any]) -> Algorithm:
    cls, ours = ALLOWED[name]
    try:
        return cls(**arguments, **ours)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"algorithms.{name} must be arguments that {name} accepts, got {arguments}. It says: {error}"
        ) from error
