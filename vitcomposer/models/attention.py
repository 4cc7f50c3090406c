"""Computes where a vision transformer looks: attention maps of its blocks, how far they reach, gates and rollout.

Shapes: B batch, h heads, N tokens, P prefix tokens (class, distillation), R x C grid of patches, N = P + R C.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitcomposer.models.convit import GPSA
from vitcomposer.models.layers import split_heads
from vitcomposer.models.positions import Grid, axis_offsets
from vitcomposer.models.transformer import ImageTransformer
from vitcomposer.models.trunks import Trunk

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
    if not has_attention(network):
        raise ValueError(
            "model.name must be a ViT, DeiT or ConViT, or a network of timm of their shape, to show its attention, "
            f"got a {type(network).__name__}. Choose another model."
        )
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            return (
                _of_timm(network, images, reduce) if isinstance(network, Trunk) else _of_ours(network, images, reduce)
            )
    finally:
        for module, mode in modes:
            module.training = mode


def has_attention(network: nn.Module) -> bool:
    """Whether every block attends over all tokens, so that there is a map of each."""
    if isinstance(network, Trunk):
        facts = network.of_timm
        return facts.vit_shaped and all(hasattr(block, "attn") for block in network.block_list)
    return isinstance(network, ImageTransformer)


def reads_token(network: Any) -> bool:
    """Whether the head reads the class token, and not all of the patches."""
    pool = network.global_pool if isinstance(network, Trunk) else network.config.pool
    return pool == "token"


def attention_size(network: Any) -> tuple[int, int]:
    """Blocks, and heads of each."""
    if isinstance(network, Trunk):
        attention: Any = network.block_list[0].attn
        return len(network.block_list), int(attention.num_heads)
    return network.config.depth, network.config.num_heads


def _of_ours(network: Any, images: Tensor, reduce: Callable[[BlockAttention], T]) -> list[T]:
    patch = network.patch_size
    grid = (images.shape[-2] // patch, images.shape[-1] // patch)
    found: list[T] = []

    def observe(module: Any, inputs: tuple[Tensor, ...]) -> None:
        attention = attention_map(module, *inputs)
        prefix = attention.shape[-1] - grid[0] * grid[1]
        gate = module.gating_param.sigmoid() if isinstance(module, GPSA) else None
        found.append(reduce(BlockAttention(attention, grid, prefix, gate)))

    hooks = [block.attn.register_forward_pre_hook(observe) for block in network.blocks]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _SeenAttention(TorchFunctionMode):
    """Makes the map of each call of torch's attention from what it is given: rotated, normed, with its bias."""

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._keep = keep

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._keep(_map_of(*args, **kwargs))
        return func(*args, **kwargs)


def _map_of(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
) -> Tensor:
    """(B, h, N, N) in float32 or wider."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = more.get("scale") or query.shape[-1] ** -0.5
    scores = query.to(dtype) @ key.to(dtype).transpose(-2, -1) * scale  # (B, h, N, N)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(dim=-1)


def _of_timm(network: Trunk, images: Tensor, reduce: Callable[[BlockAttention], T]) -> list[T]:
    """By the calls of torch's attention within the blocks, one each; a head that attends is none of them."""
    found: list[T] = []
    inside = False
    prefix = int(cast(Any, network).num_prefix_tokens)

    def switch(on: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal inside
            inside = on

        return hook

    def keep(attention: Tensor) -> None:
        if inside:
            grid = _grid_of(images, attention.shape[-1] - prefix)
            found.append(reduce(BlockAttention(attention, grid, prefix, None)))

    hooks = [block.register_forward_pre_hook(switch(True)) for block in network.block_list]
    hooks += [block.register_forward_hook(switch(False)) for block in network.block_list]
    try:
        with _SeenAttention(keep):
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != len(network.block_list):
        raise ValueError(
            f"model.name must be a network of timm whose every block calls torch's attention once, "
            f"{network.of_timm.name} calls it {len(found)} times in {len(network.block_list)} blocks. "
            "Unset TIMM_FUSED_ATTN, or choose another."
        )
    return found


def _grid_of(images: Tensor, patches: int) -> Grid:
    """Rows and columns of square patches."""
    height, width = images.shape[-2:]
    rows = round((patches * height / width) ** 0.5)
    if rows < 1 or patches % rows:
        raise ValueError(
            f"a network of {patches} patches for images of {height} x {width} pixels has no grid of squares"
        )
    return rows, patches // rows


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


def seen_by_output(network: Any, attention: Tensor) -> Tensor:
    """What the head reads of an attention map or rollout (..., N, N) of the last block: (..., R C) over the patches.

    The row of the class token, or, where the head takes the mean of the patches (``pool=avg``), the mean of their rows.
    """
    first = network.num_prefix_tokens
    if reads_token(network):
        return attention[..., 0, first:]
    return attention[..., first:, first:].mean(dim=-2)
