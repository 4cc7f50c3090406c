"""ViT (arXiv:2010.11929), DeiT (arXiv:2012.12877) and DeiT III (arXiv:2204.07118).

Shapes: B batch, H W pixels, N patches, P prefix tokens (class, distillation), D width.
Module and parameter names are timm's, so weights move both ways.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vitcomposer.models.layers import Block, SelfAttention, drop_path_rates
from vitcomposer.models.transformer import ImageTransformer, TransformerConfig, check_choice


@dataclass(frozen=True)
class ViTConfig(TransformerConfig):
    """Architecture of a ViT, DeiT or DeiT III.

    Args:
        class_token: Without it ``pool`` has to be ``avg``.
        position_embedding: ``learned``, or fixed and none for class and distillation token: ``sincos`` of big_vision,
            ``sincos_moco3`` of MoCo-v3 (``positions.sincos_positions``).
        dist_token: Distillation token with a head of its own. Part of a name, not an option.
        prefix_positions: Class and distillation token have a position too (ViT, DeiT; not DeiT III). Part of a name.
        combine_heads: Of what evaluation takes the mean, ``logits`` of the two heads or ``probabilities``; for a
            distilled model only, None is ``logits``.
    """

    class_token: bool = True
    position_embedding: str = "learned"
    dist_token: bool = False
    prefix_positions: bool = True
    combine_heads: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("position_embedding", self.position_embedding, ("learned", "sincos", "sincos_moco3"))
        if self.combine_heads is not None:
            check_choice("combine_heads", self.combine_heads, ("logits", "probabilities"))
            if not self.dist_token:
                raise ValueError(
                    f"model.combine_heads must be left out for a model with one head, got {self.combine_heads!r}; "
                    "remove it, or choose a model.name with _distilled"
                )
        if not self.class_token and self.pool == "token":
            raise ValueError("model.pool=token needs a class token, got model.class_token=false; use model.pool=avg")
        if self.dist_token and (self.pool != "token" or not self.class_token):
            raise ValueError(
                "a distilled model reads its class and distillation token: it needs model.pool=token and "
                f"model.class_token=true, got {self.pool} and {str(self.class_token).lower()}; "
                "use the name without _distilled"
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
            positions=config.position_embedding,
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

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the tokens (B, P + N, D) that enter the first block: class, distillation, patches.

        N is ``num_patches_kept`` under patch dropout.
        """
        x, grid = self.patch_embed(x)  # (B, N, D)
        positions = self._positions(grid)  # (1, N, D), or (1, P + N, D) where prefix tokens have a position
        tokens = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        if self.num_position_rows:
            x = torch.cat((*tokens, x), dim=1) + positions  # (B, P + N, D)
        else:
            x = torch.cat((*tokens, x + positions), dim=1)
        return self.pos_drop(self._drop_patches(x))

    def _drop_patches(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        prefix, kept = self.num_prefix_tokens, self.num_patches_kept
        if not self.training or kept is None or kept >= tokens - prefix:
            return x
        # The order of the patches is lost, which attention does not see: their positions are in them.
        index = prefix + torch.rand(batch, tokens - prefix, device=x.device).argsort(dim=1)[:, :kept]  # (B, kept)
        index = torch.cat((torch.arange(prefix, device=x.device).expand(batch, -1), index), dim=1)  # (B, P + kept)
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, width))  # (B, P + kept, D)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DistilledVisionTransformer(VisionTransformer):
    """DeiT with a distillation token (arXiv:2012.12877, section 4); token order class, distillation, patches.

    In training ``forward`` returns (class logits, distillation logits). In evaluation it returns their mean, as DeiT's
    code does, or, with ``combine_heads=probabilities``, the log of the mean of the two softmax outputs, which the paper
    adds.
    """

    head_dist: nn.Module

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of both heads in training, combined in evaluation; see the class.

        Args:
            pre_logits: Return the mean (B, D) of the two tokens instead.
        """
        cls_token, dist_token = tokens[:, 0], tokens[:, 1]  # (B, D) each
        if pre_logits:
            return (cls_token + dist_token) / 2
        logits, dist_logits = self.head(cls_token), self.head_dist(dist_token)
        if self.training:
            return logits, dist_logits
        if self.config.combine_heads == "probabilities" and self.num_classes:
            # logaddexp would be shorter, but ONNX has no such operator.
            both = torch.stack((logits.log_softmax(dim=-1), dist_logits.log_softmax(dim=-1)))  # (2, B, K)
            return both.logsumexp(dim=0) - math.log(2)
        return (logits + dist_logits) / 2

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both heads by ones that start anew; 0 classes leave the tokens as output."""
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
