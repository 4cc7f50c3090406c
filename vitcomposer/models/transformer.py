"""The base of ViT, DeiT and ConViT: sizes and their checks, patches and positions, pooling and head, what learns.

Shapes: B batch, H W pixels, N patches, P prefix tokens (class, distillation), D width.
Module and parameter names are timm's, so weights move both ways.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitcomposer.models.initialization import WEIGHT_INITS, init_head, init_transformer
from vitcomposer.models.layers import LAYER_NORM_EPS, ConvStem, PatchEmbed
from vitcomposer.models.positions import Grid, resize_positions, sincos_positions

# Far beyond every published network: with a larger number a network is built for hours, or fills the memory.
_MOST = {"patch_size": 4096, "embed_dim": 1 << 16, "depth": 1000, "num_heads": 1 << 12}
_MOST_MLP_RATIO, _MOST_PATCHES, _MOST_CLASSES = 256, 1 << 20, 1 << 24


@dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a vision transformer; what the name of a model stands for, less what the user overrides.

    The dropout rates are 0 unless given: they belong to a recipe, not to a name.

    Args:
        patch_size: Side of a patch in pixels.
        embed_dim: Width D of all heads together.
        mlp_ratio: Width inside the MLP divided by D.
        qkv_bias: The projections to queries, keys and values have a bias.
        drop_rate: Dropout after the position embedding, the attention projection and both MLP layers, as in ViT
            (arXiv:2010.11929, appendix B.1). There is none before the head.
        drop_path_mode: ``linear`` or ``constant`` over the depth, see ``layers.drop_path_rates``.
        pool: ``token`` feeds the class token to the head, ``avg`` the mean of the patch tokens.
        init_values: Start of the LayerScale factors; 0 means no LayerScale.
        stem: How patches become tokens, ``linear`` or ``conv``: see ``layers.PatchEmbed`` and ``layers.ConvStem``.
        weight_init: How all other weights start, ``deit``, ``big_vision`` or ``moco3``: see ``models.initialization``.

    Raises:
        ValueError: on a value out of range, naming it as ``model.<option>``.
    """

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_path_mode: str = "linear"
    pool: str = "token"
    init_values: float = 0.0
    stem: str = "linear"
    weight_init: str = "deit"

    def __post_init__(self) -> None:
        for option, most in _MOST.items():
            value = getattr(self, option)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"model.{option} must be a whole number from 1 to {most}, got {value!r}")
        for option in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            if not 0.0 <= getattr(self, option) < 1.0:
                raise ValueError(f"model.{option} must be in [0, 1), got {getattr(self, option)}; 0 switches it off")
        if not 0 < self.mlp_ratio <= _MOST_MLP_RATIO:
            rule = f"above 0 and at most {_MOST_MLP_RATIO}"
            raise ValueError(f"model.mlp_ratio must be {rule}, got {self.mlp_ratio}; published models use 4")
        if self.init_values < 0:
            raise ValueError(f"model.init_values must not be negative, got {self.init_values}; 0 means no LayerScale")
        check_choice("drop_path_mode", self.drop_path_mode, ("linear", "constant"))
        check_choice("pool", self.pool, ("token", "avg"))
        check_choice("stem", self.stem, ("linear", "conv"))
        check_choice("weight_init", self.weight_init, WEIGHT_INITS)
        if self.embed_dim % self.num_heads:
            lower, upper = nearest_multiples(self.embed_dim, self.num_heads)
            raise ValueError(
                f"model.embed_dim must be divisible by model.num_heads={self.num_heads}, got {self.embed_dim}; "
                f"use {lower} or {upper}"
            )
        if self.stem == "conv":
            self._check_stem()

    def _check_stem(self) -> None:
        patch = self.patch_size
        if patch & (patch - 1) or patch < 2:
            lower = 1 << max(patch.bit_length() - 1, 1)
            raise ValueError(
                f"model.patch_size must be a power of 2 for model.stem=conv, got {patch}; use {lower} or {2 * lower}"
            )
        if self.embed_dim % (patch // 2):
            raise ValueError(
                f"model.embed_dim must be divisible by {patch // 2}, half of model.patch_size, for model.stem=conv, "
                f"got {self.embed_dim}"
            )

    def least_weights(self, num_classes: int) -> int:
        """How many numbers the matrices of patches, blocks and head have: without positions, tokens and biases."""
        # Queries, keys, values and projection are 4 D x D; the MLP is two matrices.
        block = 4 * self.embed_dim**2 + 2 * self.embed_dim * int(self.embed_dim * self.mlp_ratio)
        patch = 3 * self.patch_size**2 if self.stem == "linear" else self.embed_dim  # of conv the last layer alone
        return self.depth * block + self.embed_dim * (patch + num_classes)


def check_classes(num_classes: int) -> None:
    """Raise ValueError for a number of classes that no head has."""
    if num_classes > _MOST_CLASSES:
        raise ValueError(f"model.num_classes must be at most {_MOST_CLASSES}, got {num_classes}")
    if num_classes < 0:
        raise ValueError(f"model.num_classes must not be negative, got {num_classes}; 0 builds a model without head")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"model.{option} must be {' or '.join(choices)}, got {value!r}")


def num_recomputed(share: float, blocks: int) -> int:
    """How many of the blocks that learn compute their activations twice, at least one where ``share`` is above 0.

    The first ones: when the backward pass comes to them it has freed what the others kept, so that their turn, one at
    a time, is no new peak.
    """
    return min(blocks, max(1, round(share * blocks))) if share > 0 else 0


