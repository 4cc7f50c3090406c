"""Measures loader, device augmentation and model step of a recipe on this machine, and names the slowest of them.

At each image size of a curriculum, else at that of the model. ``plan --measured`` reads what comes out.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from vitcomposer.cost.input_speed import Speed, measure_loader, one_thread
from vitcomposer.cost.inputs import kind_of
from vitcomposer.cost.step_speed import Step, images_of_step, measure_step, measure_transform
from vitcomposer.curriculum import Curriculum, split_options
from vitcomposer.data.loader import build_dataspec
from vitcomposer.runs import machine
from vitcomposer.runs.devices import with_precision
from vitcomposer.schema import Distill, Supervised


def measure_parts(cfg: Supervised, *, workers: int, bytes_per_image: float, seconds: float) -> dict[str, Any]:
    """The rates of all parts at each image size, and what ``plan`` takes of them.

    Args:
        workers: Loader processes, all of them at work at once.
        bytes_per_image: As stored.
        seconds: Of each measurement.

    Raises:
        ConfigError: The data cannot be had or do not fit the configuration.
    """
    cfg = with_precision(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = image_sizes(cfg)
    # Loaders first: their workers are forked before this process has threads and a GPU at work.
    with one_thread():
        loaders = {size: _measure_loader(_at(cfg, size), workers, seconds) for size in sizes}
    transforms = {size: _measure_transform(_at(cfg, size), device, seconds) for size in sizes}
    # A teacher that runs beside the network is no part of the step that is measured here.
    steps = {} if isinstance(cfg, Distill) else {size: measure_step(cfg, size, device, seconds) for size in sizes}
    return {
        "cpu": machine.cpu_model() or "unknown",
        "input": {
            "kind": kind_of(cfg, gpu=device.type == "cuda"),
            "bytes_per_image": bytes_per_image,
            "images_per_cpu_second": {size**2: loaders[size].per_cpu_second for size in sizes},
        },
        "sections": {"training": [step.to_dict() for step in steps.values()]},
        "parts": [_parts(size, loaders[size], transforms[size], steps.get(size)) for size in sizes],
    }


def image_sizes(cfg: Supervised) -> list[int]:
    """Those of the curriculum, else the model's."""
    options, _ = split_options(cfg.algorithms)
    return list(options.image_sizes) if isinstance(options, Curriculum) else [cfg.model.image_size]


def _at(cfg: Supervised, image_size: int) -> Supervised:
    return replace(cfg, model=replace(cfg.model, image_size=image_size))


def _measure_loader(cfg: Supervised, workers: int, seconds: float) -> Speed:
    # Hashes are checked once a run and shard: in seconds of measuring they would look like a cost of every image.
    data = replace(cfg.data, num_workers=workers, validate_hash=None)
    spec = build_dataspec(
        replace(cfg, data=data), "train", seed=cfg.seed, device_batch_size=cfg.global_train_batch_size
    )
    return measure_loader(cast(DataLoader, spec.dataloader), seconds, f"loader at {cfg.model.image_size} px")


def _measure_transform(cfg: Supervised, device: torch.device, seconds: float) -> float:
    """Images a second of the device's part of augmentation, on one batch of the loader."""
    cfg = replace(cfg, data=replace(cfg.data, num_workers=0))
    spec = build_dataspec(cfg, "train", seed=cfg.seed, device_batch_size=images_of_step(cfg, device))
    batch = next(iter(spec.dataloader))
    return measure_transform(spec.microbatch_transforms, batch, device, seconds)


def _parts(image_size: int, loader: Speed, transform: float, step: Step | None) -> dict[str, Any]:
    return {
        "image_size": image_size,
        "loader_images_per_second": loader.per_second,
        "augmentation_images_per_second": transform,
        "step_images_per_second": None if step is None else step.images_per_sec,
        "limit": None if step is None else bottleneck(loader.per_second, transform, step.images_per_sec),
    }


def bottleneck(loader: float, augmentation: float, step: float) -> str:
    """What a run waits for: the loader works beside the device, which augments a batch and then trains on it."""
    if loader < 1 / (1 / augmentation + 1 / step):
        return "loader"
    return "model step" if step < augmentation else "device augmentation"
