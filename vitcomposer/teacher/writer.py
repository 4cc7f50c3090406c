"""Writes a teacher cache: one pass of the teacher over K augmented views of every training image.

A shard holds the rows of some neighbouring images in one crop-set. It is stored whole and then noted down beside its
hash, so what is noted down survives any end of the process. Several sets of the same images are made in turn, since
their views come from one decode. The layout is that of :mod:`vitcomposer.teacher.cache`.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from vitcomposer.data.augment.transforms import TrainTransform
from vitcomposer.data.batch import Batch, Sample
from vitcomposer.data.boxes import Box
from vitcomposer.data.collate import TrainCollate
from vitcomposer.data.conversion.plan import read_json, to_json
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.loader import augments_on_device, holds_seekable, open_dataset
from vitcomposer.data.mds.shards import INDEX
from vitcomposer.data.mds.shared_memory import ignore_interrupt
from vitcomposer.data.mds.stream import ImageStream
from vitcomposer.data.mds.worker_room import check_worker_room
from vitcomposer.data.random import view_seed
from vitcomposer.data.workers import number_of_workers
from vitcomposer.errors import ConfigError, require
from vitcomposer.losses import TeacherAnswers
from vitcomposer.schema import Distill
from vitcomposer.stores.objects import Store, open_store
from vitcomposer.teacher.cache import (
    MANIFEST,
    SPLIT,
    VERSION,
    WEIGHTS,
    compare,
    conditions,
    describe_epochs,
    hash_split,
    hash_weights,
    set_name,
    shard_name,
)
from vitcomposer.teacher.frozen import FrozenTeacher, build_frozen_teacher
from vitcomposer.teacher.rows import MAX_CLASSES, bytes_per_row, encode_rows, row_dtype

STATE = ".cache-teacher"
_SHARD_IMAGES, _SHARD_BYTES = 16384, 64 << 20
_SETS_AT_ONCE = 8
_TIMEOUT = 7 * 24 * 3600.0  # seconds: a rank that has done its share waits for the others

_Place = tuple[int, int]  # crop-set, and number of a shard in it or of a sample


@dataclass(frozen=True)
class _Task:
    """The same images in several crop-sets."""

    number: int
    crop_sets: tuple[int, ...]
    ids: range

    @property
    def num_views(self) -> int:
        return len(self.ids) * len(self.crop_sets)

    @property
    def views(self) -> list[_Place]:
        """Crop-set and sample_id; the views of a sample are neighbours."""
        return [(crop_set, sample_id) for sample_id in self.ids for crop_set in self.crop_sets]


def write_cache(
    cfg: Distill,
    out: str | Path,
    *,
    crop_sets: int,
    top_k: int | None,
    seed: int | None = None,
    batch_size: int = 256,
    shard_images: int | None = None,
) -> None:
    """Write what is missing of a cache; on several ranks each makes its share of the parts.

    Args:
        cfg: Its teacher, training split and augmentation; mixing and the optimizer do not matter.
        out: Folder that all ranks see, or ``s3://bucket/prefix``.
        crop_sets: Views of each image; a cache can get more later.
        top_k: Classes whose logits are stored; None is all.
        seed: Of the views; None is that of ``cfg``.
        batch_size: Views that a rank's teacher sees at once.
        shard_images: Images of a shard; None is as many as make 64 MB, at most 16,384.

    Raises:
        ConfigError: A choice that cannot be cached, or ``out`` holds another cache or is being written.
        ShardError: Images that cannot be read.
    """
    dist.initialize_dist("cpu", timeout=_TIMEOUT)  # nothing is exchanged but the plan
    device = torch.device("cuda", dist.get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    precision = cfg.teacher.precision or cfg.precision
    fits = device.type == "cuda" or precision == "fp32"
    remedy = "Add precision=auto and teacher.precision=null, or run on a GPU."
    require(fits, "teacher.precision", "fp32 on a CPU", precision, remedy)
    stored = _check_sizes(cfg, crop_sets, top_k, batch_size, shard_images)
    store = open_store(out)
    teacher = build_frozen_teacher(cfg)  # before anything is written: it may not fit
    stream = open_dataset(
        cfg.data,
        "train",
        num_classes=cfg.model.num_classes,
        batch_size=batch_size,
        seed=cfg.seed,
        low_resolution=cfg.augment.low_resolution,
    )
    assert isinstance(stream, ImageStream)
    plan = {
        "version": VERSION,
        "seed": cfg.seed if seed is None else seed,
        "top_k": stored,
        "images": stream.num_samples,
        "shard_images": shard_images or min(_SHARD_IMAGES, max(1, _SHARD_BYTES // bytes_per_row(stored))),
    }
    transform = TrainTransform(cfg.augment, _unmixed(cfg).mixing, num_classes=cfg.model.num_classes)
    with contextlib.ExitStack() as lock:
        tasks = _begin(store, cfg, plan, crop_sets, stream, lock)
        own = tasks[dist.get_global_rank() :: dist.get_world_size()]
        batches = _ask(teacher, transform, plan["top_k"], device, _loader(cfg, plan["seed"], own, stream, batch_size))
        _work(store, plan, own, batches)
        dist.barrier()
        if dist.get_global_rank() == 0:
            _finish(store, plan, crop_sets)


def _check_sizes(cfg: Distill, crop_sets: int, top_k: int | None, batch_size: int, shard_images: int | None) -> int:
    """The number of classes that are stored."""
    conditions(cfg)
    classes = cfg.model.num_classes
    fits = classes <= MAX_CLASSES
    require(fits, "model.num_classes", f"at most {MAX_CLASSES} with a teacher cache", classes, "Set cache=null.")
    fits = top_k is None or 1 <= top_k <= classes
    require(fits, "--top-k", f"1 to model.num_classes={classes}, or all", top_k, "10 is usual.")
    require(1 <= crop_sets <= 10_000, "--crop-sets", "1 to 10000", crop_sets, "20 is usual.")
    require(batch_size >= 1, "--batch-size", "1 or more", batch_size, "256 is usual.")
    require(shard_images is None or shard_images >= 1, "--shard-images", "1 or more", shard_images, "Leave it out.")
    return classes if top_k is None else top_k


def _begin(  # noqa: PLR0913, PLR0917 (a step of write_cache)
    store: Store,
    cfg: Distill,
    plan: dict[str, Any],
    crop_sets: int,
    stream: ImageStream,
    lock: contextlib.ExitStack,
) -> list[_Task]:
    """What is to be made. Rank 0 locks the place, looks and tells, so that all ranks share the same list."""
    answer: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            lock.enter_context(store.one_writer())
            store.check()
            store.clean()
            answer[0] = _plan_tasks(store, cfg, plan, crop_sets, stream)
        except (ValueError, OSError) as error:
            answer[0] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ConfigError(answer[0])
    return answer[0]


def _plan_tasks(store: Store, cfg: Distill, plan: dict[str, Any], crop_sets: int, stream: ImageStream) -> list[_Task]:
    """What is to be made of a plan, which gets ``made_from`` and is noted down once all of it may be begun."""
    plan["made_from"] = {**conditions(cfg), SPLIT: hash_split(stream), WEIGHTS: hash_weights(cfg.teacher.weights)}
    old = read_json(store, f"{STATE}/plan.json")
    if old is not None:
        _check_plan(store, old, plan, crop_sets)
    tasks = _tasks(plan, _missing(store, plan, crop_sets), exact=cfg.augment.decode_scale == "exact")
    _announce(store, cfg, plan, crop_sets, sum(task.num_views for task in tasks))
    if old is None:
        store.write(f"{STATE}/plan.json", to_json(plan))
    return tasks


def _check_plan(store: Store, old: dict[str, Any], plan: dict[str, Any], crop_sets: int) -> None:
    """Compare with the plan that ``out`` was begun with."""
    elsewhere = "or choose another --out."
    rule = "without a cache that another version has begun"
    require(old["version"] == VERSION, "--out", rule, store.url, "Choose another folder.")
    compare(old["made_from"], plan["made_from"], store.url, elsewhere)
    for key in ("seed", "top_k", "shard_images"):
        flag, value = "--" + key.replace("_", "-"), plan[key]
        require(old[key] == value, flag, f"{old[key]} as in {store.url}", value, f"Repeat the first call, {elsewhere}")
    finished = (read_json(store, MANIFEST) or {"crop_sets": 0})["crop_sets"]
    rule = f"at least {finished}, the sets that {store.url} has"
    require(crop_sets >= finished, "--crop-sets", rule, crop_sets, f"Set --crop-sets {finished}, {elsewhere}")


def _missing(store: Store, plan: dict[str, Any], crop_sets: int) -> set[_Place]:
    """Shards that are not noted down, or are not as long as was noted down."""
    sizes = store.sizes()
    count = -(-plan["images"] // plan["shard_images"])
    missing = set()
    for place in [(crop_set, number) for crop_set in range(crop_sets) for number in range(count)]:
        size = sizes.get(_shard(place))
        entry = read_json(store, _note(place)) if size is not None and _note(place) in sizes else None
        if entry is None or entry["raw_data"]["bytes"] != size:
            missing.add(place)
    return missing


def _tasks(plan: dict[str, Any], missing: set[_Place], *, exact: bool) -> list[_Task]:
    tasks, rows = [], plan["shard_images"]
    at_once = _SETS_AT_ONCE if exact else 1  # an approximate decode is one of a single box
    for number in sorted({number for _, number in missing}):
        ids = range(number * rows, min((number + 1) * rows, plan["images"]))
        sets = sorted(crop_set for crop_set, other in missing if other == number)
        tasks += [_Task(number, tuple(sets[at : at + at_once]), ids) for at in range(0, len(sets), at_once)]
    return tasks


def _announce(store: Store, cfg: Distill, plan: dict[str, Any], crop_sets: int, views: int) -> None:
    size, images, repeats = bytes_per_row(plan["top_k"]), plan["images"], cfg.augment.repeated_augmentation
    print(
        f"{store.url}: {crop_sets} crop-sets of {images:,} images, the {plan['top_k']} highest logits of "
        f"{cfg.model.num_classes}: {size} bytes a view, {crop_sets * size:,} an image, "
        f"{crop_sets * size * images / 1e9:.3g} GB in all; {describe_epochs(crop_sets, repeats)}; "
        f"{views:,} of {crop_sets * images:,} views are to be made",
        flush=True,
    )
    free = store.free_bytes()
    if free is not None and views * size > free:
        raise ValueError(
            f"{store.url} must have room for {views * size / 1e9:.3g} GB more, it has {free / 1e9:.3g} GB. Free some "
            "space, or store fewer classes or sets."
        )


def _work(
    store: Store, plan: dict[str, Any], tasks: list[_Task], batches: Iterator[tuple[Batch, TeacherAnswers]]
) -> None:
    """Store the tasks of this rank, whose views ``batches`` brings in their order."""
    began, done = time.perf_counter(), 0
    total = sum(task.num_views for task in tasks)
    for task in tasks:
        rows, filled = np.empty(task.num_views, row_dtype(plan["top_k"])), 0
        while filled < len(rows):
            batch, answers = next(batches)
            end = filled + len(batch["label"])
            _fill(rows[filled:end], batch, answers)
            filled = end
        _store_task(store, task, rows)
        done += len(rows)
        if dist.get_global_rank() == 0:
            rate = done / (time.perf_counter() - began)
            left = (total - done) / rate / 60
            print(f"{done:,} of {total:,} views of rank 0, {rate:,.0f} a second, {left:,.0f} min left", flush=True)


def _unmixed(cfg: Distill) -> Distill:
    return replace(cfg, mixing=replace(cfg.mixing, mixup_alpha=0.0, cutmix_alpha=0.0))


class _Recorded:
    """The views of a crop-set, with what is stored of them; a sample's epoch is its set."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def seed(self, sample: Sample) -> int:
        return view_seed(self._seed, sample["epoch"], sample["sample_id"], 0)

    def columns(self, samples: list[Sample], seeds: list[int], boxes: list[Box], flips: NDArray[np.bool_]) -> Batch:
        return {"view_seed": np.array(seeds, np.uint64), "box": np.array(boxes, np.int32), "flip": flips}


