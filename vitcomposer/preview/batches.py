"""Makes the first batch of a run by the loader, collate and transforms that training uses, and keeps what was drawn."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import DataSpec
from numpy.typing import NDArray
from torch import Tensor

from vitcomposer.cost.flops import train_flops
from vitcomposer.curriculum import Curriculum, Plan, build_plan, check_network, split_options
from vitcomposer.data.batch import CROPS, ERASE_BOX, MIX_BOX, MIX_LAM, UNMIXED, Batch, Sample
from vitcomposer.data.boxes import Box
from vitcomposer.data.collate import TrainCollate
from vitcomposer.data.evaluation import build_centre_crops, open_images
from vitcomposer.data.jpeg.decode import decode_rgb, read_size
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.loader import StoredViews, build_dataspec, set_view
from vitcomposer.data.mds.shards import CLASS_NAMES, read_class_names
from vitcomposer.data.multicrop import MultiCrop
from vitcomposer.data.multicrop_loader import build_multicrop_dataspec
from vitcomposer.data.random import random_key, view_seed
from vitcomposer.models import build_model
from vitcomposer.schema import Distill, Neighbors, Probe, SelfSupervised, Supervised
from vitcomposer.schema.recipe import Recipe
from vitcomposer.teacher.cache import open_cache

VALIDATION_VIEWS = 8
_MIXED = 0.9995  # a share of the own label that rounds to 1 is shown as no mix
Pixels = NDArray[np.uint8]  # (S, S, 3)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One image and what became of it.

    Attributes:
        original: None where no image is shown beside the views.
        boxes: What was cut out of the original, by group of crops.
        views: As the network gets them, in the order of ``columns`` of the section.
        lines: Of text below them.
    """

    original: Pixels | None
    boxes: list[list[Box]]
    views: list[Pixels]
    lines: list[str]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Cells of one kind, and what stands in a row of each."""

    title: str
    columns: str
    cells: list[Cell]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Sections of the page, and what was drawn for all images of the batch."""

    sections: list[Section]
    facts: list[str]
    training_views: int
    validation_views: int


@dataclass
class _Drawn:
    """The draws of a batch of labelled images, as TrainCollate tells them to who decides its views."""

    seed_of_run: int
    stored: StoredViews | None
    samples: list[Sample] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    flips: list[bool] = field(default_factory=list)

    def check_data(self, dataset: Any) -> None:
        """As ``StoredViews``."""
        if self.stored is not None:
            self.stored.check_data(dataset)

    def seed(self, sample: Sample) -> int:
        """As TrainCollate draws by itself, or the stored one."""
        if self.stored is not None:
            return self.stored.seed(sample)
        return view_seed(self.seed_of_run, sample["epoch"], sample["sample_id"], sample["copy"])

    def columns(self, samples: list[Sample], seeds: list[int], boxes: list[Box], flips: NDArray[np.bool_]) -> Batch:
        """Adds nothing of its own to the batch."""
        self.samples, self.boxes, self.flips = list(samples), list(boxes), [bool(flip) for flip in flips]
        return {} if self.stored is None else self.stored.columns(samples, seeds, boxes, flips)


def preview_of(cfg: Recipe, count: int) -> Preview:
    """The first batch of a run, made by one process without workers, which change no pixel of it.

    Args:
        count: Images that are shown; what was drawn is told of the whole batch.

    Raises:
        ConfigError: Data that cannot be found or do not fit the configuration.
    """
    cfg = replace(cfg, data=replace(cfg.data, num_workers=0))
    sections, facts = [], []
    if isinstance(cfg, SelfSupervised):
        section, facts = _crops(cfg, count)
        sections.append(section)
    elif isinstance(cfg, Supervised | Probe):
        section, facts = _training(cfg, count)
        sections.append(section)
    validation = _validation(cfg)
    views = sum(len(section.cells) for section in sections)
    shown = [*sections, *([validation] if validation.cells else [])]
    return Preview(sections=shown, facts=facts, training_views=views, validation_views=len(validation.cells))


