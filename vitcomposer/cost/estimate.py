"""Estimates what a recipe costs on given GPUs, without a GPU and without the data: the figures of ``vitcomposer plan``.

FLOPs are counted and steps are those of the run; every other figure says what it comes from, a measurement in
``benchmarks/results`` or an estimate. Composer is not imported.
"""

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from vitcomposer import curriculum
from vitcomposer.cost import flops, roofline
from vitcomposer.cost.gpus import GPUS, gpu_of_device
from vitcomposer.errors import ConfigError, did_you_mean, require
from vitcomposer.json_file import read_json
from vitcomposer.models import build_model
from vitcomposer.models.heads import build_dino_head, build_moco_heads, build_simclr_head, build_swav_head
from vitcomposer.models.transformer import num_recomputed
from vitcomposer.schema import DINO, Distill, MoCo, Model, SelfSupervised, SimCLR, Supervised, SwAV
from vitcomposer.schema.recipe import Recipe
from vitcomposer.teacher.network import build_teacher_network

ROOFLINE = "roofline estimate, not measured"
# Bytes of optimizer state per parameter: two float32 moments where nothing else is said.
_TWO_MOMENTS, _ONE_MOMENT = 8, {"sgd": 4, "lion": 4, "muon": 4}


class View(NamedTuple):
    """Crops of one image that go through the network in one pass, with all or some of their patches."""

    count: int
    image_size: int
    patch_keep_rate: float


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Steps in a row of one kind. Rates are of all GPUs together; None where nothing known says how fast they are.

    Attributes:
        cpu_cores: That decode the images, at the measured images per CPU second; None where none were measured.
        bytes_to_gpus_per_second: Of uint8 pixels from host to devices.
    """

    image_size: int
    num_patches_kept: int | None
    steps: int
    train_flops_per_image: float
    images_per_second: float | None
    mfu: float | None
    hours: float | None
    cpu_cores: int | None
    bytes_to_gpus_per_second: float | None


class Network:
    """A network without storage, whose counted FLOPs are remembered."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.parameters = sum(p.numel() for p in module.parameters())
        self.family = "convit" if hasattr(getattr(module, "config", None), "local_up_to_layer") else "vit"
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
        results: Folder with ``gpu_*.json`` of benchmarks/gpu.py, or such a file, which then has to be of this GPU,
            precision and kind of network.

    Raises:
        ConfigError: The GPU has no such precision; a file that says nothing of it.
    """

    def __init__(self, network: Network, gpu: str, precision: str, results: Path) -> None:
        self._network, self._gpu = network, GPUS[gpu]
        peak = self._gpu.peak(precision)
        require(peak is not None, "precision", f"one that a {gpu} has", precision, "Add precision=amp_fp16.")
        self.peak = float(peak or 0.0)
        points, source = _measured_mfu(network, gpu, results) if precision == "amp_bf16" else ({}, None)
        rule = f"a file in which benchmarks/gpu.py has measured a network of this kind and width on a {gpu}"
        given = f"{results} for precision {precision}"
        require(source is not None or not results.is_file(), "--measured", rule, given, "Leave it out for an estimate.")
        self._costs, self._mfus = sorted(points), [points[cost] for cost in sorted(points)]
        self.basis = ROOFLINE if source is None else f"measured MFU of {source}"

    def seconds(self, view: View) -> float | None:
        """Of one image's crops, forward and backward; None for a network of which neither is known."""
        cost, work = self._network.train_flops(view) / view.count, self._network.work(view)
        if self._costs:
            mfu = float(np.interp(math.log(cost), np.log(self._costs), self._mfus))
            return view.count * cost / (mfu * self.peak)
        return None if work is None else view.count * sum(roofline.roofline_seconds(work, cost, self._gpu, self.peak))


