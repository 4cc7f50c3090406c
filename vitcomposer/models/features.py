"""Takes features of a frozen trunk by name, several from one forward pass.

Names, after VISSL's: ``lastCLS`` is the class token after the last block, ``concatCLS<n>`` those of the last n blocks
side by side (DINO's evaluation of ViT-S takes 4, arXiv:2104.14294, appendix), ``mean`` the mean of the patch tokens
after the last block, each after the final norm. ``pooled`` is what the trunk itself returns, the only one of a ResNet
and of networks of timm that are no ViT.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitcomposer.errors import ConfigError
from vitcomposer.models.transformer import ImageTransformer
from vitcomposer.models.trunks import Trunk, pooled_width

_CONCAT = re.compile(r"concatCLS([1-9]\d*)")
_NAMES = "lastCLS, concatCLS4 (or another number of blocks), mean or pooled"


class FrozenFeatures(nn.Module):
    """Images (B, 3, H, W) to features (B, width) by name, float32 or wider, without gradient.

    The trunk stays in evaluation mode whatever ``train()`` is called with, and its parameters get no gradient.

    Attributes:
        widths: Width of each feature.

    Raises:
        ConfigError: A name that is unknown or that this trunk cannot give.
    """

    def __init__(self, trunk: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False).eval()
        self.names = tuple(names)
        self._blocks = {name: _num_class_tokens(trunk, name) for name in names}
        width: Any = trunk.num_features
        self.widths = {name: width * max(1, count) for name, count in self._blocks.items()}
        self.widths |= {name: pooled_width(trunk) for name in names if name == "pooled"}
        self._outputs: list[Tensor] = []
        if max(self._blocks.values()) > 1:
            blocks: Any = trunk.blocks
            # The last block's class token is in what the trunk returns, behind its final norm.
            for block in blocks[-max(self._blocks.values()) : -1]:
                block.register_forward_hook(lambda _module, _inputs, output: self._outputs.append(output))

    def train(self, mode: bool = True) -> "FrozenFeatures":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        trunk: Any = self.trunk
        self._outputs.clear()
        tokens = trunk.forward_features(images)  # (B, P + N, D), or (B, D, rows, columns) of a ResNet
        class_tokens = [trunk.norm(output[:, 0]) for output in self._outputs]  # (B, D) of each earlier block
        self._outputs.clear()
        found = {}
        for name, blocks in self._blocks.items():
            if name == "pooled":
                found[name] = trunk.forward_head(tokens, pre_logits=True)
            elif name == "mean":
                found[name] = tokens[:, trunk.num_prefix_tokens :].mean(dim=1)
            else:
                earlier = class_tokens[len(class_tokens) - blocks + 1 :]
                found[name] = torch.cat((*earlier, tokens[:, 0]), dim=1)  # (B, blocks * D)
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return {name: feature.to(dtype) for name, feature in found.items()}


def _num_class_tokens(trunk: nn.Module, name: str) -> int:
    """Of how many blocks the feature takes the class token, 0 for those without."""
    match = _CONCAT.fullmatch(name)
    if match is None and name not in ("lastCLS", "mean", "pooled"):
        raise ConfigError(f"heads.features must be {_NAMES}, got {name!r}. Correct the name.")
    if name == "pooled":
        return 0
    network: Any = trunk
    if not isinstance(trunk, ImageTransformer) and not (isinstance(trunk, Trunk) and trunk.of_timm.vit_shaped):
        raise ConfigError(f"heads.features must be pooled for a {type(trunk).__name__}, got {name!r}. Use [pooled].")
    if name == "mean":
        return 0
    if not network.num_prefix_tokens or getattr(network, "cls_token", None) is None:
        raise ConfigError(f"heads.features must be mean or pooled for a model without class token, got {name!r}.")
    # The class token of ConViT joins after its local blocks.
    having = len(network.blocks) - getattr(getattr(network, "config", None), "local_up_to_layer", 0)
    count = int(match[1]) if match else 1
    if count > having:
        raise ConfigError(
            f"heads.features must name at most the {having} blocks of this model that have a class token, got "
            f"{name!r}. Use concatCLS{having}."
        )
    return count
