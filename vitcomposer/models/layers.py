"""Building blocks that every vision transformer here shares; module names are timm's, so state dicts are too.

Shapes: B batch, H W pixels, N tokens, D width, h heads, K = D / h head width.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LAYER_NORM_EPS = 1e-6
# Above this rate a block computes its branches on the kept samples alone. Gathering them and adding back costs what
# about a tenth of a block costs (benchmarks/results/step_cpu.md); compiled, a factor per sample is free.
SUBSET_ABOVE = 0.1
# Largest relative error of the share kept that rounding to whole samples may cause; 10 kept samples never exceed it.
SUBSET_ROUNDING = 0.05


def drop_path_rates(rate: float, depth: int, mode: str) -> list[float]:
    """Drop rate of the residual branches of each block, first block first.

    Args:
        rate: Highest rate, in [0, 1).
        depth: Number of blocks.
        mode: ``linear`` rises from 0 to ``rate`` over the depth (DeiT, arXiv:2012.12877); ``constant`` uses ``rate``
            everywhere (DeiT III, arXiv:2204.07118).

    Example:
        >>> drop_path_rates(0.5, 3, "linear")
        [0.0, 0.25, 0.5]
    """
    if mode == "constant" or depth == 1:
        return [rate] * depth
    return [rate * index / (depth - 1) for index in range(depth)]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) to (B, h, N, K)."""
    batch, tokens, width = x.shape
    return x.view(batch, tokens, num_heads, width // num_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, h, N, K) to (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


class DropPath(nn.Module):
    """Zero the residual branch of a random share of the samples (stochastic depth, arXiv:1603.09382).

    What is kept is scaled by 1 / (1 - rate), so the expectation is the branch itself and evaluation needs no scaling.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        scale = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)  # (B, 1, 1)
        return x * scale

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def kept_samples(batch: int, drop_rate: float) -> int | None:
    """Number of samples whose branch is computed, or None where dropping by a factor of 0 is the better way."""
    share = 1.0 - drop_rate
    kept = max(1, round(batch * share))
    if drop_rate <= SUBSET_ABOVE or abs(kept / batch - share) > SUBSET_ROUNDING * share:
        return None
    return kept


def add_on_subset(x: Tensor, branch: Callable[[Tensor], Tensor], kept: int) -> Tensor:
    """``x`` (B, ...) plus the branch of ``kept`` random samples, scaled by B / kept.

    Every sample is equally likely, so the expectation is ``x + branch(x)`` for a branch that treats samples separately.
    """
    index = torch.rand(x.shape[0], device=x.device).argsort()[:kept]  # (kept,), different samples
    return x.index_add(0, index, branch(x.index_select(0, index)).to(x.dtype), alpha=x.shape[0] / kept)


class LayerScale(nn.Module):
    """Learned factor per channel (D,) on a residual branch (B, N, D) (arXiv:2103.17239, section 2)."""

    def __init__(self, embed_dim: int, init_values: float) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.full((embed_dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class PatchEmbed(nn.Module):
    """Image to patch tokens by a strided convolution."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, N, D) of images (B, 3, H, W), and the grid (rows, columns) they came from.

        Raises:
            ValueError: if height or width is no multiple of the patch size.
        """
        grid = patch_grid(images, self.patch_size)
        x = self.proj(images)  # (B, D, rows, columns)
        return x.flatten(2).transpose(1, 2), grid


class ConvStem(nn.Module):
    """Image to patch tokens by convolutions of 3 x 3 with stride 2, each with batch norm and ReLU, and one of 1 x 1.

    "Early Convolutions Help Transformers See Better" (arXiv:2106.14881, appendix A): channels double and end at the
    width, so that a patch of 16 pixels takes D/8, D/4, D/2 and D of them. A token sees a little more than its patch.
    The paper leaves out a block of the transformer, which costs as much; here ``depth`` is what it says.

    Args:
        patch_size: 2 to the number of convolutions with stride 2.
        embed_dim: Divisible by half of ``patch_size``.
    """

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        steps = patch_size.bit_length() - 1
        channels = [3] + [embed_dim >> (steps - 1 - step) for step in range(steps)]
        self.convs = nn.Sequential(*(_conv_step(*pair) for pair in pairwise(channels)))
        self.proj = nn.Conv2d(embed_dim, embed_dim, kernel_size=1)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """As ``PatchEmbed.forward``, and what it raises."""
        grid = patch_grid(images, self.patch_size)
        # Convolutions with few channels take 0.8 times the time in this order.
        x = self.proj(self.convs(images.contiguous(memory_format=torch.channels_last)))  # (B, D, rows, columns)
        return x.flatten(2).transpose(1, 2), grid


def _conv_step(channels: int, more: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, more, kernel_size=3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(more), nn.ReLU(inplace=True))


def patch_grid(images: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of images (B, 3, H, W).

    Raises:
        ValueError: if height or width is no multiple of the patch size, where a convolution would silently drop the
            last rows or columns.
    """
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(
            f"images must have a height and width divisible by model.patch_size={patch}, got {height} x {width}; "
            f"crop to {height // patch * patch} x {width // patch * patch} or resize"
        )
    return height // patch, width // patch


class Mlp(nn.Module):
    """(B, N, D) to (B, N, D): linear, GELU, linear, with dropout after both linear layers as in ViT."""

    def __init__(self, embed_dim: int, hidden_dim: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, embed_dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SelfAttention(nn.Module):
    """Multi-head self-attention, (B, N, D) to (B, N, D), with one fused projection for query, key and value."""

    def __init__(
        self, embed_dim: int, num_heads: int, *, qkv_bias: bool, drop_rate: float = 0.0, attn_drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop_rate = attn_drop_rate
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        # Each (B, h, N, K), of one product (B, N, 3 D).
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.attn_drop_rate if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)  # (B, h, N, K)
        return self.proj_drop(self.proj(merge_heads(x)))  # (B, N, D)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each with a residual connection.

    Args:
        attn: Module from (B, N, D), and whatever else ``forward`` is given, to (B, N, D). What else is given belongs to
            the whole batch, not to a sample.
        hidden_dim: Width inside the MLP.
        drop_rate: Dropout of the MLP.
        drop_path_rate: Share of samples whose residual branch is dropped, drawn separately for the two branches: a
            fixed number of samples that are not computed at all, or each sample by itself, see ``kept_samples``.
        init_values: Start of the LayerScale factors; 0 builds a block without LayerScale.

    Attributes:
        recompute: In training keep nothing but the input; the backward pass computes the rest again, and draws the same
            dropout and stochastic depth (arXiv:1604.06174).
    """

    recompute = False

    def __init__(
        self,
        attn: nn.Module,
        embed_dim: int,
        hidden_dim: int,
        *,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.attn = attn
        self.ls1 = LayerScale(embed_dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(embed_dim, hidden_dim, drop_rate)
        self.ls2 = LayerScale(embed_dim, init_values) if init_values else nn.Identity()
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, *attn_inputs: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # Within the module, so that FSDP2 gathers the weights once for both passes over it in backward.
            return checkpoint(self._forward, x, *attn_inputs, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return self._forward(x, *attn_inputs)

    def _forward(self, x: Tensor, *attn_inputs: Tensor) -> Tensor:
        x = self._add(x, lambda part: self.ls1(self.attn(self.norm1(part), *attn_inputs)))
        return self._add(x, lambda part: self.ls2(self.mlp(self.norm2(part))))

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        kept = kept_samples(x.shape[0], self.drop_path.rate) if self.training else None
        return x + self.drop_path(branch(x)) if kept is None else add_on_subset(x, branch, kept)
