"""Counts the FLOPs of a network, for one image forward and for a training step."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitcomposer.models.heads import WeightNormLinear
from vitcomposer.models.trunks import Trunk
from vitcomposer.models.without_storage import meta_copy

# Forward passes that a training step costs: the backward pass multiplies once for the gradient of a layer's input and
# once for that of its weights.
TRAIN_FACTOR = 3


def forward_flops(model: nn.Module, image_size: int, *, patch_keep_rate: float = 1.0) -> int:
    """FLOPs (2 x multiply-adds) of one image through ``model`` in the forward pass.

    Matrix products and convolutions count, elementwise work doesn't. The model is neither run nor changed: a copy
    without storage on the meta device is, in evaluation mode.

    Args:
        image_size: Pixels; the input is (1, 3, image_size, image_size).
        patch_keep_rate: Share of the patches that patch dropout keeps, in (0, 1].

    Raises:
        ValueError: ``patch_keep_rate`` below 1 for a model that cannot drop patches.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(1, 3, image_size, image_size, dtype=dtype, device="meta")
    measured: Any = meta_copy(model).eval().requires_grad_(False)
    if patch_keep_rate < 1.0:
        measured.num_patches_kept = _patches(model, image_size, patch_keep_rate)
        # Of this module alone: stochastic depth in its blocks would skip samples, and dropout has no product.
        measured.training = True
    # MATH spells attention out as two products, which the counter knows; it doesn't know every fused operator.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        try:
            measured(image)
        except (RuntimeError, AssertionError, ValueError):
            if isinstance(model, Trunk):  # of timm, whose own words tell less
                model.require_size(image_size, "model.image_size, or a size of a curriculum, of crops or of a teacher,")
            raise
    return counter.get_total_flops()


def train_flops(
    model: nn.Module, image_size: int, *, patch_keep_rate: float = 1.0, train_blocks: int | None = None
) -> float:
    """FLOPs of one image through ``model`` in a training step: forward and backward pass.

    Args:
        image_size, patch_keep_rate: As of :func:`forward_flops`, and what it raises.
        train_blocks: As of :func:`train_factor`.
    """
    return forward_flops(model, image_size, patch_keep_rate=patch_keep_rate) * train_factor(model, train_blocks)


def train_factor(model: nn.Module, train_blocks: int | None) -> float:
    """What a training image costs in forward passes, where the last ``train_blocks`` blocks learn; None is all of them.

    The backward pass stops at the first block that learns. Embedding and head are counted as nothing.
    """
    if train_blocks is None:
        return TRAIN_FACTOR
    blocks = cast(int, model.num_layer_groups) - 2
    return 1 + (TRAIN_FACTOR - 1) * train_blocks / blocks


def multi_crop_flops(trunk: nn.Module, crop_sizes: Sequence[int], heads: Sequence[nn.Module] = ()) -> int:
    """Forward FLOPs of one image's crops through a trunk and the heads after it.

    Args:
        crop_sizes: Pixels of every crop.
        heads: Each of them sees every crop once.
    """
    of_trunk = sum(forward_flops(trunk, size) * crop_sizes.count(size) for size in set(crop_sizes))
    return of_trunk + len(crop_sizes) * sum(map(head_flops, heads))


def head_flops(head: nn.Module) -> int:
    """Forward FLOPs of one crop's features through a projection head: one product with each of its weight matrices."""
    weights = [layer.weight for layer in head.modules() if isinstance(layer, nn.Linear)]
    weights += [layer.direction for layer in head.modules() if isinstance(layer, WeightNormLinear)]
    return sum(2 * weight.numel() for weight in weights)


def _patches(model: nn.Module, image_size: int, keep_rate: float) -> int:
    """Patch tokens of one image that enter the blocks."""
    if keep_rate < 1.0 and not hasattr(model, "num_patches_kept"):
        raise ValueError(f"patch dropout needs a ViT or DeiT, got {type(model).__name__}. Leave it out.")
    patches = (image_size // getattr(model, "patch_size", image_size)) ** 2
    return max(1, round(patches * keep_rate))
