"""Initializes the weights of a vision transformer as the code behind each paper does: ``model.weight_init``.

    tensor                  deit                 big_vision                    moco3
    queries, keys, values   N(0, 0.02^2)         uniform, Xavier, each alone   uniform, Xavier, each alone
    other linear layers     N(0, 0.02^2)         uniform, Xavier               uniform, Xavier
    their biases            0                    0; of the MLP N(0, 1e-12)     0
    patch projection        torch's default      LeCun's normal, bias 0        uniform, Xavier, bias 0
    class token             N(0, 0.02^2)         0                             N(0, 1e-12)
    learned positions       N(0, 0.02^2)         N(0, 1 / D), of tokens 0      N(0, 0.02^2)
    head                    N(0, 0.02^2)         0                             uniform, Xavier

``deit`` is what DeiT (arXiv:2012.12877), DeiT III, ConViT, DINO and VISSL have in common, all of them after timm 0.3;
timm of today differs from it in the class token, N(0, 1e-12). ``big_vision`` is that of google-research/big_vision, by
which "Better plain ViT baselines" was trained (arXiv:2205.01580); its zero head makes the first loss exactly
ln(num_classes). ``moco3`` is that of facebookresearch/moco-v3 (arXiv:2104.02057), whose positions are fixed.

The papers' code cuts its normals off at -2 and 2, a hundred standard deviations away. That cuts nothing, but torch's
way of doing it gives one weight in 2^24 the value -2; a plain normal does not.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vitcomposer.models.layers import LayerScale

INIT_STD = 0.02
WEIGHT_INITS = ("deit", "big_vision", "moco3")
_ALMOST_ZERO = 1e-6
_ATTENTION_INPUTS = ("qkv", "qk")  # several square matrices in one layer


@torch.no_grad()
def init_transformer(model: Any, scheme: str) -> None:
    """Start all of a ViT or ConViT but its head, which :func:`init_head` starts; norms keep their ones and zeros."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            _init_linear(module, scheme, name)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.gamma, module.init_values)
    _init_patches(model.patch_embed.proj, scheme)
    _init_tokens(model, scheme)


@torch.no_grad()
def init_head(head: nn.Linear, scheme: str) -> None:
    """Start a classifier."""
    if scheme == "big_vision":
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    else:
        _init_linear(head, scheme, "head")


def _init_linear(linear: nn.Linear, scheme: str, name: str) -> None:
    parent, _, own = name.rpartition(".")
    if scheme == "deit":
        nn.init.normal_(linear.weight, std=INIT_STD)
    else:
        # The weight of qkv is (3 D, D): each of its three D x D matrices is taken by itself.
        parts = linear.out_features // linear.in_features if own in _ATTENTION_INPUTS else 1
        _xavier_uniform(linear.weight, linear.in_features, linear.out_features // parts)
    if linear.bias is None:
        return
    if scheme == "big_vision" and parent.endswith("mlp"):
        nn.init.normal_(linear.bias, std=_ALMOST_ZERO)
    else:
        nn.init.zeros_(linear.bias)


def _init_patches(projection: nn.Conv2d, scheme: str) -> None:
    if scheme == "deit":
        return
    pixels = projection.weight[0].numel()  # values of one patch, in three colours
    if scheme == "moco3":
        _xavier_uniform(projection.weight, pixels, projection.out_channels)
    else:
        # Cut off at two standard deviations, then widened so that the rest has variance 1 / pixels.
        std = pixels**-0.5 / 0.87962566103423978
        nn.init.trunc_normal_(projection.weight, std=std, a=-2 * std, b=2 * std)
    assert projection.bias is not None
    nn.init.zeros_(projection.bias)


def _init_tokens(model: Any, scheme: str) -> None:
    class_std = {"deit": INIT_STD, "big_vision": 0.0, "moco3": _ALMOST_ZERO}[scheme]
    for name, std in (("cls_token", class_std), ("dist_token", INIT_STD)):
        token = getattr(model, name, None)
        if token is not None:
            nn.init.normal_(token, std=std)
    if not isinstance(model.pos_embed, nn.Parameter):
        return
    if scheme == "big_vision":
        nn.init.normal_(model.pos_embed, std=model.embed_dim**-0.5)
        model.pos_embed[:, : model.num_position_rows].zero_()
    else:
        nn.init.normal_(model.pos_embed, std=INIT_STD)


def _xavier_uniform(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Uniform with variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010, eq. 16)."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound)