def nearest_multiples(value: int, step: int) -> tuple[int, int]:
    """The multiples of ``step`` around ``value``, at least ``step``."""
    lower = max(step, value // step * step)
    return lower, lower + step


class ImageTransformer(nn.Module):
    """What ViT and ConViT share: patches and positions in, final norm, pooling and head out; timm's interface.

    A subclass adds its tokens and blocks and defines ``forward_features``.
    Every image size whose sides are multiples of the patch size is accepted: the position embedding of
    ``image_size`` is resized (bicubic) in the forward pass where the grid differs.

    Attributes:
        image_size: Side in pixels that ``pos_embed`` was made for.
        grid_size: (rows, columns) of patches at ``image_size``.
        num_prefix_tokens: Tokens before the patches in what ``forward_features`` returns.
        num_position_rows: Rows of ``pos_embed`` before those of the patches.
        num_frozen_blocks: See ``freeze_below``; None where everything learns.
    """

    pos_embed: Tensor
    blocks: nn.ModuleList
    num_frozen_blocks: int | None = None

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_classes: int,
        image_size: int,
        num_prefix_tokens: int,
        num_position_rows: int,
        positions: str = "learned",
    ) -> None:
        super().__init__()
        patch = config.patch_size
        if not isinstance(image_size, int) or image_size < patch or image_size % patch:
            lower, upper = nearest_multiples(int(image_size), patch)
            raise ValueError(
                f"model.image_size must be divisible by model.patch_size={patch}, got {image_size}; "
                f"use {lower} or {upper}"
            )
        if (image_size // patch) ** 2 > _MOST_PATCHES:
            rule = f"such that there are at most {_MOST_PATCHES} patches of model.patch_size={patch}"
            raise ValueError(f"model.image_size must be {rule}, got {image_size}")
        check_classes(num_classes)
        self.config = config
        self.num_classes = num_classes
        self.image_size = image_size
        self.patch_size = patch
        self.grid_size: Grid = (image_size // patch, image_size // patch)
        self.embed_dim = self.num_features = config.embed_dim
        self.num_prefix_tokens = num_prefix_tokens
        self.num_position_rows = num_position_rows

        self.patch_embed = (ConvStem if config.stem == "conv" else PatchEmbed)(patch, config.embed_dim)
        if positions == "learned":
            rows = num_position_rows + self.grid_size[0] * self.grid_size[1]
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, config.embed_dim))
        else:
            # No part of the state dict: it follows from the grid.
            computed = sincos_positions(self.grid_size, config.embed_dim, positions)
            self.register_buffer("pos_embed", computed, persistent=False)
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.norm = nn.LayerNorm(config.embed_dim, eps=LAYER_NORM_EPS)
        self.head = self._new_head()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, P + N, D) after the final norm, prefix tokens first."""
        raise NotImplementedError

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens of ``forward_features`` to logits (B, num_classes).

        Args:
            pre_logits: Stop at the pooled features (B, D).

        Returns:
            Logits, pooled features, or in training of a distilled model the logits of both heads.
        """
        use_token = self.config.pool == "token"
        pooled = tokens[:, 0] if use_token else tokens[:, self.num_prefix_tokens :].mean(dim=1)  # (B, D)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by one that starts anew, as the first did; 0 classes leave the pooled features as output."""
        self.num_classes = num_classes
        self.head = self._new_head()

    @property
    def num_layer_groups(self) -> int:
        """Layers that :meth:`layer_of` counts: embedding, blocks, norm and heads."""
        return self.config.depth + 2

    def layer_of(self, name: str) -> int:
        """Depth of a parameter: 0 for patches, tokens and positions, i + 1 in block i, above it norm and heads."""
        part, _, rest = name.partition(".")
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1
        return 0 if part in ("patch_embed", "cls_token", "dist_token", "pos_embed") else self.config.depth + 1

    def freeze_below(self, train_blocks: int) -> None:
        """Let only the last ``train_blocks`` blocks, the final norm and the heads learn; at 0 only the heads.

        The backward pass ends where nothing below learns. What is frozen stays in evaluation mode: without dropout and
        stochastic depth, which regularise what learns, it computes the features it was trained to.

        Raises:
            ValueError: More blocks than there are.
        """
        depth = self.config.depth
        if train_blocks > depth:
            raise ValueError(
                f"init.train_blocks must be at most the {depth} blocks of the model, got {train_blocks}; "
                "leave it out to train everything"
            )
        self.num_frozen_blocks = depth - train_blocks
        for name, parameter in self.named_parameters():
            frozen = self.layer_of(name) <= depth - train_blocks or (train_blocks == 0 and name.startswith("norm."))
            parameter.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ImageTransformer":
        super().train(mode)
        if self.num_frozen_blocks is not None:
            self.patch_embed.eval()
            self.pos_drop.eval()
            for block in self.blocks[: self.num_frozen_blocks]:
                block.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: tokens, positions and ConViT's gates.

        Biases and norms are not listed: one-dimensional parameters are the optimizer's business.
        """
        exempt = {"cls_token", "dist_token", "pos_embed", "gating_param"}
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in exempt}

    def init_weights(self) -> None:
        """Start every weight as ``config.weight_init`` says, see ``models.initialization``."""
        init_transformer(self, self.config.weight_init)
        self.reset_classifier(self.num_classes)

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.patch_embed.proj.weight
        head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        init_head(head, self.config.weight_init)
        return head.train(self.training)

    def _positions(self, grid: Grid) -> Tensor:
        """``pos_embed`` (1, rows, D) for a grid of patches, with the rows of prefix tokens that have one."""
        return resize_positions(
            self.pos_embed, old_grid=self.grid_size, new_grid=grid, num_prefix_rows=self.num_position_rows
        )
