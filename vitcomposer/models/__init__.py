"""Builds networks by name and fills them: ``build_model``, ``model_names`` and ``load_weights``."""

from dataclasses import fields, replace
from typing import Any

from vitcomposer.errors import did_you_mean
from vitcomposer.models import convit, resnet, transformer, vit
from vitcomposer.models.batch_norm import convert_sync_bn
from vitcomposer.models.heads import DINOHead, MLPHead, SwAVHead
from vitcomposer.models.mean_color import MeanColor
from vitcomposer.models.trunks import Trunk, build_trunk
from vitcomposer.models.weights.load import LoadReport, load_weights
from vitcomposer.schema.model import TIMM

__all__ = [
    "DINOHead",
    "LoadReport",
    "MLPHead",
    "SwAVHead",
    "build_model",
    "convert_sync_bn",
    "load_weights",
    "model_names",
]

MEAN_COLOR = "mean_color"
_FIXED_BY_NAME = {"dist_token", "prefix_positions"}
_VIT_OPTIONS = {field.name for field in fields(vit.ViTConfig)} - _FIXED_BY_NAME
_CONVIT_OPTIONS = {field.name for field in fields(convit.ConViTConfig)}


def model_names() -> list[str]:
    """Every network that ``build_model`` knows, sorted: timm's names without the image size."""
    return sorted({**vit.VARIANTS, **convit.VARIANTS, **resnet.VARIANTS})


def build_model(
    name: str, *, num_classes: int, image_size: int, most_weights: int | None = None, **options: Any
) -> transformer.ImageTransformer | resnet.ResNet | MeanColor | Trunk:
    """Build a model with new weights; all but ``mean_color`` have timm's feature interface (``ImageTransformer``).

    Weights start as in DeiT's code, a ResNet's as in torchvision's; ``weight_init`` (``initialization``) changes that.

    Args:
        name: One of ``model_names()``, ``timm/<name>`` for any network of timm (see ``trunks``), whose weights
            start as timm starts them, or ``mean_color`` for a model that costs nothing and takes no options.
        num_classes: Outputs of the head; 0 builds a model without head that returns pooled features.
        image_size: Side in pixels the position embedding is made for; the forward pass takes other sizes too.
        most_weights: Refuse a network with more, before anything of it is built: what is said to fill it has no more.
        options: What to change of the published architecture: fields of ``vit.ViTConfig`` or ``convit.ConViTConfig``.
            None keeps what the name stands for; dropout rates are 0 unless given. A ResNet has none.

    Raises:
        ValueError: on an unknown name, an unknown option, one of the other family, or a value that does not fit;
            options are called ``model.<option>``.

    Example:
        >>> model = build_model("deit_tiny_patch16", num_classes=10, image_size=32, depth=2, drop_path_rate=0.1)
        >>> model.num_features, model.num_prefix_tokens
        (192, 1)
    """
    if name.startswith(TIMM):
        return build_trunk(name, num_classes=num_classes, image_size=image_size, most_weights=most_weights, **options)
    if name in vit.VARIANTS:
        changes = _known_options(name, options, _VIT_OPTIONS, other_family="convit", other_options=_CONVIT_OPTIONS)
        config = replace(vit.VARIANTS[name], **changes)
        _check_weights(config, num_classes, most_weights)
        model_class = vit.DistilledVisionTransformer if config.dist_token else vit.VisionTransformer
        return model_class(config, num_classes=num_classes, image_size=image_size)
    if name in convit.VARIANTS:
        other = "vit and deit"
        changes = _known_options(name, options, _CONVIT_OPTIONS, other_family=other, other_options=_VIT_OPTIONS)
        config = replace(convit.VARIANTS[name], **changes)
        _check_weights(config, num_classes, most_weights)
        return convit.ConViT(config, num_classes=num_classes, image_size=image_size)
    if name in resnet.VARIANTS or name == MEAN_COLOR:
        used = sorted(option for option, value in options.items() if value)
        if used:
            raise ValueError(f"model.{used[0]} must be left out or 0 for {name}, got {options[used[0]]!r}.")
        transformer.check_classes(num_classes)
        if name == MEAN_COLOR:
            return MeanColor(num_classes=num_classes)
        return resnet.ResNet(name, num_classes=num_classes, image_size=image_size)
    known = f" Known: {', '.join(model_names())}, and {TIMM}NAME for any network of timm."
    raise ValueError(f"model.name must be a known model, got {name!r}.{did_you_mean(name, model_names()) or known}")


def _check_weights(config: transformer.TransformerConfig, num_classes: int, most: int | None) -> None:
    needed = config.least_weights(num_classes)
    if most is not None and needed > most:
        raise ValueError(
            f"model.depth={config.depth}, model.embed_dim={config.embed_dim} and model.num_classes={num_classes} need "
            f"at least {needed:,} weights, far more than there are; give those that the weights were trained with"
        )


def _known_options(
    name: str, options: dict[str, Any], own: set[str], *, other_family: str, other_options: set[str]
) -> dict[str, Any]:
    """The options that are given, after checking that ``name`` has each."""
    given = {}
    for option, value in options.items():
        if option not in own | other_options:
            hint = did_you_mean(option, sorted(own)) or f" Its options: {', '.join(sorted(own))}."
            raise ValueError(f"model.{option} is not an option of {name}.{hint}")
        if value is None:
            continue
        if option not in own:
            raise ValueError(
                f"model.{option} is an option of the {other_family} models, {name} has none. Remove it, or choose "
                f"another model.name."
            )
        given[option] = value
    return given
