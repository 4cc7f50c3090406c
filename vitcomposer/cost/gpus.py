"""Lists what GPUs can do: peak FLOP/s, memory and bandwidth, and the share of them that kernels reach."""

import re
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Gpu:
    """Published limits of one card: dense FLOP/s by format, bytes of memory, bytes/s of it and from the host."""

    peaks: dict[str, float]
    memory_bytes: float
    bandwidth: float
    host_bandwidth: float
    kernels: Kernels

    @property
    def automatic(self) -> str:
        """What ``precision: auto`` is on this card."""
        return "amp_bf16" if "bf16" in self.peaks else "fp32"

    def peak(self, precision: str) -> float | None:
        """Dense FLOP/s for Composer's ``precision``; fp32 means TF32 where the card has it, as Composer sets it."""
        if precision == "fp32":
            return self.peaks.get("tf32", self.peaks["fp32"])
        return self.peaks.get(precision.removeprefix("amp_"))


# GB/s in one direction: 16 lanes of PCI Express by generation, and half of NVLink-C2C (900 GB/s in both directions for
# the two GPUs of a GB200).
_PCIE3, _PCIE4, _PCIE5, _C2C = 15.75, 31.5, 63.0, 225.0


def _gpu(memory: float, bandwidth: float, host: float, kernels: Kernels, **teraflops: float) -> Gpu:
    """Memory in GB, its bandwidth in TB/s, the host's in GB/s, formats in TFLOP/s; fp16 is as bf16 where not given."""
    peaks = {name: value * 1e12 for name, value in teraflops.items()}
    if "bf16" in peaks:
        peaks["fp16"] = peaks["bf16"]
    return Gpu(peaks, memory * 1e9, bandwidth * 1e12, host * 1e9, kernels)


# Dense tensor-core figures; NVIDIA's sheets print twice as much, for sparse matrices.
GPUS: dict[str, Gpu] = {
    # NVIDIA Blackwell datasheet (GB200 NVL72 and HGX B200, figures per GPU)
    "gb200": _gpu(186, 8.0, _C2C, _HOPPER, bf16=2500, tf32=1250, fp32=80),
    "b200": _gpu(180, 7.7, _PCIE5, _HOPPER, bf16=2250, tf32=1100, fp32=75),
    # NVIDIA H100 and H200 datasheets: SXM, NVL, PCIe
    "h200": _gpu(141, 4.8, _PCIE5, _HOPPER, bf16=989.5, tf32=494.5, fp32=67),
    "h100": _gpu(80, 3.35, _PCIE5, _HOPPER, bf16=989.5, tf32=494.5, fp32=67),
    "h100-nvl": _gpu(94, 3.9, _PCIE5, _HOPPER, bf16=835, tf32=417.5, fp32=60),
    "h100-pcie": _gpu(80, 2.0, _PCIE5, _HOPPER, bf16=756.5, tf32=378, fp32=51),
    # NVIDIA A100 datasheet: SXM
    "a100": _gpu(80, 2.039, _PCIE4, _AMPERE, bf16=312, tf32=156, fp32=19.5),
    "a100-40": _gpu(40, 1.555, _PCIE4, _AMPERE, bf16=312, tf32=156, fp32=19.5),
    # NVIDIA L40S, L40, L4, RTX A6000, A40 and A10 datasheets
    "l40s": _gpu(48, 0.864, _PCIE4, _AMPERE, bf16=362.05, tf32=183, fp32=91.6),
    "l40": _gpu(48, 0.864, _PCIE4, _AMPERE, bf16=181.05, tf32=90.5, fp32=90.5),
    "l4": _gpu(24, 0.3, _PCIE4, _AMPERE, bf16=121, tf32=60, fp32=30.3),
    "a6000": _gpu(48, 0.768, _PCIE4, _AMPERE, bf16=154.8, tf32=77.4, fp32=38.7),
    "a40": _gpu(48, 0.696, _PCIE4, _AMPERE, bf16=149.7, tf32=74.8, fp32=37.4),
    "a10": _gpu(24, 0.6, _PCIE4, _AMPERE, bf16=125, tf32=62.5, fp32=31.2),
    # NVIDIA Ada and Ampere GA102 whitepapers, appendix A, products accumulated in fp32 as PyTorch does
    "rtx-4090": _gpu(24, 1.008, _PCIE4, _AMPERE, bf16=165.2, tf32=82.6, fp32=82.6),
    "rtx-3090": _gpu(24, 0.936, _PCIE4, _AMPERE, bf16=71, tf32=35.6, fp32=35.6),
    # NVIDIA V100 and T4 datasheets; no bf16
    "v100": _gpu(32, 0.9, _PCIE3, _AMPERE, fp16=125, fp32=15.7),
    "v100-pcie": _gpu(32, 0.9, _PCIE3, _AMPERE, fp16=112, fp32=14),
    "v100s": _gpu(32, 1.134, _PCIE3, _AMPERE, fp16=130, fp32=16.4),
    "t4": _gpu(16, 0.32, _PCIE3, _AMPERE, fp16=65, fp32=8.1),
}


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
