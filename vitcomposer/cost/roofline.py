"""Estimates the time of a step from its FLOPs and the bytes that it moves (a roofline), where nothing was measured."""

from dataclasses import dataclass

import numpy as np
from torch import nn

from vitcomposer.cost.flops import TRAIN_FACTOR, _patches
from vitcomposer.cost.gpus import Gpu
from vitcomposer.models.convit import ConViT
from vitcomposer.models.transformer import ImageTransformer

_HBM_SHARE = 0.88  # of the bandwidth that streaming kernels reach
# Bytes that elementwise kernels move per token, layer and unit of width in the forward pass under 16-bit autocast with
# norms, GELU and residuals fused by torch.compile; backward moves 2.2 times as much.
_ELEMENTWISE_BYTES, _ELEMENTWISE_TRAIN = 48, 3.2
_GPSA_BYTES = 12  # more in a layer of ConViT: values in the order of the grid, mixed over rows, then over columns
_ATTENTION_TRAIN = 3.5  # fused attention computes the scores again in the backward pass
# Stored for backward per token, layer and unit of width: arXiv:2205.05198, section 4.1, without attention maps.
ACTIVATION_BYTES = 34


@dataclass(frozen=True)
class Work:
    """What one image asks of a GPU in the forward pass of a transformer, beside its matrix products.

    Attributes:
        attention_flops: Of fused softmax attention.
        elementwise_bytes: Memory traffic of what is no product.
        activation_bytes: Held from forward to backward in a training step.
    """

    width: int
    attention_flops: int
    elementwise_bytes: float
    activation_bytes: float


def forward_work(model: nn.Module, image_size: int, *, patch_keep_rate: float = 1.0) -> Work | None:
    """The work of one image, or None for a network that is no ViT, DeiT or ConViT; arguments as `forward_flops`."""
    if not isinstance(model, ImageTransformer):
        return None
    patches, config, width = _patches(model, image_size, patch_keep_rate), model.config, model.embed_dim
    local = model.config.local_up_to_layer if isinstance(model, ConViT) else 0
    tokens = [patches] * local + [patches + model.num_prefix_tokens] * (config.depth - local)
    return Work(
        width=width,
        attention_flops=sum(4 * n * n * width for n in tokens),
        elementwise_bytes=width * (_ELEMENTWISE_BYTES * sum(tokens) + _GPSA_BYTES * patches * local),
        activation_bytes=ACTIVATION_BYTES * width * sum(tokens),
    )


def roofline_seconds(work: Work, train_flops: float, gpu: Gpu, peak: float) -> tuple[float, float, float]:
    """Seconds of one training image in products, fused attention and elementwise traffic; an estimate, +-15 %.

    Additive: kernels of the three kinds follow each other, and each comes as near to its own limit as ``gpu.kernels``
    and published figures say. Compiled, 16-bit autocast, large batches; the optimizer's step is left out.

    Args:
        train_flops: Of the image forward and backward, as counted.
        peak: Of ``gpu`` in the precision of the run.
    """
    widths = sorted(gpu.kernels.matmul)
    shares = [gpu.kernels.matmul[width] for width in widths]
    share = float(np.interp(np.log(work.width), np.log(widths), shares))
    return (
        (train_flops - TRAIN_FACTOR * work.attention_flops) / (share * peak),
        _ATTENTION_TRAIN * work.attention_flops / (gpu.kernels.attention * peak),
        _ELEMENTWISE_TRAIN * work.elementwise_bytes / (_HBM_SHARE * gpu.bandwidth),
    )
