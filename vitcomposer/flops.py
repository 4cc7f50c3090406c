"""What a network costs and what a device could do: FLOPs of one image, and peak FLOP/s by device name."""

import copy
import re
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(model: nn.Module, image_size: int) -> int:
    """FLOPs (2 x multiply-adds) of one image through ``model`` in evaluation mode.

    A training step costs 3 times as much: its backward pass computes the gradients of inputs and of weights.
    Matrix products and convolutions count, elementwise work doesn't. The model is neither run nor changed: a copy
    without storage on the meta device is.

    Args:
        image_size: Pixels; the input is (1, 3, image_size, image_size).
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(1, 3, image_size, image_size, dtype=dtype, device="meta")
    # MATH spells attention out as two products, which the counter knows; it doesn't know every fused operator.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _meta_copy(model).eval()(image)
    return counter.get_total_flops()


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


# Dense tensor-core FLOP/s of what Composer's table lacks; NVIDIA's sheets print twice as much, for sparse matrices.
_MORE_PEAKS: dict[str, dict[str, float]] = {
    # NVIDIA Blackwell datasheet (HGX B200 and GB200 NVL72, figures per GPU)
    "gb200": {"bf16": 2500e12, "tf32": 1250e12, "fp32": 80e12},
    "b200": {"bf16": 2250e12, "tf32": 1100e12, "fp32": 75e12},
    # NVIDIA H100 and H200 datasheets, column NVL
    "h100-nvl": {"bf16": 835e12, "tf32": 417.5e12, "fp32": 60e12},
    # NVIDIA L40S, L40 and L4 datasheets
    "l40s": {"bf16": 362.05e12, "tf32": 183e12, "fp32": 91.6e12},
    "l40": {"bf16": 181.05e12, "tf32": 90.5e12, "fp32": 90.5e12},
    "l4": {"bf16": 121e12, "tf32": 60e12, "fp32": 30.3e12},
    # NVIDIA RTX A6000 and A40 datasheets
    "a6000": {"bf16": 154.8e12, "tf32": 77.4e12, "fp32": 38.7e12},
    "a40": {"bf16": 149.7e12, "tf32": 74.8e12, "fp32": 37.4e12},
    # NVIDIA Ada and Ampere GA102 whitepapers, appendix A, products accumulated in fp32 as PyTorch does
    "rtx-4090": {"bf16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12},
    "rtx-3090": {"bf16": 71e12, "tf32": 35.6e12, "fp32": 35.6e12},
}

# Pattern in the lower-case device name, row of the tables. The first match counts: "gb200" holds "b200".
_DEVICES = (
    (r"gb200", "gb200"),
    (r"\bb200", "b200"),
    (r"h[12]00 nvl", "h100-nvl"),
    (r"h200", "h200-sxm"),  # and GH200, whose GPU is the same
    (r"h100.*(pcie|hbm2e)", "h100-pcie"),
    (r"h100", "h100-sxm"),
    (r"a100", "a100"),
    (r"l40s", "l40s"),
    (r"l40\b", "l40"),
    (r"\bl4\b", "l4"),
    (r"rtx a6000", "a6000"),
    (r"\ba40\b", "a40"),
    (r"\ba10\b", "a10"),
    (r"v100s-pcie", "v100s-pcie"),
    (r"v100-pcie", "v100-pcie"),
    (r"v100-sxm", "v100-sxm"),
    (r"\bt4\b", "t4"),
    (r"rtx 4090$", "rtx-4090"),
    (r"rtx 3090$", "rtx-3090"),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak FLOP/s of one device, or None where no published figure is known (a CPU, a slice of a GPU).

    Args:
        device_name: As ``torch.cuda.get_device_name()`` returns it.
        precision: ``fp32``, ``amp_bf16`` or ``amp_fp16``. fp32 means TF32 where the device has it, because Composer
            switches TF32 on.
    """
    from composer.callbacks.speed_monitor import GPU_AVAILABLE_FLOPS  # here: importing Composer takes seconds

    name = device_name.lower()
    row = next((row for pattern, row in _DEVICES if re.search(pattern, name)), None)
    if row is None or re.search(r"\bmig\b", name):
        return None
    if row in _MORE_PEAKS:
        peaks = _MORE_PEAKS[row]
        peaks = {**peaks, "amp_bf16": peaks["bf16"], "amp_fp16": peaks["bf16"]}
    else:
        peaks = GPU_AVAILABLE_FLOPS[row]
    return peaks.get("tf32", peaks.get("fp32")) if precision == "fp32" else peaks.get(precision)
