"""Works out what a data set has to store for a recipe, and from a few of the images what that takes on the disk."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vitcomposer.curriculum import Curriculum, split_options
from vitcomposer.data.conversion.encode import StoreOptions, store_image
from vitcomposer.data.conversion.sources import Item, Source
from vitcomposer.data.jpeg import reading
from vitcomposer.data.mds.small_column import LOW_RESOLUTION_COLUMN, largest_view, listed, needed_side
from vitcomposer.errors import require
from vitcomposer.schema import Distill, Probe, SelfSupervised, Supervised
from vitcomposer.schema.recipe import Recipe

_LARGEST = 128  # pixels of a view for which a small image is stored: raw rows for more take twice a photograph's bytes
_IMAGES = 48  # of which the bytes of all are estimated
_MUCH = 2  # times the bytes of the images that a column beside them takes before an alternative is named
_IMAGENET = "imagenet"  # the folder that recipes of papers on it name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What of the images a recipe reads.

    Args:
        name: Of the recipe's page.
        views: Pixels of a side of its training views, ascending.
        evaluated: Pixels of the shorter side that evaluation resizes to.
        cut_small: The views that may be cut from smaller images, ascending.
        has_labels: Whether it learns from labels.
        folder: That its page reads.
    """

    name: str
    views: list[int]
    evaluated: int
    cut_small: list[int]
    has_labels: bool
    folder: str | None

    @property
    def small_side(self) -> int | None:
        """Shorter side of the small images worth storing; None where none are."""
        return needed_side(self.cut_small[-1]) if self.cut_small else None


def needs_of(cfg: Recipe, name: str) -> Needs:
    """What a recipe reads.

    Args:
        name: Of its page, for messages.
    """
    views, cut_small = [cfg.model.image_size], []
    if isinstance(cfg, SelfSupervised):
        views = sorted(set(cfg.crops.size_crops))
    elif isinstance(cfg, Supervised):
        options, _ = split_options(cfg.algorithms)
        views = list(options.image_sizes) if isinstance(options, Curriculum) else views
    if isinstance(cfg, Supervised | Probe) and _reads_small(cfg):
        cut_small = views if cfg.augment.low_resolution else [view for view in views if view <= _LARGEST]
    evaluation = cfg.evaluation
    return Needs(
        name=name,
        views=views,
        evaluated=int((evaluation.image_size or cfg.model.image_size) / evaluation.crop_ratio),
        cut_small=cut_small,
        has_labels=not isinstance(cfg, SelfSupervised),
        folder=cfg.data.local,
    )


def _reads_small(cfg: Supervised | Probe) -> bool:
    cached = isinstance(cfg, Distill) and cfg.cache is not None
    return cfg.augment.low_resolution or (cfg.augment.low_resolution_stages and not cached)


def fit(needs: Needs, given: StoreOptions, out: str) -> StoreOptions:
    """The options of a conversion for a recipe; those that were given stay.

    Args:
        given: By hand.
        out: Where the data set is written. ImageNet's is read as it is stored, as in the papers.

    Raises:
        ConfigError: An option with which the recipe could not read what it needs.
    """
    key, side = f"with --for {needs.name}", given.raw_below
    least = needed_side(needs.views[0])
    rule = f"left out {key}, whose crops are all cut from the whole image"
    require(side is None or needs.has_labels, "--raw-below", rule, side, "Leave it out.")
    rule = f"{least} or more {key}: its views of {needs.views[0]} px need 5/3 of their pixels"
    require(side is None or side >= least, "--raw-below", rule, side, "Leave it out, and the recipe decides.")
    rule = f"{needs.evaluated} or more {key}, whose evaluation resizes to that"
    fits = given.short_side is None or given.short_side >= needs.evaluated
    require(fits, "--short-side", rule, given.short_side, "Leave it out to keep all pixels.")
    fits = side is None or side >= needed_side(needs.views[-1])
    from_raw = fits and needs.cut_small == needs.views and given.small_quality is None
    is_imagenet = Path(needs.folder or "").name == _IMAGENET == Path(out).name
    return dataclasses.replace(
        given,
        # Parts of `image` are decoded by nothing then, and evaluation takes the whole of it.
        seekable=False if given.seekable is None and from_raw else given.seekable,
        raw_below=side or needs.small_side,
        exif=given.exif or ("keep" if is_imagenet else None),
    )


class Estimate(NamedTuple):
    """Bytes of a column over all splits, and how many an image has on average."""

    column: str
    total: float
    images: int


def estimate(source: Source, options: StoreOptions) -> list[Estimate]:
    """What the columns will take, by storing a few images of each split in memory; empty where none can be decoded."""
    totals = [0.0] * len(options.columns)
    images = 0
    for split, items in source.splits.items():
        seekable = split == "train" if options.seekable is None else options.seekable
        chosen = dataclasses.replace(options, seekable=seekable, exif=options.exif or source.exif)
        stored = list(_store_some(source, items, chosen))
        if not stored:
            continue
        images += len(items)
        # The first column follows the bytes of the files, which are known of all; the other its own pixels alone.
        by_bytes = sum(item.size for item in items) / sum(size for size, _ in stored)
        for at, column in enumerate(zip(*(sizes for _, sizes in stored), strict=True)):
            totals[at] += sum(column) * (len(items) / len(stored) if at else by_bytes)
    return [Estimate(name, total, images) for name, total in zip(options.columns, totals, strict=True) if images]


def _store_some(source: Source, items: list[Item], options: StoreOptions) -> Iterator[tuple[int, list[int]]]:
    """Bytes of some images as they came, and of their columns."""
    with reading(options.reading):
        for item in items[:: -(-len(items) // _IMAGES)]:
            try:
                columns = store_image(source.read(item), options, item.name).columns
            except (OSError, ValueError):  # told of when it is converted
                continue
            yield item.size, [len(column) for column in columns]


def describe(needs: Needs, options: StoreOptions, estimates: list[Estimate]) -> Iterator[str]:
    """The plan of a conversion, a line for each column and one for their sum."""
    limit = 0 if options.raw_below is None or not needs.has_labels else largest_view(options.raw_below)
    parts = {
        "image": [view for view in needs.views if view > limit],
        LOW_RESOLUTION_COLUMN: [view for view in needs.views if view <= limit],
    }
    for column, total, images in estimates:
        each, use = f"{total / images / 1000:,.1f} KB an image", _read_by(column, parts[column])
        yield f"  {column:<11}  {each:>20}  {total / 1e9:9,.3f} GB  {_how(column, options)}: {use}"
    if not estimates:
        return
    whole, *beside = (found.total for found in estimates)
    total = (whole + sum(beside)) / 1e9
    yield f"  {'in all':<11}  {'':>20}  {total:9,.3f} GB  for {estimates[0].images:,} images, by a look at some of them"
    if sum(beside) > _MUCH * whole and options.small_quality is None:
        times = sum(beside) / whole
        yield f"  image_small takes {times:.1f} times the bytes of image: --small-quality 90 stores it as JPEG"


def _read_by(column: str, views: list[int]) -> str:
    parts = [f"views of {listed(views)} px"] if views else []
    return ", ".join([*parts, "evaluation"] if column == "image" else parts)


def _how(column: str, options: StoreOptions) -> str:
    if column == LOW_RESOLUTION_COLUMN:
        form = "raw pixels" if options.small_quality is None else f"JPEG of quality {options.small_quality}"
        return f"shorter side {options.raw_below}, {form}"
    return "as it came" if options.short_side is None else f"shorter side at most {options.short_side}"
