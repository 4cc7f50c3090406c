"""Decides at the start of a run on a GPU whether its workers or the GPU run RandAugment, where the yaml says auto."""

import sys
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader

from vitcomposer.cost.augmentation import is_better_on_device, measure_costs, seconds_in_step
from vitcomposer.data.collate import TrainCollate
from vitcomposer.runs.folder import run_folder
from vitcomposer.runs.identity import read_identity
from vitcomposer.schema import Distill, Supervised
from vitcomposer.training.setup import BatchShare

_SAMPLES = 64  # of the data set, that are augmented in both ways
_Config = TypeVar("_Config", bound=Supervised)


def place_rand_augment(cfg: _Config, share: BatchShare, train: DataSpec) -> _Config:
    """The configuration with ``data.augment_on`` worker or device where a GPU trains with RandAugment and it is auto.

    It is the device where the workers would be the limit and the GPU, with RandAugment beside its step, would not: both
    ways are measured here, the step is that of ``plan``. The pixels are the same. A run that goes on keeps what it
    began with, and answers of a teacher that were stored keep the workers. To be called before the loader starts its
    workers and before ``set_view``.
    """
    stored = isinstance(cfg, Distill) and cfg.cache is not None
    if cfg.data.augment_on != "auto" or cfg.augment.rand_augment is None or share.device != "gpu" or stored:
        return cfg
    chosen: list[Any] = [None, ""]
    if dist.get_global_rank() == 0:
        chosen = _choose(cfg, share, train)
    dist.broadcast_object_list(chosen, src=0)
    place, reason = chosen
    if dist.get_global_rank() == 0 and cfg.run.output == "text":
        print(f"data.augment_on={place}: {reason}", file=sys.stderr)
    _collate_of(train).augment_on_device = place == "device"
    return replace(cfg, data=replace(cfg.data, augment_on=place))


def _collate_of(train: DataSpec) -> TrainCollate:
    collate = cast(DataLoader, train.dataloader).collate_fn
    assert isinstance(collate, TrainCollate)
    return collate


def _choose(cfg: Supervised, share: BatchShare, train: DataSpec) -> list[str]:
    """The place and why."""
    recorded = (read_identity(run_folder(cfg)) or {}).get("config", {}).get("data", {}).get("augment_on")
    if recorded in ("worker", "device"):
        return [recorded, "as the run began"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    in_step = seconds_in_step(cfg, name)
    if in_step is None:
        return ["worker", f"how fast {name} trains this network is not known"]
    dataset: Any = cast(DataLoader, train.dataloader).dataset
    ids = np.linspace(0, dataset.num_samples - 1, _SAMPLES).astype(int) if cfg.data.remote is None else range(_SAMPLES)
    samples = [dataset[int(at) % dataset.num_samples] for at in ids]
    batch, workers = share.device_train_batch_size, cfg.data.num_workers
    costs = measure_costs(_collate_of(train), samples, cfg.augment.mean, batch=batch, device=device)
    assert isinstance(workers, int), "prepare() has chosen a number"
    better = is_better_on_device(costs, batch=batch, workers=workers, image_in_step=in_step)
    at_once = max(1, workers)
    reason = (
        f"{workers} workers give {at_once / costs.image_in_worker:,.0f} images/s with RandAugment and "
        f"{at_once / costs.image_without:,.0f} without, the GPU trains {1 / in_step:,.0f} (estimate) and takes "
        f"{1e3 * costs.batch_on_device:.0f} ms for that of {batch} images"
    )
    return ["device" if better else "worker", reason]
