"""Builds the loader of images with labels that Composer's Trainer takes, from the blocks of a yaml."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from numpy.typing import NDArray
from streaming.base.distributed import barrier, get_local_rank, maybe_init_dist
from torch import Tensor
from torch.utils.data import DataLoader

from vitcomposer.data.augment.transforms import EvalTransform, TrainTransform
from vitcomposer.data.batch import Batch, Sample, split_batch
from vitcomposer.data.boxes import enlarged_share
from vitcomposer.data.collate import EvalCollate, TrainCollate, Views
from vitcomposer.data.jpeg import current_reading, set_reading
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.jpeg.region import is_seekable
from vitcomposer.data.mds.balance import POWERS, Balance
from vitcomposer.data.mds.shards import CLASS_NAMES, read_class_names
from vitcomposer.data.mds.shared_memory import (
    clear_stale_memory,
    ignore_interrupt,
    one_start_at_a_time,
)
from vitcomposer.data.mds.small_column import largest_view, listed
from vitcomposer.data.mds.stream import ImageStream, StreamOptions
from vitcomposer.data.mds.worker_room import check_worker_room
from vitcomposer.data.synthetic import SyntheticImages
from vitcomposer.data.workers import number_of_workers
from vitcomposer.errors import ConfigError, ShardError, require
from vitcomposer.schema import Data, Distill, Probe, Supervised

Split = Literal["train", "val"]

SYNTHETIC_VAL_SAMPLES = 50_000  # ImageNet's
_LABELS = 256  # that are looked at before anything is read: a page of a shard each
_IMAGES = 16  # likewise


class StoredViews(Views, Protocol):
    """Views whose answers were stored, for one data set."""

    def check_data(self, dataset: ImageStream | SyntheticImages) -> None:
        """Raise ConfigError for another data set."""
        ...


def build_dataspec(
    cfg: Supervised | Probe,
    split: Split,
    *,
    seed: int,
    device_batch_size: int,
    keep_unmixed: bool = False,
    teacher: StoredViews | None = None,
) -> DataSpec:
    """Loader and device-side transforms of a split, checked against the model before anything is read.

    Training drops the last batch where it is short. In evaluation every sample comes once over all ranks; those
    repeated to give the ranks equal work have IGNORE_LABEL.

    Args:
        device_batch_size: Images per batch and rank.
        keep_unmixed: As ``TrainTransform``.
        teacher: Decides the views of a training split and puts its answers into the batches.

    Raises:
        ConfigError: Data that cannot be found or do not fit the model, the batch or the teacher's answers; a shard on
            disk missing or cut.
        ShardError: Later, in the loader: a shard that cannot be had or whose hash is wrong.
    """
    try:
        dataset = _build_dataset(cfg, split, seed, device_batch_size)
    except ShardError as error:  # found before anything is read
        raise ConfigError(str(error)) from error
    train = split == "train"
    image_size = cfg.model.image_size if train else cfg.evaluation.image_size or cfg.model.image_size
    # Compiled kernels come from their cache on disk: the workers get them with the fork.
    jpeg.warm_up(seekable=holds_seekable(dataset))
    if train:
        check_fills_a_batch(dataset, device_batch_size * dist.get_world_size())
        if teacher is not None:
            teacher.check_data(dataset)
        collate = TrainCollate(
            cfg.augment,
            cfg.mixing,
            image_size=image_size,
            num_classes=cfg.model.num_classes,
            seed=seed,
            augment_on_device=augments_on_device(cfg.data, rand_augment=cfg.augment.rand_augment is not None),
            views=teacher,
            source=source_of(dataset),
        )
        collate.largest_small = largest_view(_small_side(cfg, dataset) or 0)
        collate.warm_up()
        transform = TrainTransform(
            cfg.augment, cfg.mixing, num_classes=cfg.model.num_classes, keep_unmixed=keep_unmixed
        )
    else:
        collate = EvalCollate(
            image_size=image_size,
            crop_ratio=cfg.evaluation.crop_ratio,
            interpolation=cfg.evaluation.interpolation,
            num_classes=cfg.model.num_classes,
            source=source_of(dataset),
        )
        transform = EvalTransform(cfg.augment.mean, cfg.augment.std)
    return make_dataspec(
        dataset,
        cfg.data,
        collate,
        transform,
        batch_size=device_batch_size,
        sample_bytes=3 * image_size**2,
        drop_last=train,
    )


def make_dataspec(
    dataset: ImageStream | SyntheticImages,
    data: Data,
    collate: Callable[[list[Sample]], Batch],
    transform: Callable[[Batch], Batch],
    *,
    batch_size: int,
    sample_bytes: int,
    drop_last: bool,
) -> DataSpec:
    """The loader of a data set, its batches made by ``collate`` in the workers and by ``transform`` on the device.

    Args:
        batch_size: Images per batch and rank.
        sample_bytes: Of the pixels that ``collate`` makes of a sample.
    """
    batch_bytes = batch_size * sample_bytes
    workers = number_of_workers(data, gpu=torch.cuda.is_available(), batch_bytes=batch_bytes)
    check_worker_room("data.num_workers", workers, prefetch_factor=data.prefetch_factor, batch_bytes=batch_bytes)
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate,
        drop_last=drop_last,
        num_workers=workers,  # torch gives each of them one thread
        prefetch_factor=data.prefetch_factor if workers else None,
        worker_init_fn=ignore_interrupt,
        persistent_workers=workers > 0,
        timeout=data.timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
        # Its own, since an iterator draws a seed: from the default generator it would take the number that stochastic
        # depth gets next, and a resumed run or one with other workers would drop other blocks.
        generator=torch.Generator(),
    )
    return DataSpec(
        loader,
        num_samples=dataset.num_samples,
        microbatch_transforms=transform,
        split_batch=split_batch,
        get_num_samples_in_batch=_count_samples,
    )


def _small_side(cfg: Supervised | Probe, dataset: ImageStream | SyntheticImages) -> int | None:
    """Shorter side of the smaller images that early stages are cut from, where that is wanted and there are any."""
    if isinstance(cfg, Distill) and cfg.cache is not None:  # its answers are to crops of the whole image
        return None
    return dataset.small_side if isinstance(dataset, ImageStream) and cfg.augment.low_resolution_stages else None


def describe_columns(cfg: Supervised, train: DataSpec, sizes: Sequence[int]) -> str | None:
    """What the stages' views are cut from, and how many are enlarged; None for a data set without ``image_small``.

    Args:
        sizes: Pixels of the views of each stage.
    """
    dataset: Any = cast(DataLoader, train.dataloader).dataset
    side = _small_side(cfg, dataset)
    if side is None:
        return None
    small = [size for size in sizes if size <= largest_view(side)]
    large = [size for size in sizes if size not in small]
    parts = [f"image at {listed(large)} px"] if large else []
    if small:
        augment = cfg.augment
        enlarged = 100 * enlarged_share(small[-1], side, augment.crop_scale, augment.crop_ratio)
        where = f"image_small (shorter side {side}) at {listed(small)} px"
        parts.insert(0, f"{where}, where {enlarged:.0f} % are enlarged")
    return f"crops are cut from {'; from '.join(parts)}"


def set_view(train: DataSpec, view: Callable[[int], tuple[int, float]]) -> None:
    """Have the loader make each step's images at its size and strength, see ``TrainCollate.view``.

    Apart from :func:`build_dataspec` because a plan of the steps needs the length of this loader first.
    """
    loader = train.dataloader
    assert isinstance(loader, DataLoader) and isinstance(loader.collate_fn, TrainCollate)
    loader.collate_fn.view = view


def augments_on_device(data: Data, *, rand_augment: bool) -> bool:
    """Where colours and geometry are changed, which ``data.augment_on`` can leave to us."""
    if data.augment_on != "auto":
        return data.augment_on == "device"
    # A CPU has nothing to gain: the main process would do what the workers can do beside it. Nor has RandAugment
    # where the workers keep up: its thirty groups of images are some 2,000 small operations a batch that the main
    # process has to launch (training.placement decides).
    return torch.cuda.is_available() and not rand_augment


def _count_samples(batch: dict[str, Tensor]) -> int:
    return len(batch["label"])


def _build_dataset(cfg: Supervised | Probe, split: Split, seed: int, batch_size: int) -> ImageStream | SyntheticImages:
    train = split == "train"
    dataset = open_dataset(
        cfg.data,
        split,
        num_classes=cfg.model.num_classes,
        batch_size=batch_size,
        seed=seed,
        repeats=cfg.augment.repeated_augmentation if train else 1,
        shared_decodes=cfg.augment.shared_decodes and train,
        low_resolution=cfg.augment.low_resolution and train,
    )
    if isinstance(dataset, ImageStream):
        _check_classes(cfg, split)
        _check_labels(dataset, cfg.model.num_classes)
        if train and cfg.data.balance is not None:
            dataset.balance = Balance(read_labels(dataset, cfg.model.num_classes), POWERS[cfg.data.balance])
    return dataset


def open_dataset(
    data: Data,
    split: Split,
    *,
    num_classes: int,
    batch_size: int,
    seed: int,
    repeats: int = 1,
    shared_decodes: bool = False,
    low_resolution: bool = False,
) -> ImageStream | SyntheticImages:
    """The samples of a split, those of training in an order drawn from the seed.

    Args:
        num_classes: Of synthetic images.
        repeats, shared_decodes, low_resolution: As the keys of the block ``augment``.

    Raises:
        ShardError: Data that cannot be found.
    """
    set_reading(replace(current_reading(), max_pixels=data.max_pixels))
    train = split == "train"
    if data.source == "synthetic":
        return SyntheticImages(
            num_samples=data.synthetic_samples if train else min(data.synthetic_samples, SYNTHETIC_VAL_SAMPLES),
            num_classes=num_classes,
            batch_size=batch_size,
            shuffle=train,
            seed=seed,
            repeats=repeats,
            shared_decodes=shared_decodes,
        )
    assert data.local is not None
    check_worker_room("data.num_workers", number_of_workers(data, gpu=torch.cuda.is_available()))
    _clear_stale_shared_memory()
    return ImageStream(
        remote=data.remote,
        local=data.local,
        split=data.split_name(split),
        batch_size=batch_size,
        shuffle=train,
        seed=seed,
        repeats=repeats,
        shared_decodes=shared_decodes,
        low_resolution=low_resolution,
        options=StreamOptions(
            cache_limit=data.cache_limit,
            predownload=data.predownload,
            download_retry=data.download_retry,
            download_timeout=data.download_timeout,
            validate_hash=data.validate_hash,
            num_canonical_nodes=data.num_canonical_nodes,
            shuffle_block_size=data.shuffle_block_size,
            max_bad_fraction=data.max_bad_fraction,
        ),
    )


def source_of(dataset: ImageStream | SyntheticImages) -> ImageStream | None:
    """Who answers for images that cannot be decoded; synthetic ones can."""
    return dataset if isinstance(dataset, ImageStream) else None


def holds_seekable(dataset: ImageStream | SyntheticImages) -> bool:
    """Whether some images can be decoded in parts, by a look at a few; of a cache nothing is known yet."""
    if not isinstance(dataset, ImageStream) or not dataset.stream.is_origin:
        return isinstance(dataset, ImageStream)
    ids = np.linspace(0, dataset.num_samples - 1, _IMAGES).astype(int)
    return any(is_seekable(row[0]) for row in dataset.rows_on_disk(ids) if row is not None)


def _check_classes(cfg: Supervised | Probe, split: Split) -> None:
    assert cfg.data.local is not None
    path = Path(cfg.data.local, cfg.data.split_name(split), CLASS_NAMES)
    names = read_class_names(path)
    if names is None:
        return
    require(
        len(names) == cfg.model.num_classes,
        "model.num_classes",
        f"{len(names)}, the number of classes in {path}",
        cfg.model.num_classes,
        f"Set model.num_classes={len(names)}.",
    )
    other_path = Path(cfg.data.local, cfg.data.split_name("val" if split == "train" else "train"), CLASS_NAMES)
    other = read_class_names(other_path)
    if other is not None and names != other:
        at, *_ = [i for i in range(len(names)) if other[i : i + 1] != names[i : i + 1]] or [len(names)]
        raise ConfigError(
            f"{path} must list the classes of {other_path} in the same order, or labels mean different things: the "
            f"first difference is label {at}, {names[at : at + 1]} and {other[at : at + 1]}. Write both splits with "
            "one run of `vitcomposer convert`."
        )


def _check_labels(dataset: ImageStream, num_classes: int) -> None:
    """Look at some labels, spread over the split, before the first step; the loader looks at every one it reads."""
    if not dataset.stream.is_origin:  # a cache may be empty or damaged
        return
    ids = np.linspace(0, dataset.num_samples - 1, _LABELS).astype(int)
    for sample_id, row in zip(ids.tolist(), dataset.rows_on_disk(ids), strict=True):
        label = None if row is None else row[1]
        require(
            label is None or 0 <= label < num_classes,
            "model.num_classes",
            f"above every label of {dataset.bad.split}, which begin at 0; {dataset.place(sample_id)} has {label}",
            num_classes,
            "Set it to the number of classes, or write the split again with `vitcomposer convert`.",
        )


def read_labels(dataset: ImageStream, num_classes: int) -> NDArray[np.int64]:
    """Of all samples of a split that lies on this machine, (N,); 1.28 million take some seconds.

    Raises:
        ConfigError: A label that is outside of the classes or cannot be read.
    """
    ids = np.arange(dataset.num_samples)
    labels = [-1 if row is None else row[1] for row in dataset.rows_on_disk(ids)]
    odd = next((at for at, label in enumerate(labels) if not 0 <= label < num_classes), None)
    if odd is not None:
        raise ConfigError(
            f"data.local must be a data set all of whose labels can be read and are below model.num_classes="
            f"{num_classes} to weigh its classes (data.balance, logit_adjustment), got another for "
            f"{dataset.describe(odd)}. Look at it with `vitcomposer inspect --verify`."
        )
    return np.array(labels)


def check_fills_a_batch(dataset: ImageStream | SyntheticImages, global_batch_size: int) -> None:
    """Refuse a batch that the training split cannot fill once."""
    require(
        dataset.num_samples >= global_batch_size,
        "global_train_batch_size",
        f"at most {dataset.num_samples}, the number of training samples",
        global_batch_size,
        f"Set global_train_batch_size={max(1, dataset.num_samples // 2)} or less.",
    )


@cache  # once a process: the second data set must not sweep away what the first one uses
def _clear_stale_shared_memory() -> None:
    destroy_process_group = maybe_init_dist()
    with one_start_at_a_time():
        if get_local_rank() == 0:
            clear_stale_memory()
        barrier()
    if destroy_process_group:
        torch.distributed.destroy_process_group()