class _Samples:
    """Samples of the training split by crop-set and sample_id."""

    def __init__(self, stream: ImageStream) -> None:
        self._stream = stream

    def __getitem__(self, at: _Place) -> Sample:
        crop_set, sample_id = at
        return {**self._stream[sample_id], "epoch": crop_set}


class _Batches:
    """Places of the views of one task after the other; a batch is of one task."""

    def __init__(self, tasks: list[_Task], batch_size: int) -> None:
        self._tasks, self._batch_size = tasks, batch_size

    def __iter__(self) -> Iterator[list[_Place]]:
        for task in self._tasks:
            views = task.views
            yield from (views[at : at + self._batch_size] for at in range(0, len(views), self._batch_size))


def _loader(cfg: Distill, seed: int, tasks: list[_Task], stream: ImageStream, batch_size: int) -> DataLoader:
    batch_bytes, ahead = batch_size * 3 * cfg.model.image_size**2, cfg.data.prefetch_factor
    workers = number_of_workers(cfg.data, gpu=torch.cuda.is_available(), batch_bytes=batch_bytes)
    check_worker_room("data.num_workers", workers, prefetch_factor=ahead, batch_bytes=batch_bytes)
    jpeg.warm_up(seekable=holds_seekable(stream))
    unmixed = _unmixed(cfg)
    collate = TrainCollate(
        unmixed.augment,
        unmixed.mixing,
        image_size=cfg.model.image_size,
        num_classes=cfg.model.num_classes,
        seed=seed,
        augment_on_device=augments_on_device(cfg.data, rand_augment=cfg.augment.rand_augment is not None),
        views=_Recorded(seed),
        source=stream,
    )
    collate.warm_up()
    return DataLoader(
        _Samples(stream),  # pyright: ignore[reportArgumentType]
        batch_sampler=_Batches(tasks, batch_size),  # pyright: ignore[reportArgumentType]
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_interrupt,
        prefetch_factor=ahead if workers else None,
        timeout=cfg.data.timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
    )


