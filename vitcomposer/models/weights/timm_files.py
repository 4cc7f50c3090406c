"""Fits weights of others to a network of timm by timm's own rules: names, position embeddings, patches, rotations."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from timm.models import model_entrypoint
from torch import Tensor

from vitcomposer.models.trunks import Trunk

# Made for pre-training alone, or computed anew from the size of the images.
_UNUSED = ("mask_token", "rope", "relative_position_index", "relative_coords_table", "attn_mask", "periods")


def fit_to_trunk(trunk: Trunk, found: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by the names and in the shapes of the network, and the names of those whose shape was changed.

    Tensors that are the network's already stay as they are. Others go through timm's ``checkpoint_filter_fn`` of the
    network: it knows the names of those who published them, and resizes position embeddings
    (``timm.layers.resample_abs_pos_embed``), patch embeddings (``resample_patch_embed``, FlexiViT's, arXiv:2212.08013)
    and relative position biases. Rotations (RoPE) are computed from the size of the images and are no weights.

    Raises:
        ValueError: What timm cannot fit.
    """
    wanted = trunk.state_dict()
    body = {key: value for key, value in found.items() if not trunk.is_head(key)}
    if all(key in wanted and wanted[key].shape == value.shape for key, value in body.items()):
        return dict(found), ()
    given = dict(found)
    filter_of = _filter(trunk)
    try:
        with torch.no_grad():
            fitted = dict(found) if filter_of is None else dict(filter_of(given, trunk))
    except (RuntimeError, ValueError, KeyError, AssertionError, AttributeError, TypeError, IndexError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is of another architecture than timm's {trunk.of_timm.name}: {type(error).__name__}: {line}. "
            "Choose the model.name it was made with."
        ) from error
    tensors = {key: value for key, value in fitted.items() if isinstance(value, Tensor)}
    changed = [key for key, value in tensors.items() if key in found and found[key].shape != value.shape]
    return tensors, tuple(changed)


def _filter(trunk: Trunk) -> Callable[[dict[str, Tensor], Any], Mapping[str, Tensor]] | None:
    module = sys.modules[model_entrypoint(trunk.of_timm.name).__module__]
    return cast(Any, getattr(module, "checkpoint_filter_fn", None))


def is_unused(key: str) -> bool:
    """Whether a tensor of a file is none that the network computes with."""
    return any(part in _UNUSED or part.startswith("rope") for part in key.split("."))


def lost_from(trunk: Trunk, found: Mapping[str, Tensor]) -> list[str]:
    """What the source computes with and the network does not have: of its blocks, tokens and positions."""
    wanted = trunk.state_dict().keys()
    roots = {key.partition(".")[0] for key in wanted if "." in key}
    return [
        key
        for key, value in found.items()
        if key not in wanted and not trunk.is_head(key) and not is_unused(key)
        if (key.partition(".")[0] in roots or "." not in key) and not (key.endswith("bias") and not value.any())
    ]