def _measured_mfu(network: Network, gpu: str, results: Path) -> tuple[dict[float, float], str | None]:
    """MFU by training FLOPs of an image, of compiled bf16 steps of this kind of network on this GPU, and their file."""
    kind = network.family, getattr(network.module, "embed_dim", None)
    for path in [results] if results.is_file() else sorted(results.glob("gpu_*.json")):
        found = _read_measurements(path)
        if gpu_of_device(found["device"]) != gpu:
            continue
        best: dict[float, float] = {}
        for row in (row for section in ("training", "stages", "batches") for row in found["sections"].get(section, [])):
            if row.get("who") == "vitcomposer" and (row["family"], row["width"]) == kind and row["mfu"]:
                cost = row["train_flops_per_image"]
                best[cost] = max(best.get(cost, 0.0), row["mfu"])
        if best:
            return best, path.name
    return {}, None


def _read_measurements(path: Path) -> dict[str, Any]:
    """What benchmarks/gpu.py wrote.

    Raises:
        ConfigError: It wrote something else, or measured nothing (``--quick``).
    """
    try:
        found = read_json(path)
        rows = [row for section in found["sections"].values() for row in section]
        whole = isinstance(found["device"], str) and all(isinstance(row, dict) for row in rows)
        whole = whole and not found.get("smoke")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole, found = False, {}
    rule, remedy = "what benchmarks/gpu.py writes without --quick", "Run it on that GPU, or plan without the file."
    require(whole, str(path), rule, "something else", remedy)
    return found