def _training(cfg: Supervised | Probe, count: int) -> tuple[Section, list[str]]:
    stored = open_cache(cfg) if isinstance(cfg, Distill) and cfg.cache else None
    drawn = _Drawn(cfg.seed, stored)
    size = cfg.global_train_batch_size
    spec = build_dataspec(cfg, "train", seed=cfg.seed, device_batch_size=size, keep_unmixed=True, teacher=drawn)
    loader: Any = spec.dataloader
    plan = _plan(cfg, len(loader)) if isinstance(cfg, Supervised) else None
    if plan is not None:
        set_view(spec, plan.view)
    collate: TrainCollate = loader.collate_fn
    read = _read_batch(loader)
    steps = [0] if plan is None else [stage.first_step for stage in plan.stages]
    # What is drawn for a sample is the same in every stage, but for its size and strength.
    raw = [collate([{**sample, "step": step} for sample in read]) for step in steps]
    done = [_on_device(spec, batch) for batch in raw]
    names = class_names(cfg, "train")
    mixes = MIX_LAM in raw[0]
    cells = []
    for i in range(min(count, size)):
        pictures = [done[0][UNMIXED]] if mixes else []
        pictures += [batch["image"] for batch in done]
        views = [pixels_of(images[i], cfg.augment.mean, cfg.augment.std) for images in pictures]
        original, box = _shown(drawn.samples[i]["image"]), drawn.boxes[i]
        lines = [_told(raw[0], i, names), _changes(drawn, raw[0], i)]
        cells.append(Cell(original=original, boxes=[[box]], views=views, lines=lines))
    shown = [f"{batch['image'].shape[-1]} px from step {step:,}" for batch, step in zip(raw, steps, strict=True)]
    columns = ["original with its crop", *(["before it is mixed"] if mixes else [])]
    columns += shown if len(shown) > 1 else ["what the network gets"]
    title = f"training, step 0, batch of {size:,}"
    return Section(title=title, columns=" | ".join(columns), cells=cells), [_facts(drawn, raw[0])]


def _plan(cfg: Supervised, steps_per_epoch: int) -> Plan | None:
    """The stages of a curriculum; None where all steps see images of one size."""
    options, _ = split_options(cfg.algorithms)
    if not isinstance(options, Curriculum):
        return None
    with torch.device("meta"):
        network = build_model(**cfg.model.options())
    check_network(options, network, image_size=cfg.model.image_size, rand_augment=cfg.augment.rand_augment)
    return build_plan(
        options,
        network,
        image_size=cfg.model.image_size,
        max_duration=cfg.max_duration,
        steps_per_epoch=steps_per_epoch,
        images_per_step=cfg.global_train_batch_size,
        train_flops=lambda *a, **kept: train_flops(*a, train_blocks=cfg.init.train_blocks, **kept),
    )


def _crops(cfg: SelfSupervised, count: int) -> tuple[Section, list[str]]:
    size = cfg.global_train_batch_size
    spec = build_multicrop_dataspec(cfg, device_batch_size=size)
    loader: Any = spec.dataloader
    collate: MultiCrop = loader.collate_fn
    read = _read_batch(loader)
    batch = collate(read)
    groups = _on_device(spec, batch)[CROPS]  # (count * B, 3, S, S) of each group
    by_id = {sample["sample_id"]: sample for sample in read}
    cells: list[Cell] = []
    shares: list[list[float]] = [[] for _ in cfg.crops.num_crops]
    for i, sample_id in enumerate(batch["sample_id"].tolist()):
        sample = by_id.get(sample_id)  # None of one that took the place of an unreadable one
        boxes = [] if sample is None else _boxes(collate, cfg.seed, sample)
        for share, group in zip(shares, boxes, strict=False):
            share += [_area(sample, box) for box in group] if sample is not None else []
        if i < count:
            views = [pixels_of(crop, cfg.crops.mean, cfg.crops.std) for group in groups for crop in group[i::size]]
            original = None if sample is None else _shown(sample["image"])
            kept = zip(cfg.crops.size_crops, shares, boxes, strict=False)
            lines = [", ".join(f"{px} px: {100 * np.mean(share[-len(group) :]):.0f} %" for px, share, group in kept)]
            cells.append(Cell(original=original, boxes=boxes, views=views, lines=lines))
    columns = " | ".join(f"{n} of {s} px" for n, s in zip(cfg.crops.num_crops, cfg.crops.size_crops, strict=True))
    facts = [f"crops of {s} px keep {_range(share)}" for s, share in zip(cfg.crops.size_crops, shares, strict=True)]
    title = f"training, step 0, batch of {size:,}"
    return Section(
        title=title, columns=f"original with its crops | {columns}; below: mean share of the area", cells=cells
    ), facts


def _boxes(collate: MultiCrop, seed: int, sample: Sample) -> list[list[Box]]:
    rng = random.Random(random_key(seed, sample["epoch"], sample["sample_id"], sample["copy"]))
    return collate.draw_boxes(rng, *read_size(sample["image"]))


