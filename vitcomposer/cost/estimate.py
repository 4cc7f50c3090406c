"""Estimates what a recipe costs on given GPUs, without a GPU and without the data: the figures of ``vitcomposer plan``.

FLOPs are counted and steps are those of the run; every other figure says what it comes from, a measurement in
``benchmarks/results`` or an estimate. Composer is not imported.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from vitcomposer import curriculum
from vitcomposer.cost import flops, roofline
from vitcomposer.cost.gpu_speed import Network, Speed, View
from vitcomposer.cost.gpus import GPUS
from vitcomposer.cost.supply import (
    PCIE_SHARE,
    Demand,
    Feed,
    Machines,
    advice,
    build_feed,
    bytes_read,
    hours,
    hours_to_fill_cache,
    limits,
    workers_to_set,
)
from vitcomposer.data.mds.index import SplitSize
from vitcomposer.errors import ConfigError, did_you_mean, require
from vitcomposer.models import build_model
from vitcomposer.models.heads import build_dino_head, build_moco_heads, build_simclr_head, build_swav_head
from vitcomposer.models.transformer import num_recomputed
from vitcomposer.models.trunks import pooled_width
from vitcomposer.schema import DINO, Distill, MoCo, Model, SelfSupervised, SimCLR, Supervised, SwAV
from vitcomposer.schema.recipe import Recipe
from vitcomposer.teacher.network import build_teacher_network

# Bytes of optimizer state per parameter: two float32 moments where nothing else is said.
_TWO_MOMENTS, _ONE_MOMENT = 8, {"sgd": 4, "lion": 4, "muon": 4}


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Steps in a row of one kind. Rates are of all machines together; None where nothing known says how fast they are.

    Attributes:
        gpu_images_per_second, mfu: While no GPU waits for images.
        limits: Images a second that GPU, decode, disk, network and PCIe allow, as far as they are known.
        limited_by: The least of them, which is ``images_per_second``.
        cpu_cores: That decode ``gpu_images_per_second``; None where that input was not measured.
        bytes_to_gpus_per_second: Of uint8 pixels from host to devices, at ``gpu_images_per_second``.
    """

    image_size: int
    num_patches_kept: int | None
    steps: int
    train_flops_per_image: float
    gpu_images_per_second: float | None
    mfu: float | None
    limits: dict[str, float]
    limited_by: str | None
    images_per_second: float | None
    hours: float | None
    cpu_cores: int | None
    bytes_to_gpus_per_second: float | None