def _ask(
    teacher: FrozenTeacher, transform: TrainTransform, top_k: int, device: torch.device, loader: DataLoader
) -> Iterator[tuple[Batch, TeacherAnswers]]:
    """The batches, each with the teacher's highest logits."""
    for batch in loader:
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        yield batch, highest(teacher(transform(moved)["image"]), top_k)


def highest(answers: TeacherAnswers, top_k: int) -> TeacherAnswers:
    """The ``top_k`` highest of all logits, of equal ones that of the lower class first."""
    if top_k == answers.logits.shape[1]:
        return answers
    logits, classes = answers.logits.float().sort(dim=1, descending=True, stable=True)
    return TeacherAnswers(classes[:, :top_k].int(), logits[:, :top_k].half(), logits[:, top_k:].logsumexp(dim=1))


def _fill(rows: NDArray[Any], batch: Batch, answers: TeacherAnswers) -> None:
    for name in ("view_seed", "box", "flip"):
        rows[name] = batch[name]
    rows["sample_id"] = batch["sample_id"].numpy()
    for name, value in answers._asdict().items():
        rows[name] = value.cpu().numpy()
    if not np.isfinite(rows["logits"]).all():
        precision = "Set teacher.precision to amp_bf16 or fp32, or look at its weights."
        raise ValueError(f"The teacher's logits must be finite and below 65,504, some are not. {precision}")


