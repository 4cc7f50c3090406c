"""ViT (arXiv:2010.11929), DeiT (arXiv:2012.12877) and DeiT III (arXiv:2204.07118).

Shapes: B batch, H W pixels, N patches, P prefix tokens (class, distillation), D width.
Module and parameter names are timm's, so weights move both ways.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitcomposer.models.layers import LAYER_NORM_EPS, Block, LayerScale, PatchEmbed, SelfAttention, drop_path_rates
from vitcomposer.models.positions import Grid, resize_positions, sincos_positions

INIT_STD = 0.02


@dataclass(frozen=True)
class TransformerConfig:
    """Architecture of a vision transformer; what the name of a model stands for, less what the user overrides.

    The dropout rates are 0 unless given: they belong to a recipe, not to a name.

    Args:
        patch_size: Side of a patch in pixels.
        embed_dim: Width D of all heads together.
        mlp_ratio: Width inside the MLP divided by D.
        drop_rate: Dropout after the position embedding, the attention projection and both MLP layers, as in ViT
            (arXiv:2010.11929, appendix B.1). There is none before the head.
        drop_path_mode: ``linear`` or ``constant`` over the depth, see ``layers.drop_path_rates``.
        pool: ``token`` feeds the class token to the head, ``avg`` the mean of the patch tokens.
        init_values: Start of the LayerScale factors; 0 means no LayerScale.

    Raises:
        ValueError: on a value out of range, naming it as ``model.<option>``.
    """

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_path_mode: str = "linear"
    pool: str = "token"
    init_values: float = 0.0

    def __post_init__(self) -> None:
        for option in ("patch_size", "embed_dim", "depth", "num_heads"):
            value = getattr(self, option)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"model.{option} must be a whole number of at least 1, got {value!r}")
        for option in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
            if not 0.0 <= getattr(self, option) < 1.0:
                raise ValueError(f"model.{option} must be in [0, 1), got {getattr(self, option)}; 0 switches it off")
        if self.mlp_ratio <= 0:
            raise ValueError(f"model.mlp_ratio must be above 0, got {self.mlp_ratio}; published models use 4")
        if self.init_values < 0:
            raise ValueError(f"model.init_values must not be negative, got {self.init_values}; 0 means no LayerScale")
        check_choice("drop_path_mode", self.drop_path_mode, ("linear", "constant"))
        check_choice("pool", self.pool, ("token", "avg"))
        if self.embed_dim % self.num_heads:
            lower, upper = nearest_multiples(self.embed_dim, self.num_heads)
            raise ValueError(
                f"model.embed_dim must be divisible by model.num_heads={self.num_heads}, got {self.embed_dim}; "
                f"use {lower} or {upper}"
            )


@dataclass(frozen=True)
class ViTConfig(TransformerConfig):
    """Architecture of a ViT, DeiT or DeiT III.

    Args:
        class_token: Without it ``pool`` has to be ``avg``.
        position_embedding: ``learned``, or ``sincos`` for the fixed one of big_vision (``positions.sincos_positions``),
            which gives class and distillation token no position.
        dist_token: Distillation token with a head of its own. Part of a name, not an option.
        prefix_positions: Class and distillation token have a position too (ViT, DeiT; not DeiT III). Part of a name.
    """

    class_token: bool = True
    position_embedding: str = "learned"
    dist_token: bool = False
    prefix_positions: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("position_embedding", self.position_embedding, ("learned", "sincos"))
        if not self.class_token and self.pool == "token":
            raise ValueError("model.pool=token needs a class token, got model.class_token=false; use model.pool=avg")
        if self.dist_token and (self.pool != "token" or not self.class_token):
            raise ValueError(
                "a distilled model reads its class and distillation token: it needs model.pool=token and "
                f"model.class_token=true, got {self.pool} and {str(self.class_token).lower()}; "
                "use the name without _distilled"
            )


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"model.{option} must be {' or '.join(choices)}, got {value!r}")


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
    """

    pos_embed: Tensor
    blocks: nn.ModuleList

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_classes: int,
        image_size: int,
        num_prefix_tokens: int,
        num_position_rows: int,
        learned_positions: bool = True,
    ) -> None:
        super().__init__()
        patch = config.patch_size
        if not isinstance(image_size, int) or image_size < patch or image_size % patch:
            lower, upper = nearest_multiples(int(image_size), patch)
            raise ValueError(
                f"model.image_size must be divisible by model.patch_size={patch}, got {image_size}; "
                f"use {lower} or {upper}"
            )
        if num_classes < 0:
            raise ValueError(
                f"model.num_classes must not be negative, got {num_classes}; 0 builds a model without head"
            )
        self.config = config
        self.num_classes = num_classes
        self.image_size = image_size
        self.patch_size = patch
        self.grid_size: Grid = (image_size // patch, image_size // patch)
        self.embed_dim = self.num_features = config.embed_dim
        self.num_prefix_tokens = num_prefix_tokens
        self.num_position_rows = num_position_rows

        self.patch_embed = PatchEmbed(patch, config.embed_dim)
        if learned_positions:
            rows = num_position_rows + self.grid_size[0] * self.grid_size[1]
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, config.embed_dim))
        else:
            positions = sincos_positions(self.grid_size, config.embed_dim)
            self.register_buffer("pos_embed", positions, persistent=False)
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
        """
        use_token = self.config.pool == "token"
        pooled = tokens[:, 0] if use_token else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a zero-initialised one; 0 classes leave the pooled features as output."""
        self.num_classes = num_classes
        self.head = self._new_head()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone: tokens, positions and ConViT's gates.

        Biases and norms are not listed: one-dimensional parameters are the optimizer's business.
        """
        exempt = {"cls_token", "dist_token", "pos_embed", "gating_param"}
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in exempt}

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal of std 0.02 for linear weights, tokens and positions; biases 0; the head all 0.

        The patch convolution keeps torch's default, as in timm and DeiT. A head of N(0, 0.02^2) starts a model of
        width 768 about 2 % above the loss ln(num_classes) of a uniform prediction; a zero head starts exactly there,
        and ViT and big_vision zero theirs too.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, module.init_values)
        for name in ("cls_token", "dist_token", "pos_embed"):
            parameter = getattr(self, name, None)
            if isinstance(parameter, nn.Parameter):
                nn.init.trunc_normal_(parameter, std=INIT_STD)
        self.reset_classifier(self.num_classes)

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.patch_embed.proj.weight
        head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head.train(self.training)

    def _positions(self, grid: Grid) -> Tensor:
        return resize_positions(
            self.pos_embed, old_grid=self.grid_size, new_grid=grid, num_prefix_rows=self.num_position_rows
        )


class VisionTransformer(ImageTransformer):
    """ViT, DeiT and DeiT III.

    With ``pool=avg`` the patch tokens are normalised, then averaged, as in big_vision; the class token, if any, is left
    out. timm's ``vit_*`` with ``global_pool='avg'`` average first and normalise after, with a norm called ``fc_norm``
    instead of ``norm``; its ``fc_norm=False`` is what is done here.

    Attributes:
        num_patches_kept: In training every sample keeps that many random patches (patch dropout, arXiv:2208.07220);
            None, or the number of patches and more, keeps all.
    """

    config: ViTConfig
    num_patches_kept: int | None = None

    def __init__(self, config: ViTConfig, *, num_classes: int, image_size: int) -> None:
        learned = config.position_embedding == "learned"
        num_prefix_tokens = int(config.class_token) + int(config.dist_token)
        super().__init__(
            config,
            num_classes=num_classes,
            image_size=image_size,
            num_prefix_tokens=num_prefix_tokens,
            num_position_rows=num_prefix_tokens if learned and config.prefix_positions else 0,
            learned_positions=learned,
        )
        width = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width)) if config.dist_token else None
        rates = drop_path_rates(config.drop_path_rate, config.depth, config.drop_path_mode)
        self.blocks = nn.ModuleList(self._block(config, rate) for rate in rates)
        self.init_weights()

    @staticmethod
    def _block(config: ViTConfig, drop_path_rate: float) -> Block:
        attention = SelfAttention(
            config.embed_dim,
            config.num_heads,
            qkv_bias=True,
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

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, P + N, D) that enter the first block: class, distillation, patches.

        N is ``num_patches_kept`` under patch dropout.
        """
        x, grid = self.patch_embed(x)
        positions = self._positions(grid)
        tokens = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        if self.num_position_rows:
            x = torch.cat((*tokens, x), dim=1) + positions
        else:
            x = torch.cat((*tokens, x + positions), dim=1)
        return self.pos_drop(self._drop_patches(x))

    def _drop_patches(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        prefix, kept = self.num_prefix_tokens, self.num_patches_kept
        if not self.training or kept is None or kept >= tokens - prefix:
            return x
        # The order of the patches is lost, which attention does not see: their positions are in them.
        index = prefix + torch.rand(batch, tokens - prefix, device=x.device).argsort(dim=1)[:, :kept]
        index = torch.cat((torch.arange(prefix, device=x.device).expand(batch, -1), index), dim=1)
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, width))

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DistilledVisionTransformer(VisionTransformer):
    """DeiT with a distillation token (arXiv:2012.12877, section 4); token order class, distillation, patches.

    In training ``forward`` returns (class logits, distillation logits), in evaluation the mean of the two, as DeiT's
    code does; the paper adds the two softmax outputs.
    """

    head_dist: nn.Module

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of both heads in training, their mean in evaluation; see the class.

        Args:
            pre_logits: Return the mean (B, D) of the two tokens instead.
        """
        cls_token, dist_token = tokens[:, 0], tokens[:, 1]
        if pre_logits:
            return (cls_token + dist_token) / 2
        logits, dist_logits = self.head(cls_token), self.head_dist(dist_token)
        return (logits, dist_logits) if self.training else (logits + dist_logits) / 2

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both heads by zero-initialised ones; 0 classes leave the tokens as output."""
        super().reset_classifier(num_classes)
        self.head_dist = self._new_head()