def _validation(cfg: Recipe) -> Section:
    """Views of the images that are evaluated first; none where nothing is."""
    size = VALIDATION_VIEWS
    if isinstance(cfg, Supervised | Probe):
        spec = build_dataspec(cfg, "val", seed=cfg.seed, device_batch_size=size)
        mean, std = cfg.augment.mean, cfg.augment.std
    elif isinstance(cfg, Neighbors) or (isinstance(cfg, SelfSupervised) and cfg.monitor is not None):
        mean, std = (cfg.mean, cfg.std) if isinstance(cfg, Neighbors) else (cfg.crops.mean, cfg.crops.std)
        images = open_images(cfg, "val", batch_size=size)
        spec = build_centre_crops(cfg, images, mean=mean, std=std, device_batch_size=size)
    else:
        return Section(title="", columns="", cells=[])
    batch = _on_device(spec, next(iter(spec.dataloader)))
    names, cells = class_names(cfg, "val"), []
    for picture, label in zip(batch["image"], batch["label"].tolist(), strict=True):
        if label != IGNORE_LABEL:
            lines = [name_of(names, label)]
            cells.append(Cell(original=None, boxes=[], views=[pixels_of(picture, mean, std)], lines=lines))
    return Section(title="validation", columns="what the network gets", cells=cells)


def _read_batch(loader: Any) -> list[Sample]:
    """The samples of the loader's first batch, before they are decoded."""
    found: list[Sample] = []
    for sample in loader.dataset:
        found.append({**sample, "image": bytes(sample["image"])})
        if len(found) == loader.batch_size:
            break
    return found


def _on_device(spec: DataSpec, batch: Batch) -> Batch:
    """The batch after the transforms that Composer runs on the device, which is a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(each) for each in value]
        return value.to(device) if isinstance(value, Tensor) else value

    assert spec.microbatch_transforms is not None, "our loaders have them"
    return spec.microbatch_transforms({key: move(value) for key, value in batch.items()})


def pixels_of(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Pixels:
    """A normalised float32 image (3, S, S) as uint8 (S, S, 3); the inverse of the normalisation, within [0, 255]."""
    factor, offset = (torch.tensor(values, device=image.device)[:, None, None] for values in (std, mean))  # (3, 1, 1)
    values = 255 * (image * factor + offset)  # (3, S, S)
    return values.round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def _shown(encoded: bytes) -> Pixels:
    return np.asarray(decode_rgb(encoded))


def class_names(cfg: Recipe, split: Any) -> list[str] | None:
    """Those that the data set of a split has; None where it has none."""
    if cfg.data.source != "mds" or cfg.data.local is None:
        return None
    return read_class_names(Path(cfg.data.local, cfg.data.split_name(split), CLASS_NAMES))


def name_of(names: list[str] | None, label: int) -> str:
    """Of a class, or its number."""
    return names[label] if names is not None and 0 <= label < len(names) else f"class {label}"


def _told(batch: Batch, at: int, names: list[str] | None) -> str:
    """What the label of an image is after mixing."""
    own = name_of(names, int(batch["label"][at]))
    share = float(batch[MIX_LAM][at]) if MIX_LAM in batch else 1.0
    if share > _MIXED:
        return own
    partner = name_of(names, int(batch["label"].flip(0)[at]))
    kind = "CutMix" if int(batch[MIX_BOX][at][2]) > 0 else "mixup"
    return f"{share:.2f} {own} + {1 - share:.2f} {partner} ({kind})"


def _changes(drawn: _Drawn, batch: Batch, at: int) -> str:
    """What was done to an image, in words."""
    words = [f"{100 * _area(drawn.samples[at], drawn.boxes[at]):.0f} % of the area"]
    words += ["flipped"] * drawn.flips[at]
    words += ["erased"] * bool(ERASE_BOX in batch and int(batch[ERASE_BOX][at][2]) > 0)
    return ", ".join(words)


def _area(sample: Sample, box: Box) -> float:
    height, width = read_size(sample["image"])
    return box[2] * box[3] / (height * width)


def _range(shares: Sequence[float]) -> str:
    low, middle, high = (100 * float(np.quantile(shares, at)) for at in (0, 0.5, 1))
    return f"{low:.0f} to {high:.0f} % of the area, median {middle:.0f} %"


def _facts(drawn: _Drawn, batch: Batch) -> str:
    """One line about all images of a batch."""
    areas = [_area(sample, box) for sample, box in zip(drawn.samples, drawn.boxes, strict=True)]
    parts = [f"crops keep {_range(areas)}", f"flip {np.mean(drawn.flips):.0%}"]
    erased = float((batch[ERASE_BOX][:, 2] > 0).float().mean()) if ERASE_BOX in batch else 0.0
    parts.append(f"erased {erased:.0%}")
    if MIX_LAM in batch:
        mixed = batch[MIX_LAM] <= _MIXED  # (B,)
        cut = mixed & (batch[MIX_BOX][:, 2] > 0)
        parts.append(f"mixed {float(mixed.float().mean()):.0%} (CutMix {float(cut.float().mean()):.0%})")
    return "; ".join(parts).replace("%", " %").replace("  %", " %")
