"""Says how long one training image takes on a GPU: by measured steps where there are some, else by the roofline."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitcomposer.cost import flops, roofline
from vitcomposer.cost.gpus import GPUS, gpu_of_device
from vitcomposer.cost.measured import read_measured
from vitcomposer.errors import require

ROOFLINE = "roofline estimate, not measured"


class View(NamedTuple):
    """Crops of one image that go through the network in one pass, with all or some of their patches."""

    count: int
    image_size: int
    patch_keep_rate: float


class Network:
    """A network without storage, whose counted FLOPs are remembered."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.parameters = sum(p.numel() for p in module.parameters())
        self.family = "convit" if hasattr(getattr(module, "config", None), "local_up_to_layer") else "vit"
        self.width: int | None = getattr(module, "embed_dim", None)
        self._known: dict[tuple[int, float], int] = {}

    def forward_flops(self, image_size: int, *, patch_keep_rate: float = 1.0) -> int:
        """`flops.forward_flops` of this network."""
        key = image_size, patch_keep_rate
        if key not in self._known:
            self._known[key] = flops.forward_flops(self.module, image_size, patch_keep_rate=patch_keep_rate)
        return self._known[key]

    def train_flops(self, view: View) -> int:
        """Of all the view's crops, where the whole network learns."""
        once = self.forward_flops(view.image_size, patch_keep_rate=view.patch_keep_rate)
        return flops.TRAIN_FACTOR * view.count * once

    def work(self, view: View) -> roofline.Work | None:
        """Of one of the view's crops."""
        return roofline.forward_work(self.module, view.image_size, patch_keep_rate=view.patch_keep_rate)


class Speed:
    """Seconds of one training image on one GPU, from measured MFU where there is one, else from the roofline.

    Args:
        gpu: Row of ``GPUS``.
        results: Folder with ``gpu_*.json`` of benchmarks/gpu.py.
        measured: Such a file, which then has to be of this GPU, precision and kind of network; or a file of
            ``vitcomposer bench``, whose step counts where it is, and else the folder's.

    Raises:
        ConfigError: The GPU has no such precision; a file that says nothing of it.
    """

    def __init__(self, network: Network, gpu: str, precision: str, results: Path, measured: Path | None = None) -> None:
        self._network, self._gpu = network, GPUS[gpu]
        peak = self._gpu.peak(precision)
        require(peak is not None, "precision", f"one that a {gpu} has", precision, "Add precision=amp_fp16.")
        self.peak = float(peak or 0.0)
        of_bench = measured is not None and "input" in read_measured(measured)
        files = [] if measured is None else [measured]
        files += sorted(results.glob("gpu_*.json")) if measured is None or of_bench else []
        found = _measured_mfu(network, gpu, files) if precision == "amp_bf16" else None
        rule = f"a file in which benchmarks/gpu.py has measured a network of this kind and width on a {gpu}"
        fits = found is not None or measured is None or of_bench
        require(fits, "--measured", rule, f"{measured} for precision {precision}", "Leave it out for an estimate.")
        points, source, self.compiled = found or ({}, None, True)
        self._costs, self._mfus = sorted(points), [points[cost] for cost in sorted(points)]
        self.basis = ROOFLINE if source is None else f"measured MFU of {source}"

    def seconds(self, view: View) -> float | None:
        """Of one image's crops, forward and backward; None for a network of which neither is known."""
        cost, work = self._network.train_flops(view) / view.count, self._network.work(view)
        if self._costs:
            mfu = float(np.interp(math.log(cost), np.log(self._costs), self._mfus))
            return view.count * cost / (mfu * self.peak)
        return None if work is None else view.count * sum(roofline.roofline_seconds(work, cost, self._gpu, self.peak))


def _measured_mfu(network: Network, gpu: str, files: list[Path]) -> tuple[dict[float, float], str, bool] | None:
    """MFU by training FLOPs of an image, of bf16 steps of this kind of network on this GPU; their file; if compiled."""
    kind = network.family, network.width
    for path in files:
        found = read_measured(path)
        if gpu_of_device(found["device"]) != gpu:
            continue
        best, compiled = {}, True
        for row in (row for section in ("training", "stages", "batches") for row in found["sections"].get(section, [])):
            ours = row.get("who") == "vitcomposer" and row.get("precision", "amp_bf16") == "amp_bf16"
            if ours and (row["family"], row["width"]) == kind and row["mfu"]:
                cost = row["train_flops_per_image"]
                best[cost] = max(best.get(cost, 0.0), row["mfu"])
                compiled = compiled and bool(row.get("compiled", True))
        if best:
            return best, path.name, compiled
    return None