_TINY = ViTConfig(patch_size=16, embed_dim=192, depth=12, num_heads=3)
_SMALL = ViTConfig(patch_size=16, embed_dim=384, depth=12, num_heads=6)
_MEDIUM = ViTConfig(patch_size=16, embed_dim=512, depth=12, num_heads=8)
_BASE = ViTConfig(patch_size=16, embed_dim=768, depth=12, num_heads=12)
_LARGE = ViTConfig(patch_size=16, embed_dim=1024, depth=24, num_heads=16)
_HUGE = ViTConfig(patch_size=14, embed_dim=1280, depth=32, num_heads=16)


def _deit3(config: ViTConfig) -> ViTConfig:
    return replace(config, prefix_positions=False, init_values=1e-4, drop_path_mode="constant")


# ViT: arXiv:2010.11929, Table 1, tiny and small from DeiT. DeiT: arXiv:2012.12877, Table 1.
# DeiT III: arXiv:2204.07118 and the model files of facebookresearch/deit.
VARIANTS: dict[str, ViTConfig] = {
    "vit_tiny_patch16": _TINY,
    "vit_small_patch16": _SMALL,
    "vit_small_patch32": replace(_SMALL, patch_size=32),
    "vit_base_patch16": _BASE,
    "vit_base_patch32": replace(_BASE, patch_size=32),
    "vit_large_patch16": _LARGE,
    "vit_large_patch32": replace(_LARGE, patch_size=32),
    "vit_huge_patch14": _HUGE,
    "deit_tiny_patch16": _TINY,
    "deit_small_patch16": _SMALL,
    "deit_base_patch16": _BASE,
    "deit_tiny_distilled_patch16": replace(_TINY, dist_token=True),
    "deit_small_distilled_patch16": replace(_SMALL, dist_token=True),
    "deit_base_distilled_patch16": replace(_BASE, dist_token=True),
    "deit3_small_patch16": _deit3(_SMALL),
    "deit3_medium_patch16": _deit3(_MEDIUM),
    "deit3_base_patch16": _deit3(_BASE),
    "deit3_large_patch16": _deit3(_LARGE),
    "deit3_huge_patch14": _deit3(_HUGE),
}