def costs_of(  # noqa: PLR0913 (all but one are named at the call)
    cfg: Recipe,
    *,
    gpu: str,
    gpus: int,
    images: int,
    results: Path,
    measured: Path | None = None,
    machines: Machines | None = None,
    split: SplitSize | None = None,
) -> dict[str, Any]:
    """Every figure of ``vitcomposer plan``, as ``--json`` writes them.

    Args:
        cfg: Of any recipe, from ``config.load``.
        images: Of the training set.
        results: Folder of measurements: of the input, and of GPUs where ``measured`` names no file.
        measured: A file of benchmarks/gpu.py or of ``vitcomposer bench``.
        machines: What brings the images; None is as much as the GPUs ask.
        split: Of the data set, for its bytes; None is what the input was measured with.

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
    speed = Speed(network, gpu, precision, results, measured)
    views = [_views(cfg, stage, network.module) for stage in stages.stages]
    has = replace(machines or Machines(), to_gpus=gpus * PCIE_SHARE * GPUS[gpu].host_bandwidth)
    feed = build_feed(cfg, results=results, measured=measured, machines=has, split=split, images=images)
    pairs = zip(stages.stages, views, strict=True)
    costs = [_cost(stage, v, speed, network, gpus=gpus, batch=batch, feed=feed) for stage, v in pairs]
    demands = [
        Demand(cost.steps * batch, cost.gpu_images_per_second, _pixels(v))
        for cost, v in zip(costs, views, strict=True)
        if cost.gpu_images_per_second is not None
    ]
    return {
        "run": cfg.run.name,
        "model": cfg.model.name,
        "image_size": cfg.model.image_size,
        "crops": [list(view[:2]) for view in views[0]] if isinstance(cfg, SelfSupervised) else None,
        "precision": precision,
        "compile": cfg.run.compile,
        "compiled": speed.compiled,
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
        "basis": speed.basis if demands else None,
        "stages": [asdict(cost) for cost in costs],
        **_hours(cfg, demands, feed, gpus=gpus),
        **_supply(cfg, feed),
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
        learning, averaged = _heads(cfg, pooled_width(module))
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
        return [View(n, size, 1.0) for n, size in _crops_of(cfg)]
    kept, size = stage.num_patches_kept, stage.image_size
    return [View(1, size, 1.0 if kept is None else kept / (size // module.patch_size) ** 2)]


def _pixels(views: list[View]) -> int:
    """Made of one image."""
    return sum(view.count * view.image_size**2 for view in views)


def _cost(
    stage: curriculum.Stage, views: list[View], speed: Speed, network: Network, *, gpus: int, batch: int, feed: Feed
) -> StageCost:
    known = [second for second in map(speed.seconds, views) if second is not None]
    rate, pixels, allowed = None, _pixels(views), {}
    if len(known) == len(views):
        # Heads and momentum encoders are taken to run as near to the peak as the trunk.
        whole = stage.train_flops_per_image / sum(map(network.train_flops, views))
        rate = gpus / (whole * sum(known))
        allowed = limits(rate, pixels, feed)
    least = min(allowed, key=lambda name: allowed[name], default=None)
    return StageCost(
        image_size=stage.image_size,
        num_patches_kept=stage.num_patches_kept,
        steps=stage.steps,
        train_flops_per_image=stage.train_flops_per_image,
        gpu_images_per_second=rate,
        mfu=rate * stage.train_flops_per_image / (gpus * speed.peak) if rate else None,
        limits=allowed,
        limited_by=least,
        images_per_second=allowed[least] if least else None,
        hours=stage.steps * batch / allowed[least] / 3600 if least else None,
        cpu_cores=math.ceil(rate * feed.given.seconds(pixels)) if rate and feed.given else None,
        bytes_to_gpus_per_second=rate * 3 * pixels if rate else None,
    )


def _hours(cfg: Supervised | SelfSupervised, demands: list[Demand], feed: Feed, *, gpus: int) -> dict[str, Any]:
    """Of the run as it is fed, of the GPUs alone, and what would change them; None where no GPU's speed is known."""
    if not demands:
        times = ("hours", "gpu_bound_hours", "gpu_hours", "hours_to_fill_cache")
        return dict.fromkeys((*times, "bytes_read_per_second", "changes", "workers"))
    whole = hours(demands, feed)
    return {
        "hours": whole,
        "gpu_bound_hours": sum(stage.images / stage.gpu_rate for stage in demands) / 3600,
        "gpu_hours": gpus * whole,
        "hours_to_fill_cache": hours_to_fill_cache(demands, feed),
        "bytes_read_per_second": bytes_read(demands, feed),
        "changes": [change._asdict() for change in advice(cfg, demands, feed)],
        "workers": workers_to_set(cfg, demands, feed, gpus),
    }


def _supply(cfg: Supervised | SelfSupervised, feed: Feed) -> dict[str, Any]:
    """What the decode, disk and network columns come from."""
    given, has = feed.given, feed.machines
    size = _pixels([View(n, s, 1.0) for n, s in _crops_of(cfg)])
    return {
        "cpus": has.cpus,
        "disk_bytes_per_second": has.disk,
        "network_bytes_per_second": has.network,
        "network_in_first_epoch_only": feed.cached,
        "bytes_per_image": feed.bytes_per_image,
        "bytes_per_image_from": feed.bytes_from,
        "supply": None
        if given is None
        else {
            "file": given.source,
            "name": given.label,
            "kind": given.kind,
            "images_per_cpu_second": 1 / given.seconds(size),
            "measured": [{"pixels": pixels, "images_per_cpu_second": rate} for pixels, rate in given.rates.items()],
        },
    }


def _crops_of(cfg: Supervised | SelfSupervised) -> list[tuple[int, int]]:
    """Count and size of what is made of an image, at full size."""
    if isinstance(cfg, SelfSupervised):
        return list(zip(cfg.crops.num_crops, cfg.crops.size_crops, strict=True))
    return [(1, cfg.model.image_size)]


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
