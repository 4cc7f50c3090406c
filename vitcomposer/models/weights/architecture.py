"""Reads what a file of weights says about the network it was trained as, and whether a model is that network.

Tensors do not show how many heads they were trained with, how their features were pooled, or which fixed positions they
saw. Another number of heads loads to the last tensor and computes something else.
"""

import math
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from vitcomposer.models import convit, vit
from vitcomposer.models.positions import sincos_positions
from vitcomposer.models.transformer import ImageTransformer
from vitcomposer.models.weights.averages import EMA_STATE
from vitcomposer.origins import page_of, recorded_model, recorded_page

_VARIANTS = {**vit.VARIANTS, **convit.VARIANTS}
_COMPARED = (
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "pool",
    "stem",
    "class_token",
    "position_embedding",
    "local_up_to_layer",
)
# Heads by width. DeiT, DeiT III and DINO: 64 wide, 80 in the huge one; MoCo-v3: vits.py of facebookresearch/moco-v3.
_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16}
_MOCO3_HEADS = {384: 12, 768: 12}
_SAME_POSITIONS = 1e-3  # float32 sines of up to 14 radians


@dataclass(frozen=True)
class Declared:
    """What a source says about its network.

    Attributes:
        origin: Where it says so.
        options: Fields of ``ViTConfig`` or ``ConViTConfig``, those that are known.
    """

    origin: str
    options: dict[str, Any]


def declared(source: str | PathLike[str] | None, content: Any, found: Mapping[str, Tensor]) -> Declared:
    """What is known of the network of some weights: from the run's own page, or from the layout of the file.

    Args:
        source: The file or folder, None for a state dict.
        content: Of the file.
        found: Its tensors by the names of a model.
    """
    if source is not None and (block := recorded_model(source)):
        return Declared(str(page_of(source)), _of_block(block))
    if source is not None and (page := recorded_page(source)).get("architecture"):
        arguments = page.get("model_args")
        return Declared(str(page_of(source)), _of_timm(page["architecture"], arguments))
    return _of_layout(content, found)


def _of_block(block: Mapping[str, Any]) -> dict[str, Any]:
    variant = _VARIANTS.get(block["name"])
    if variant is None:
        return {}
    known = {key for key in _COMPARED if hasattr(variant, key)}
    given = {key: value for key, value in block.items() if key in known and value is not None}
    try:
        config = replace(variant, **given)
    except TypeError as error:  # text where a number belongs
        raise ValueError(f"what lies beside the weights must describe a network, got {given}: {error}.") from error
    return {key: getattr(config, key) for key in known}


def _of_timm(name: Any, arguments: Any) -> dict[str, Any]:
    """Of timm's name ``deit_small_patch16_224.fb_in1k`` and what was changed of it."""
    given = arguments.get("num_heads") if isinstance(arguments, Mapping) else None
    variant = _VARIANTS.get(re.sub(r"(_\d+)?(\..*)?$", "", str(name)))
    heads = given or (variant.num_heads if variant else None)
    return {"num_heads": heads} if heads else {}


def _of_layout(content: Any, found: Mapping[str, Tensor]) -> Declared:
    content = content if isinstance(content, Mapping) else {}
    projection = found.get("patch_embed.proj.weight")
    width = projection.shape[0] if isinstance(projection, Tensor) and projection.ndim == 4 else 0
    state = content.get("state_dict")
    encoder = isinstance(state, Mapping) and any("base_encoder." in str(key) for key in state)
    if encoder or fixed_positions(found.get("pos_embed")) == "sincos_moco3":
        return Declared("the code of MoCo-v3", _trunk(_MOCO3_HEADS.get(width)))
    name, arguments = _arch_in(content)
    if options := _of_timm(name, arguments):
        return Declared(f"its architecture {name}", options)
    if any(isinstance(content.get(key), Mapping) for key in ("teacher", "student")):
        return Declared("the code of DINO", _trunk(_HEADS.get(width)))
    if isinstance(content.get("model"), Mapping) and width in _HEADS:
        return Declared("the code of DeiT", {"num_heads": _HEADS[width]})
    return Declared("", {})


def _trunk(heads: int | None) -> dict[str, Any]:
    return {"pool": "token", **({"num_heads": heads} if heads else {})}


def _arch_in(content: Mapping[str, Any]) -> tuple[Any, Any]:
    """The name of timm's network in a file of timm's or DeiT's training, and the arguments it was made with."""
    arguments = content.get("args")
    arguments = vars(arguments) if isinstance(arguments, Namespace) else arguments
    arguments = arguments if isinstance(arguments, Mapping) else {}
    return content.get("arch") or arguments.get("model") or arguments.get("arch"), arguments.get("model_kwargs")


def fixed_positions(positions: Tensor | None) -> str | None:
    """Which computed positions these are, ``sincos`` or ``sincos_moco3``; tokens before the patches have none."""
    if positions is None or positions.ndim != 3 or positions.shape[2] % 4 or positions.shape[2] < 8:
        return None
    rows, width = positions.shape[1:]
    side = math.isqrt(rows)
    prefix = rows - side * side
    if side == 0 or positions[:, :prefix].any():
        return None
    for kind in ("sincos", "sincos_moco3"):
        computed = sincos_positions((side, side), width, kind)
        if torch.allclose(positions[:, prefix:].float(), computed, rtol=0, atol=_SAME_POSITIONS):
            return kind
    return None


def check_same(model: nn.Module, said: Declared, name: str) -> None:
    """Raise ValueError, naming every option, where the model is another network than the source says it is."""
    if not isinstance(model, ImageTransformer):
        return
    own = {key: getattr(model.config, key) for key in said.options if hasattr(model.config, key)}
    different = {key: said.options[key] for key, value in own.items() if value != said.options[key]}
    if not different:
        return
    first = next(iter(different))
    settings = " ".join(f"model.{key}={_text(value)}" for key, value in different.items())
    raise ValueError(
        f"model.{first} must be {_text(different[first])} for {name}, as {said.origin} says, got {_text(own[first])}. "
        f"Set {settings}."
    )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def notes_on(model: nn.Module, said: Declared, content: Any) -> tuple[str, ...]:
    """What was assumed, and which of several weights were taken."""
    notes = []
    if isinstance(model, ImageTransformer):
        if "num_heads" in said.options:
            notes.append(f"trained with {said.options['num_heads']} heads, as {said.origin} says")
        else:
            notes.append(
                f"assumed: {model.config.num_heads} heads and pool={model.config.pool}, the source says neither"
            )
    content = content if isinstance(content, Mapping) else {}
    for raw, average in (("state_dict", "state_dict_ema"), ("model", "model_ema")):
        if content.get(raw) is not None and content.get(average) is not None:
            notes.append(f"taken: {raw}, the trained weights, not {average}, their average")
    state = content.get("state")
    algorithms = state.get("algorithms") if isinstance(state, Mapping) else None
    pairs = algorithms.items() if isinstance(algorithms, Mapping) else algorithms or ()
    if any(isinstance(pair, tuple | list) and pair[:1] in ((EMA_STATE,), [EMA_STATE]) for pair in pairs):
        notes.append("taken: the trained weights, not their average (EMA)")
    return tuple(notes)
