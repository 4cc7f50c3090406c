"""Computes where a vision transformer looks: attention maps of its blocks, how far they reach, gates and rollout.

Shapes: B batch, h heads, N tokens, P prefix tokens (class, distillation), R x C grid of patches, N = P + R C.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitcomposer.models.convit import GPSA
from vitcomposer.models.layers import split_heads
from vitcomposer.models.positions import Grid, axis_offsets
from vitcomposer.models.transformer import ImageTransformer

T = TypeVar("T")


@dataclass(frozen=True)
class BlockAttention:
    """What one block of a transformer attends to.

    Attributes:
        map: (B, h, N, N), indexed [query, key], float32 or wider; rows sum to 1.
        grid: R and C.
        num_prefix_tokens: P; 0 in the local blocks of a ConViT, which the class token has not joined.
        gate: (h,), share of the positional attention in a gated block, ``sigmoid(gating_param)``; None elsewhere.
    """

    map: Tensor
    grid: Grid
    num_prefix_tokens: int
    gate: Tensor | None


def observe_attention(network: nn.Module, images: Tensor, reduce: Callable[[BlockAttention], T]) -> list[T]:
    """Run ``network`` on images (B, 3, H, W) and return what ``reduce`` makes of each block's attention, first first.

    The maps are computed beside the fused kernels, from the input of each attention module, and live no longer than
    ``reduce`` keeps them. The pass is in evaluation mode and without gradient, draws no random number, and leaves
    every module in the mode it was in.

    Raises:
        ValueError: The network is no vision transformer.
    """
    if not isinstance(network, ImageTransformer):
        raise ValueError(
            f"model.name must be a ViT, DeiT or ConViT to show its attention, got a {type(network).__name__}. "
            "Choose another model."
        )
    patch = network.patch_size
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    found: list[T] = []

    def observe(module: Any, inputs: tuple[Tensor, ...]) -> None:
        attention = attention_map(module, *inputs)
        prefix = attention.shape[-1] - grid[0] * grid[1]
        gate = module.gating_param.sigmoid() if isinstance(module, GPSA) else None
        found.append(reduce(BlockAttention(attention, grid, prefix, gate)))

    modes = [(module, module.training) for module in network.modules()]
    blocks: Any = network.blocks
    hooks = [block.attn.register_forward_pre_hook(observe) for block in blocks]
    network.eval()
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return found


def attention_map(attention: Any, x: Tensor, *offsets: Tensor) -> Tensor:
    """The map (B, h, N, N) of a ``SelfAttention`` or ``GPSA`` module for its inputs, in float32 or wider."""
    if isinstance(attention, GPSA):
        found = attention.attention_map(x, *offsets)
    else:
        query, key, _ = attention.qkv(x).chunk(3, dim=-1)
        query, key = split_heads(query, attention.num_heads), split_heads(key, attention.num_heads)
        found = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)  # (B, h, N, N)
    return found.to(torch.promote_types(found.dtype, torch.float32))


def nonlocality(attention: BlockAttention) -> Tensor:
    """Distance in patches to what a patch looks at, per head: (h,), mean over images and patches.

    ``1 / L sum_ij A_ij |d_ij|`` over the L patches (arXiv:2103.10697, section 4). Attention that a patch pays to class
    and distillation token is at no distance and adds nothing.
    """
    first = attention.num_prefix_tokens
    patches = attention.map[:, :, first:, first:]  # (B, h, R C, R C)
    distance = patch_distances(attention.grid, like=patches)  # (R C, R C)
    return torch.einsum("bhij,ij->h", patches, distance) / (patches.shape[0] * patches.shape[2])


def patch_distances(grid: Grid, *, like: Tensor) -> Tensor:
    """Euclidean distances (R C, R C) between patches, in patches, on the device and in the dtype of ``like``."""
    rows, columns = (axis_offsets(size, device=like.device, dtype=like.dtype).square() for size in grid)
    squares = rows[:, None, :, None] + columns[None, :, None, :]  # (R, C, R, C)
    return squares.sqrt().flatten(2).flatten(0, 1)  # (R C, R C)


def positional_attention(network: ImageTransformer, grid: Grid) -> list[Tensor]:
    """The positional part P (h, R C, R C) of each gated block on a grid of patches; empty for a ViT."""
    like = network.pos_embed
    rows, columns = (axis_offsets(size, device=like.device, dtype=like.dtype) for size in grid)
    with torch.no_grad():
        return [m.positional_attention(rows, columns) for m in network.modules() if isinstance(m, GPSA)]


def attention_rollout(maps: Sequence[Tensor]) -> Tensor:
    """How much of each input token arrives in each output token (attention rollout, arXiv:2005.00928, section 3).

    The product over the blocks of ``(mean over heads of A + I) / 2``, where I stands for the residual connection. A
    token that joins after some blocks, as ConViT's class token does, arrives there as itself alone.

    Args:
        maps: (B, h, N, N) of each block, first block first; N may grow, by tokens put before the others.

    Returns:
        (B, N, N) of the last N, indexed [output, input]; rows sum to 1.
    """
    rolled = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device).expand(len(maps[0]), -1, -1)
    for found in maps:
        joined = found.shape[-1] - rolled.shape[-1]  # rolled is (B, N, N) of the N of the block before
        if joined:
            own = torch.eye(found.shape[-1], dtype=found.dtype, device=found.device).repeat(len(found), 1, 1)
            own[:, joined:, joined:] = rolled
            rolled = own
        # The residual connection passes each token on to itself: half attention, half identity.
        rolled = (found.mean(dim=1) @ rolled + rolled) / 2
    return rolled


def seen_by_output(network: ImageTransformer, attention: Tensor) -> Tensor:
    """What the head reads of an attention map or rollout (..., N, N) of the last block: (..., R C) over the patches.

    The row of the class token, or, where the head takes the mean of the patches (``pool=avg``), the mean of their rows.
    """
    first = network.num_prefix_tokens
    if network.config.pool == "token":
        return attention[..., 0, first:]
    return attention[..., first:, first:].mean(dim=-2)
