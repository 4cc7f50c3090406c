"""ConViT (arXiv:2103.10697): self-attention that starts as a convolution and learns how far to leave it.

Written from the equations of the paper; the official code is under a non-commercial licence and was not used.

Shapes: B batch, N tokens, D width, h heads, K = D / h head width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcomposer.models.layers import Block, SelfAttention, drop_path_rates, merge_heads, split_heads
from vitcomposer.models.positions import axis_offsets
from vitcomposer.models.transformer import ImageTransformer, TransformerConfig


@dataclass(frozen=True)
class ConViTConfig(TransformerConfig):
    """Architecture of a ConViT.

    Args:
        qkv_bias: Off, as in the paper.
        local_up_to_layer: Number of blocks with gated positional self-attention, before the class token joins.
        locality_strength: alpha of the paper: how narrow the convolution is that attention starts as.
        use_local_init: Start as a convolution; ``num_heads`` then has to be a square. Off is the ablation of Table 3.
    """

    qkv_bias: bool = False
    local_up_to_layer: int = 10
    locality_strength: float = 1.0
    use_local_init: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # At depth the class token would meet no attention, and the head would see a constant.
        if not 0 <= self.local_up_to_layer < self.depth:
            raise ValueError(
                f"model.local_up_to_layer must be in 0 .. {self.depth - 1} for model.depth={self.depth}, got "
                f"{self.local_up_to_layer}; the class token needs at least one block after the local ones"
            )
        if self.locality_strength <= 0:
            raise ValueError(f"model.locality_strength must be above 0, got {self.locality_strength}; the paper uses 1")
        if self.weight_init != "deit":
            raise ValueError(f"model.weight_init must be deit for a ConViT, got {self.weight_init!r}; leave it out")
        side = math.isqrt(self.num_heads)
        if self.use_local_init and side * side != self.num_heads:
            raise ValueError(
                f"model.num_heads must be a square for ConViT's convolutional start, got {self.num_heads}; "
                f"use {side * side} or {(side + 1) ** 2}, or model.use_local_init=false"
            )


class GPSA(nn.Module):
    """Gated positional self-attention, eq. 6 and 7 of arXiv:2103.10697.

    ``A = (1 - s) softmax(Q K^T / sqrt(K)) + s P`` with ``s = sigmoid(gating_param)`` per head and
    ``P = softmax_j(pos_proj(r_ij))``, so ``A V = (1 - s) SDPA(Q, K, V) + s P V``: the content part runs in a fused
    kernel. The scores of P are a sum of a function of the row offset and one of the column offset, so P is the
    Kronecker product of a softmax over rows and one over columns, and is applied to V one axis after the other.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(embed_dim, 2 * embed_dim, bias=qkv_bias)
        self.v = nn.Linear(embed_dim, embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, R C, D) to (B, R C, D).

        Args:
            rows: ``positions.axis_offsets`` of the R rows of patches, (R, R).
            columns: The same of the C columns, (C, C).
        """
        value = self.v(x)  # (B, N, D)
        if self.training and self.attn_drop.p > 0.0:
            # One dropout mask covers the sum of content and position, so the sum cannot be split.
            attention = self.attn_drop(self.attention_map(x, rows, columns))
            x = merge_heads(attention.to(value.dtype) @ split_heads(value, self.num_heads))
        else:
            x = self._split_attention(x, value, rows, columns)
        return self.proj_drop(self.proj(x))

    def attention_map(self, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Attention A (B, h, N, N) of tokens (B, N, D), for analysis and for attention dropout."""
        query, key = self._query_key(x)
        content = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)  # (B, h, N, N)
        gate = self._gate()
        # The paper divides A by its row sum. Rows of both softmaxes sum to 1 and so does a convex combination of them:
        # the division is the identity, in the gradient too (it is orthogonal to what a softmax can change).
        return (1.0 - gate) * content + gate * self.positional_attention(rows, columns)  # eq. 7

    def positional_attention(self, rows: Tensor, columns: Tensor) -> Tensor:
        """P (h, N, N) of the whole grid."""
        by_row, by_column = self.positional_factors(rows, columns)
        product = by_row[:, :, None, :, None] * by_column[:, None, :, None, :]  # (h, R, C, R, C)
        return product.flatten(3).flatten(1, 2)  # (h, R C, R C), row-major as the patches are

    def positional_factors(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over rows (h, R, R) and over columns (h, C, C) in the dtype of the offsets, float32 or wider.

        Squared distances reach 169 at 14 x 14 patches: too coarse in bfloat16. Products and sums instead of a matrix
        product stay out of autocast, and fuse with the softmax.
        """
        column_weight, row_weight, square_weight = (w.view(-1, 1, 1) for w in self.pos_proj.weight.unbind(dim=1))
        row_score = row_weight * rows + square_weight * rows.square()  # (h, R, R)
        column_score = column_weight * columns + square_weight * columns.square()  # (h, C, C)
        # The softmax cancels the bias; it is added so that no parameter is left without a gradient under DDP.
        row_score = row_score + self.pos_proj.bias.view(-1, 1, 1)
        # Far patches weigh less than the smallest normal float32, and a CPU multiplies such numbers ten times slower.
        # Beside a row sum of 1, what is below 1e-30 is nothing, in float64 too.
        return _zero_below(row_score.softmax(dim=-1)), _zero_below(column_score.softmax(dim=-1))

    @torch.no_grad()
    def local_init(self, locality_strength: float) -> None:
        """Start as a convolution: head (h1, h2) looks ``h2 - c`` columns and ``h1 - c`` rows away.

        ``P ~ exp(-alpha |d - delta|^2)`` around the offset delta of the head, values are passed on unchanged and the
        gate starts at 1, that is 73 % positional attention.
        """
        side = math.isqrt(self.num_heads)
        center = (side - 1) / 2
        heads = torch.arange(self.num_heads, device=self.pos_proj.weight.device)
        row_offset, column_offset = heads % side - center, heads // side - center  # delta of each head, (h,)
        # -alpha |d - delta|^2 = alpha (2 delta d - |d|^2) and a constant, which the softmax cancels.
        weight = torch.stack((2 * column_offset, 2 * row_offset, -torch.ones_like(row_offset)), dim=1)  # (h, 3)
        self.pos_proj.weight.copy_(locality_strength * weight)
        nn.init.zeros_(self.pos_proj.bias)
        nn.init.eye_(self.v.weight)
        nn.init.ones_(self.gating_param)

    def _split_attention(self, x: Tensor, value: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        # (1 - s) SDPA + s P V, the right side of the class's equation.
        content = F.scaled_dot_product_attention(*self._query_key(x), split_heads(value, self.num_heads))
        content = content.transpose(1, 2)  # (B, N, h, K), as the kernel lays it out
        gate = self._gate()
        by_row, by_column = self.positional_factors(rows, columns)
        # The gate goes into the smallest factor. In place, since a sum of its own would be one more pass over memory.
        positional = apply_along_grid((gate * by_row).to(value.dtype), by_column.to(value.dtype), value)
        return ((1.0 - gate[:, 0]).to(content.dtype) * content).add_(positional).flatten(2)  # (B, N, D)

    def _query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.qk(x).chunk(2, dim=-1)
        return split_heads(query, self.num_heads), split_heads(key, self.num_heads)

    def _gate(self) -> Tensor:
        return self.gating_param.sigmoid().view(self.num_heads, 1, 1)  # s, for maps (B, h, N, N)


def apply_along_grid(by_row: Tensor, by_column: Tensor, value: Tensor) -> Tensor:
    """Values (B, R C, D) mixed over the rows by ``by_row`` (h, R, R), then over the columns by ``by_column`` (h, C, C).

    The batch stands beside the head width, so rows are one matrix product per head and columns one per head and row;
    each is contiguous and no factor is copied per sample.

    Returns:
        (B, R C, h, K), not contiguous.
    """
    heads, rows, columns = by_row.shape[0], by_row.shape[1], by_column.shape[1]
    batch, tokens, width = value.shape
    x = value.view(batch, rows, columns, heads, width // heads).permute(3, 1, 2, 0, 4)  # (h, R, C, B, K)
    x = torch.bmm(by_row, x.reshape(heads, rows, -1))  # (h, R, C B K)
    by_column = by_column.unsqueeze(1).expand(-1, rows, -1, -1).flatten(0, 1)  # (h R, C, C)
    x = torch.bmm(by_column, x.view(heads * rows, columns, -1))  # (h R, C, B K)
    return x.view(heads, tokens, batch, width // heads).permute(2, 1, 0, 3)


def _zero_below(attention: Tensor) -> Tensor:
    return F.threshold(attention, 1e-30, 0.0)


class ConViT(ImageTransformer):
    """ConViT: ``local_up_to_layer`` blocks of GPSA on the patches, then the class token joins plain self-attention.

    The class token has no position. ``pool=avg`` averages the patch tokens without it. Offsets between patches are
    computed from the grid once per forward pass, shared by all GPSA blocks and no part of the state dict, so any image
    size works.
    """

    config: ConViTConfig

    def __init__(self, config: ConViTConfig, *, num_classes: int, image_size: int) -> None:
        super().__init__(
            config, num_classes=num_classes, image_size=image_size, num_prefix_tokens=1, num_position_rows=0
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        rates = drop_path_rates(config.drop_path_rate, config.depth, config.drop_path_mode)
        self.blocks = nn.ModuleList(self._block(config, index, rate) for index, rate in enumerate(rates))
        self.init_weights()

    @staticmethod
    def _block(config: ConViTConfig, index: int, drop_path_rate: float) -> Block:
        attention_class = GPSA if index < config.local_up_to_layer else SelfAttention
        attention = attention_class(
            config.embed_dim,
            config.num_heads,
            qkv_bias=config.qkv_bias,
            drop_rate=config.drop_rate,
            attn_drop_rate=config.attn_drop_rate,
        )
        return Block(
            attention,
            config.embed_dim,
            int(config.embed_dim * config.mlp_ratio),
            drop_rate=config.drop_rate,
            drop_path_rate=drop_path_rate,
            init_values=config.init_values,
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """As ``ImageTransformer.init_weights``, then the convolutional start of the GPSA layers if it is on."""
        super().init_weights()
        # After the general initialisation, which would overwrite it: VISSL has the other order and loses it.
        for module in self.modules():
            if isinstance(module, GPSA):
                nn.init.ones_(module.gating_param)
                if self.config.use_local_init:
                    module.local_init(self.config.locality_strength)

    def forward_features(self, x: Tensor) -> Tensor:
        x, grid = self.patch_embed(x)  # (B, N, D)
        x = self.pos_drop(x + self._positions(grid))
        # Half precision is too coarse for squared offsets, see ``GPSA.positional_factors``.
        dtype = torch.promote_types(self.pos_embed.dtype, torch.float32)
        rows, columns = (axis_offsets(size, device=x.device, dtype=dtype) for size in grid)
        local = self.config.local_up_to_layer
        for block in self.blocks[:local]:
            x = block(x, rows, columns)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)  # (B, 1 + N, D)
        for block in self.blocks[local:]:
            x = block(x)
        return self.norm(x)


# arXiv:2103.10697, Table 1: heads of width 48, or 64 in the plus models.
VARIANTS: dict[str, ConViTConfig] = {
    "convit_tiny": ConViTConfig(patch_size=16, embed_dim=192, depth=12, num_heads=4),
    "convit_tiny_plus": ConViTConfig(patch_size=16, embed_dim=256, depth=12, num_heads=4),
    "convit_small": ConViTConfig(patch_size=16, embed_dim=432, depth=12, num_heads=9),
    "convit_small_plus": ConViTConfig(patch_size=16, embed_dim=576, depth=12, num_heads=9),
    "convit_base": ConViTConfig(patch_size=16, embed_dim=768, depth=12, num_heads=16),
    "convit_base_plus": ConViTConfig(patch_size=16, embed_dim=1024, depth=12, num_heads=16),
}