def costs_of(  # noqa: PLR0913 (all but one are named at the call)
    cfg: Recipe, *, gpu: str, gpus: int, images: int, results: Path, measured: Path | None = None
) -> dict[str, Any]:
    """Every figure of ``vitcomposer plan``, as ``--json`` writes them.

    Args:
        cfg: Of any recipe, from ``config.load``.
        images: Of the training set.
        results: Folder of measurements: of the input, and of GPUs where ``measured`` names no file.

    Raises:
        ConfigError: A GPU that is not known, a file without measurements of it, or what the run itself would refuse of
            batch, duration and curriculum.
    """
    gpu = _row_of(gpu)
    trains = isinstance(cfg, Supervised | SelfSupervised)
    require(trains, "recipe", "one that trains a network", cfg.recipe, "A frozen network has no plan.")
    assert isinstance(cfg, Supervised | SelfSupervised)
    batch = cfg.global_train_batch_size
    require(gpus >= 1, "--gpus", "1 or more", gpus, "Use 8.")
    remedy = f"Use --gpus {math.gcd(batch, gpus)}."
    require(batch % gpus == 0, "global_train_batch_size", f"divisible by --gpus {gpus}", batch, remedy)
    require(images >= batch, "--images", f"at least global_train_batch_size={batch}", images, "Count your images.")
    network = Network(build_without_storage(cfg.model))
    stages = stages_of(cfg, network, steps_per_epoch=images // batch)
    precision = cfg.precision if cfg.precision != "auto" else GPUS[gpu].automatic
    speed, supply = Speed(network, gpu, precision, measured or results), _supply(cfg, results)
    views = [_views(cfg, stage, network.module) for stage in stages.stages]
    pairs = zip(stages.stages, views, strict=True)
    costs = [_cost(stage, v, speed, network, gpus=gpus, batch=batch, supply=supply) for stage, v in pairs]
    known = [cost.hours for cost in costs if cost.hours is not None]
    hours = sum(known) if len(known) == len(costs) else None
    return {
        "run": cfg.run.name,
        "model": cfg.model.name,
        "image_size": cfg.model.image_size,
        "crops": [list(view[:2]) for view in views[0]] if isinstance(cfg, SelfSupervised) else None,
        "precision": precision,
        "compile": cfg.run.compile,
        "parameters": network.parameters,
        "gpu": gpu,
        "gpus": gpus,
        "images": images,
        "global_train_batch_size": batch,
        "steps_per_epoch": stages.steps_per_epoch,
        "steps": stages.steps,
        "images_seen": stages.steps * batch,
        "epochs": stages.epochs,
        "equal_compute_epochs": stages.equal_compute_epochs,
        "train_flops_per_image": stages.full_flops,
        "train_flops": sum(stage.steps * batch * stage.train_flops_per_image for stage in stages.stages),
        "basis": None if hours is None else speed.basis,
        "stages": [asdict(cost) for cost in costs],
        "hours": hours,
        "gpu_hours": None if hours is None else hours * gpus,
        "supply": supply,
        "memory_estimate": _memory(cfg, network, views, gpus=gpus),
        "memory_of_gpu": GPUS[gpu].memory_bytes,
    }


def _row_of(gpu: str) -> str:
    row = gpu.lower()
    if row not in GPUS:
        raise ConfigError(f"--gpu must be one of {', '.join(GPUS)}, got {gpu!r}.{did_you_mean(row, GPUS)}")
    return row


def build_without_storage(model: Model) -> Any:
    """The network of the block ``model``, whose tensors have shapes alone.

    Raises:
        ConfigError: A name, an option or a size that no network has.
    """
    try:
        with torch.device("meta"):
            return build_model(**model.options())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def stages_of(cfg: Supervised | SelfSupervised, network: Network, *, steps_per_epoch: int) -> curriculum.Plan:
    """The stages of the run with the FLOPs of all crops, of the head and of a momentum encoder where there are such.

    Raises:
        ConfigError: What the run itself would refuse of duration and curriculum.
    """
    options, _ = curriculum.split_options(cfg.algorithms)
    size = cfg.model.image_size
    rule, remedy = "without Curriculum and PatchDropout where there are crops", "Change crops.size_crops."
    fits = options is None or not isinstance(cfg, SelfSupervised)
    require(fits, "algorithms", rule, list(cfg.algorithms), remedy)
    rand_augment = cfg.augment.rand_augment if isinstance(cfg, Supervised) else None
    curriculum.check_network(options, network.module, image_size=size, rand_augment=rand_augment)

    def of_all_crops(cfg: SelfSupervised, module: Any, image_size: int) -> float:
        learning, averaged = _heads(cfg, module.num_features)
        trained = flops.TRAIN_FACTOR * flops.multi_crop_flops(module, cfg.crops.sizes, learning)
        # A momentum encoder sees the first two crops, forward alone.
        return trained + (flops.multi_crop_flops(module, cfg.crops.sizes[:2], averaged) if averaged else 0)

    def with_teacher(cfg: Supervised, module: Any, image_size: int, **kept: float) -> float:
        student = flops.train_factor(module, cfg.init.train_blocks) * network.forward_flops(image_size, **kept)
        return student + _teacher_flops(cfg)  # which runs forward alone, at its own size

    count = partial(with_teacher, cfg) if isinstance(cfg, Supervised) else partial(of_all_crops, cfg)
    return curriculum.build_plan(
        options,
        network.module,
        image_size=size,
        max_duration=cfg.max_duration,
        steps_per_epoch=steps_per_epoch,
        images_per_step=cfg.global_train_batch_size,
        train_flops=count,
    )


def _teacher_flops(cfg: Supervised) -> int:
    """Of one image through the teacher that runs beside the student, if there is one."""
    if not isinstance(cfg, Distill) or cfg.cache is not None:
        return 0
    teacher = cfg.teacher
    size = teacher.image_size or cfg.model.image_size
    try:
        with torch.device("meta"):
            network = build_teacher_network(
                teacher.name, num_classes=cfg.model.num_classes, image_size=size, **teacher.options
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return flops.forward_flops(network, size)


def _heads(cfg: SelfSupervised, width: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """The heads that learn, and those of them that a momentum encoder has too; without storage."""
    with torch.device("meta"):
        if isinstance(cfg, DINO):
            head = build_dino_head(cfg, width)
            return [head], [head]
        if isinstance(cfg, MoCo):
            projector, predictor = build_moco_heads(cfg)
            return [projector, predictor], [projector]
        if isinstance(cfg, SwAV):
            return [build_swav_head(cfg)], []
        return [build_simclr_head(cast(SimCLR, cfg))], []


def _views(cfg: Supervised | SelfSupervised, stage: curriculum.Stage, module: Any) -> list[View]:
    if isinstance(cfg, SelfSupervised):
        return [View(n, size, 1.0) for n, size in zip(cfg.crops.num_crops, cfg.crops.size_crops, strict=True)]
    kept, size = stage.num_patches_kept, stage.image_size
    return [View(1, size, 1.0 if kept is None else kept / (size // module.patch_size) ** 2)]


def _cost(
    stage: curriculum.Stage, views: list[View], speed: Speed, network: Network, *, gpus: int, batch: int, supply: Any
) -> StageCost:
    known = [second for second in map(speed.seconds, views) if second is not None]
    rate = None
    if len(known) == len(views):
        # Heads and momentum encoders are taken to run as near to the peak as the trunk.
        whole = stage.train_flops_per_image / sum(map(network.train_flops, views))
        rate = gpus / (whole * sum(known))
    return StageCost(
        image_size=stage.image_size,
        num_patches_kept=stage.num_patches_kept,
        steps=stage.steps,
        train_flops_per_image=stage.train_flops_per_image,
        images_per_second=rate,
        mfu=rate * stage.train_flops_per_image / (gpus * speed.peak) if rate else None,
        hours=stage.steps * batch / rate / 3600 if rate else None,
        cpu_cores=math.ceil(rate / supply["images_per_cpu_second"]) if rate and supply else None,
        bytes_to_gpus_per_second=rate * sum(3 * v.count * v.image_size**2 for v in views) if rate else None,
    )


def _supply(cfg: Supervised | SelfSupervised, results: Path) -> dict[str, Any] | None:
    """The measured input that is the recipe's, at its full size."""
    crops = cfg.crops if isinstance(cfg, SelfSupervised) else None
    path = results / ("input_full.json" if crops is None else "input_multicrop_full.json")
    candidates = json.loads(path.read_text(encoding="utf-8"))["candidates"] if path.is_file() else {}
    for name, found in candidates.items():
        if name == _input_name(cfg) and (crops is None or found["shapes"] == [[3, size, size] for size in crops.sizes]):
            rate = found["images_per_cpu_second"]["median"]
            return {"file": path.name, "name": found["label"], "images_per_cpu_second": rate}
    return None


def _input_name(cfg: Supervised | SelfSupervised) -> str:
    if isinstance(cfg, SelfSupervised):
        return f"ours-{'' if cfg.data.augment_on == 'worker' else 'device-'}{cfg.crops.sizes[0]}"
    augment, where = cfg.augment, cfg.data.augment_on
    if augment.rand_augment is not None and where != "device":
        return "ours-ra"
    if augment.three_augment and where == "worker":
        return "ours-3a"
    return "ours-repeated" if augment.shared_decodes and augment.repeated_augmentation == 3 else "ours-seekable"


def _memory(
    cfg: Supervised | SelfSupervised, network: Network, views: list[list[View]], *, gpus: int
) -> dict[str, float | None]:
    """Bytes on one GPU: float32 weights, gradients and optimizer state; activations of the largest micro-batch."""
    share = cfg.global_train_batch_size // gpus
    size = cfg.run.device_train_microbatch_size
    micro = min(size, share) if isinstance(size, int) else share
    # An image's crops are held together, stages follow each other.
    works = [[(view.count, network.work(view)) for view in stage] for stage in views]
    kept = _kept_activations(cfg, network)
    held = [kept * sum(n * work.activation_bytes for n, work in stage if work) for stage in works]
    copies = ("EMA" in cfg.algorithms) + isinstance(cfg, DINO | MoCo)
    parts: dict[str, float | None] = {
        "weights": 4 * network.parameters,
        "gradients": (8 if gpus > 1 else 4) * network.parameters,  # DDP reduces them in buckets of its own
        "optimizer": _ONE_MOMENT.get(cfg.optimizer.name, _TWO_MOMENTS) * network.parameters,
        "averages": 4 * network.parameters * copies,
        "activations": micro * max(held) or None,
    }
    return {**parts, "total": sum(part for part in parts.values() if part)}


def _kept_activations(cfg: Recipe, network: Network) -> float:
    """Share of the activations that is held at the peak: inputs of recomputed blocks, and all of the others' or one's.

    Inputs are the float32 residual stream.
    """
    share, blocks = cfg.run.activation_checkpointing, getattr(network.module, "blocks", ())
    if not share or not len(blocks):
        return 1.0
    learning = len(blocks) if cfg.init.train_blocks is None else cfg.init.train_blocks
    twice = num_recomputed(share, learning)
    whole = max(len(blocks) - twice, 1)
    return (whole + twice * 4 / roofline.ACTIVATION_BYTES) / len(blocks)
