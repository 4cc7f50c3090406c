"""What a network costs and what a device could do: FLOPs of one image, peaks by device name, and a roofline of both."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitcomposer.models.convit import ConViT
from vitcomposer.models.transformer import ImageTransformer

TRAIN_FACTOR = 3  # a training step: the backward pass computes the gradients of inputs and of weights


def forward_flops(model: nn.Module, image_size: int, *, patch_keep_rate: float = 1.0) -> int:
    """FLOPs (2 x multiply-adds) of one image through ``model`` in the forward pass.

    A training step costs ``TRAIN_FACTOR`` times as much. Matrix products and convolutions count, elementwise work
    doesn't. The model is neither run nor changed: a copy without storage on the meta device is, in evaluation mode.

    Args:
        image_size: Pixels; the input is (1, 3, image_size, image_size).
        patch_keep_rate: Share of the patches that patch dropout keeps, in (0, 1].

    Raises:
        ValueError: ``patch_keep_rate`` below 1 for a model that cannot drop patches.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(1, 3, image_size, image_size, dtype=dtype, device="meta")
    measured: Any = _meta_copy(model).eval()
    if patch_keep_rate < 1.0:
        measured.num_patches_kept = _patches(model, image_size, patch_keep_rate)
        # Of this module alone: stochastic depth in its blocks would skip samples, and dropout has no product.
        measured.training = True
    # MATH spells attention out as two products, which the counter knows; it doesn't know every fused operator.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        measured(image)
    return counter.get_total_flops()


def train_factor(model: nn.Module, train_blocks: int | None) -> float:
    """What a training image costs in forward passes, where the last ``train_blocks`` blocks learn; None is all of them.

    The backward pass stops at the first block that learns. Embedding and head are counted as nothing.
    """
    if train_blocks is None:
        return TRAIN_FACTOR
    return 1 + (TRAIN_FACTOR - 1) * train_blocks / len(cast(nn.ModuleList, model.blocks))


def multi_crop_flops(trunk: nn.Module, num_crops: Sequence[int], size_crops: Sequence[int]) -> int:
    """Forward FLOPs of all crops of one image: ``num_crops[g]`` of ``size_crops[g]`` pixels in every group g."""
    return sum(n * forward_flops(trunk, size) for n, size in zip(num_crops, size_crops, strict=True))


