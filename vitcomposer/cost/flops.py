"""Counts the FLOPs of a network, for one image forward and for a training step."""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TRAIN_FACTOR = 3  # a training step: the backward pass computes the gradients of inputs and of weights


def forward_flops(model: nn.Module, image_size: int, *, patch_keep_rate: float = 1.0) -> int:
    """FLOPs (2 x multiply-adds) of one image through ``model`` in the forward pass.

    A training step costs ``TRAIN_FACTOR`` times as much. Matrix products and convolutions count, elementwise work
    doesn't. The model is neither run nor changed: a copy without storage on the meta device is, in evaluation mode.

    Args:
        image_size: Pixels; the input is (1, 3, image_size, image_size).
        patch_keep_rate: Share of the patches that patch dropout keeps, in (0, 1].

    Raises:
        ValueError: ``patch_keep_rate`` below 1 for a model that cannot drop patches.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(1, 3, image_size, image_size, dtype=dtype, device="meta")
    measured: Any = _meta_copy(model).eval()
    if patch_keep_rate < 1.0:
        measured.num_patches_kept = _patches(model, image_size, patch_keep_rate)
        # Of this module alone: stochastic depth in its blocks would skip samples, and dropout has no product.
        measured.training = True
    # MATH spells attention out as two products, which the counter knows; it doesn't know every fused operator.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        measured(image)
    return counter.get_total_flops()


def train_factor(model: nn.Module, train_blocks: int | None) -> float:
    """What a training image costs in forward passes, where the last ``train_blocks`` blocks learn; None is all of them.

    The backward pass stops at the first block that learns. Embedding and head are counted as nothing.
    """
    if train_blocks is None:
        return TRAIN_FACTOR
    return 1 + (TRAIN_FACTOR - 1) * train_blocks / len(cast(nn.ModuleList, model.blocks))


def multi_crop_flops(trunk: nn.Module, num_crops: Sequence[int], size_crops: Sequence[int]) -> int:
    """Forward FLOPs of all crops of one image: ``num_crops[g]`` of ``size_crops[g]`` pixels in every group g."""
    return sum(n * forward_flops(trunk, size) for n, size in zip(num_crops, size_crops, strict=True))


def _patches(model: nn.Module, image_size: int, keep_rate: float) -> int:
    """Patch tokens of one image that enter the blocks."""
    if keep_rate < 1.0 and not hasattr(model, "num_patches_kept"):
        raise ValueError(f"patch dropout needs a ViT or DeiT, got {type(model).__name__}. Leave it out.")
    patches = (image_size // getattr(model, "patch_size", image_size)) ** 2
    return max(1, round(patches * keep_rate))


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose every tensor is on the meta device. ``deepcopy`` takes what its memo holds for a copy."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # vars() also finds tensors that are neither parameter nor buffer, such as cached relative positions.
        for held in (vars(module), module._parameters, module._buffers):
            for value in held.values():
                if isinstance(value, nn.Parameter):
                    memo[id(value)] = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
                elif isinstance(value, torch.Tensor):
                    memo[id(value)] = value.detach().to("meta")
    return copy.deepcopy(model, memo)