def _store_task(store: Store, task: _Task, rows: NDArray[Any]) -> None:
    sets = rows.reshape(len(task.ids), len(task.crop_sets))
    for at, crop_set in enumerate(task.crop_sets):
        place = crop_set, task.number
        data, entry = encode_rows(np.ascontiguousarray(sets[:, at]), shard_name(task.number))
        store.write(_shard(place), data)
        store.write(_note(place), json.dumps(entry).encode())


def _finish(store: Store, plan: dict[str, Any], crop_sets: int) -> None:
    """Write the index of each set and, last, the manifest that makes it a cache."""
    missing = _missing(store, plan, crop_sets)
    if missing:
        raise ConfigError(
            f"--out must be a folder that all ranks see, but {len(missing)} shards of {store.url} were not written "
            "there. Choose a shared one or s3://bucket/prefix."
        )
    indexes = []
    for crop_set in range(crop_sets):
        places = [(crop_set, number) for number in range(-(-plan["images"] // plan["shard_images"]))]
        entries = [read_json(store, _note(place)) for place in places]
        index = json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()
        store.write(f"{set_name(crop_set)}/{INDEX}", index)
        indexes.append(hashlib.sha256(index).hexdigest())
    store.write(MANIFEST, to_json({**plan, "crop_sets": crop_sets, "indexes": indexes}))
    store.clean()


def _shard(place: _Place) -> str:
    return f"{set_name(place[0])}/{shard_name(place[1])}"


def _note(place: _Place) -> str:
    return f"{STATE}/{set_name(place[0])}/{place[1]:05}.json"