def _patches(model: nn.Module, image_size: int, keep_rate: float) -> int:
    """Patch tokens of one image that enter the blocks."""
    if keep_rate < 1.0 and not hasattr(model, "num_patches_kept"):
        raise ValueError(f"patch dropout needs a ViT or DeiT, got {type(model).__name__}. Leave it out.")
    patches = (image_size // getattr(model, "patch_size", image_size)) ** 2
    return max(1, round(patches * keep_rate))


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose every tensor is on the meta device. ``deepcopy`` takes what its memo holds for a copy."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # vars() also finds tensors that are neither parameter nor buffer, such as cached relative positions.
        for held in (vars(module), module._parameters, module._buffers):
            for value in held.values():
                if isinstance(value, nn.Parameter):
                    memo[id(value)] = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
                elif isinstance(value, torch.Tensor):
                    memo[id(value)] = value.detach().to("meta")
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Kernels:
    """How near to a card's limits today's kernels come; estimates that reproduce what is published of ViT training.

    Args:
        matmul: Share of the dense peak in the products of a network, by its width; interpolated over log(width).
        attention: Share of the dense peak in fused attention at about 200 tokens.
    """

    matmul: dict[int, float]
    attention: float


# The faster the tensor cores against memory, the less of them a narrow network uses. Widths are those of ViT-Ti (beyond
# what is published: extrapolated), S, B and L; attention is 250 TFLOP/s on an H100, 120 on an A100. With them the best
# compiled PyTorch figure for a ViT-S on an H100, 8,003 images/s of a heavier variant, lies 26 % under its roofline.
_HOPPER = Kernels({192: 0.54, 384: 0.62, 768: 0.70, 1024: 0.74}, attention=0.253)
_AMPERE = Kernels({192: 0.64, 384: 0.72, 768: 0.80, 1024: 0.84}, attention=0.385)
_HBM_SHARE = 0.88  # of the bandwidth that streaming kernels reach
# Bytes that elementwise kernels move per token, layer and unit of width in the forward pass under 16-bit autocast with
# norms, GELU and residuals fused by torch.compile; backward moves 2.2 times as much.
_ELEMENTWISE_BYTES, _ELEMENTWISE_TRAIN = 48, 3.2
_GPSA_BYTES = 12  # more in a layer of ConViT: values in the order of the grid, mixed over rows, then over columns
_ATTENTION_TRAIN = 3.5  # fused attention computes the scores again in the backward pass
# Stored for backward per token, layer and unit of width: arXiv:2205.05198, section 4.1, without attention maps.
ACTIVATION_BYTES = 34


@dataclass(frozen=True)
class Gpu:
    """Published limits of one card: dense FLOP/s by format, bytes of memory and bytes/s."""

    peaks: dict[str, float]
    memory_bytes: float
    bandwidth: float
    kernels: Kernels

    def peak(self, precision: str) -> float | None:
        """Dense FLOP/s for Composer's ``precision``; fp32 means TF32 where the card has it, as Composer sets it."""
        if precision == "fp32":
            return self.peaks.get("tf32", self.peaks["fp32"])
        return self.peaks.get(precision.removeprefix("amp_"))


def _gpu(memory: float, bandwidth: float, kernels: Kernels, **teraflops: float) -> Gpu:
    """Memory in GB, bandwidth in TB/s, formats in TFLOP/s; fp16 is as fast as bf16 where only that is given."""
    peaks = {name: value * 1e12 for name, value in teraflops.items()}
    if "bf16" in peaks:
        peaks["fp16"] = peaks["bf16"]
    return Gpu(peaks, memory * 1e9, bandwidth * 1e12, kernels)


# Dense tensor-core figures; NVIDIA's sheets print twice as much, for sparse matrices.
GPUS: dict[str, Gpu] = {
    # NVIDIA Blackwell datasheet (GB200 NVL72 and HGX B200, figures per GPU)
    "gb200": _gpu(186, 8.0, _HOPPER, bf16=2500, tf32=1250, fp32=80),
    "b200": _gpu(180, 7.7, _HOPPER, bf16=2250, tf32=1100, fp32=75),
    # NVIDIA H100 and H200 datasheets: SXM, NVL, PCIe
    "h200": _gpu(141, 4.8, _HOPPER, bf16=989.5, tf32=494.5, fp32=67),
    "h100": _gpu(80, 3.35, _HOPPER, bf16=989.5, tf32=494.5, fp32=67),
    "h100-nvl": _gpu(94, 3.9, _HOPPER, bf16=835, tf32=417.5, fp32=60),
    "h100-pcie": _gpu(80, 2.0, _HOPPER, bf16=756.5, tf32=378, fp32=51),
    # NVIDIA A100 datasheet: SXM
    "a100": _gpu(80, 2.039, _AMPERE, bf16=312, tf32=156, fp32=19.5),
    "a100-40": _gpu(40, 1.555, _AMPERE, bf16=312, tf32=156, fp32=19.5),
    # NVIDIA L40S, L40, L4, RTX A6000, A40 and A10 datasheets
    "l40s": _gpu(48, 0.864, _AMPERE, bf16=362.05, tf32=183, fp32=91.6),
    "l40": _gpu(48, 0.864, _AMPERE, bf16=181.05, tf32=90.5, fp32=90.5),
    "l4": _gpu(24, 0.3, _AMPERE, bf16=121, tf32=60, fp32=30.3),
    "a6000": _gpu(48, 0.768, _AMPERE, bf16=154.8, tf32=77.4, fp32=38.7),
    "a40": _gpu(48, 0.696, _AMPERE, bf16=149.7, tf32=74.8, fp32=37.4),
    "a10": _gpu(24, 0.6, _AMPERE, bf16=125, tf32=62.5, fp32=31.2),
    # NVIDIA Ada and Ampere GA102 whitepapers, appendix A, products accumulated in fp32 as PyTorch does
    "rtx-4090": _gpu(24, 1.008, _AMPERE, bf16=165.2, tf32=82.6, fp32=82.6),
    "rtx-3090": _gpu(24, 0.936, _AMPERE, bf16=71, tf32=35.6, fp32=35.6),
    # NVIDIA V100 and T4 datasheets; no bf16
    "v100": _gpu(32, 0.9, _AMPERE, fp16=125, fp32=15.7),
    "v100-pcie": _gpu(32, 0.9, _AMPERE, fp16=112, fp32=14),
    "v100s": _gpu(32, 1.134, _AMPERE, fp16=130, fp32=16.4),
    "t4": _gpu(16, 0.32, _AMPERE, fp16=65, fp32=8.1),
}

# Pattern in the lower-case device name, row of the table. The first match counts: "gb200" holds "b200".
_DEVICES = (
    (r"gb200", "gb200"),
    (r"\bb200", "b200"),
    (r"h[12]00 nvl", "h100-nvl"),
    (r"h200", "h200"),  # and GH200, whose GPU is the same
    (r"h100.*(pcie|hbm2e)", "h100-pcie"),
    (r"h100", "h100"),
    (r"a100.*40gb", "a100-40"),
    (r"a100", "a100"),
    (r"l40s", "l40s"),
    (r"l40\b", "l40"),
    (r"\bl4\b", "l4"),
    (r"rtx a6000", "a6000"),
    (r"\ba40\b", "a40"),
    (r"\ba10\b", "a10"),
    (r"v100s-pcie", "v100s"),
    (r"v100-pcie", "v100-pcie"),
    (r"v100-sxm", "v100"),
    (r"\bt4\b", "t4"),
    (r"rtx 4090$", "rtx-4090"),
    (r"rtx 3090$", "rtx-3090"),
)


def gpu_of_device(device_name: str) -> str | None:
    """The row of ``GPUS`` for what ``torch.cuda.get_device_name()`` returns; None for a slice of a GPU and a CPU."""
    name = device_name.lower()
    if re.search(r"\bmig\b", name):
        return None
    return next((row for pattern, row in _DEVICES if re.search(pattern, name)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak FLOP/s of one device, or None where no published figure is known (a CPU, a slice of a GPU).

    Args:
        device_name: As ``torch.cuda.get_device_name()`` returns it.
        precision: ``fp32``, ``amp_bf16`` or ``amp_fp16``. fp32 means TF32 where the device has it, because Composer
            switches TF32 on.
    """
    row = gpu_of_device(device_name)
    return None if row is None else GPUS[row].peak(precision)


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
