"""Says how many images a second CPU cores, disks, network and PCI Express bring to the GPUs, and what would bring more.

Rates and machines are those of the whole run together.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from vitcomposer.cost.inputs import Change, Input, at_small_sizes, changes, kind_of, measured_inputs
from vitcomposer.cost.measured import measured_input
from vitcomposer.data.mds.index import SplitSize
from vitcomposer.data.workers import planned_workers
from vitcomposer.schema import Data, SelfSupervised, Supervised

IMAGENET_BYTES = 110_000  # of a photo of ImageNet-1k, mean
PCIE_SHARE = 0.8  # of the published bandwidth that copies from pinned memory are taken to reach
_CHANGES, _WORTH = 3, 0.95  # how many are named, and the share of the hours that they leave at most


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What all machines of a run have together: CPU cores and bytes/s; None is taken to be enough.

    Attributes:
        to_gpus: From host memory to all GPUs.
    """

    cpus: int | None = None
    disk: float | None = None
    network: float | None = None
    to_gpus: float | None = None


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What brings images to the GPUs of one run.

    Attributes:
        given: How its images are made; None where that was not measured.
        plain: The same as it was measured at full size alone.
        has_column: Whether the data set has small images for the first stages; None where ``bench`` measured it.
        known: All that was measured, by kind.
        bytes_per_image, bytes_from: As stored, and where that is known from.
        images: Of an epoch.
        cached: Whether shards stay on a local disk, so that they come over the network in the first epoch alone.
    """

    given: Input | None
    plain: Input | None
    has_column: bool | None
    known: dict[str, Input]
    machines: Machines
    bytes_per_image: float
    bytes_from: str
    images: int
    cached: bool


def build_feed(
    cfg: Supervised | SelfSupervised,
    *,
    results: Path,
    measured: Path | None,
    machines: Machines,
    split: SplitSize | None,
    images: int,
) -> Feed:
    """What is known of the input of a recipe.

    Args:
        results: Folder with ``input_*.json`` of benchmarks.input.
        measured: A file of ``vitcomposer bench``, which goes before, or of benchmarks/gpu.py.
        split: Of the data set, where it is here.
        images: Of an epoch.

    Raises:
        ConfigError: A file that measured another kind of input, or nothing.
    """
    kind, known = kind_of(cfg), measured_inputs(results, cfg)
    own = None if measured is None else measured_input(measured, kind)
    given = plain = own or known.get(kind)
    # A data set that is not here is taken to be what the yaml's header says: as convert --for makes it.
    has_column = None if own else split is None or split.small_side is not None
    if plain is not None and has_column is not None:
        given = at_small_sizes(cfg, plain, known, column=has_column)
    if split is not None and split.samples and split.raw_bytes:
        size, source = split.raw_bytes / split.samples, "the index of the data set"
    elif given is not None:
        size, source = given.bytes_per_image, given.source
    else:
        size, source = IMAGENET_BYTES, "the mean of ImageNet-1k"
    cached = stays_cached(cfg.data, images * size)
    return Feed(
        given=given,
        plain=plain,
        has_column=has_column,
        known=known,
        machines=machines,
        bytes_per_image=size,
        bytes_from=source,
        images=images,
        cached=cached,
    )


class Demand(NamedTuple):
    """One stage of a run: its images, how many a second the GPUs train, and the pixels that are made of each."""

    images: int
    gpu_rate: float
    pixels: int


def limits(gpu_rate: float, pixels: int, feed: Feed) -> dict[str, float]:
    """Images a second by what limits them; what is not known, or taken as enough, is left out.

    Args:
        gpu_rate: Images a second that the GPUs train.
        pixels: Made of each.
    """
    found, machines = {"GPU": gpu_rate}, feed.machines
    if feed.given is not None and machines.cpus is not None:
        found["decode"] = machines.cpus / feed.given.seconds(pixels)
    if machines.disk is not None:
        found["disk"] = machines.disk / feed.bytes_per_image
    if machines.network is not None and not feed.cached:
        found["network"] = machines.network / feed.bytes_per_image
    if machines.to_gpus is not None:
        found["PCIe"] = machines.to_gpus / (3 * pixels)
    return found


def hours(stages: Sequence[Demand], feed: Feed) -> float:
    """Of all stages, each by its slowest part, and of filling the cache."""
    return sum(_seconds(stage, feed) for stage in stages) / 3600 + hours_to_fill_cache(stages, feed)


def _seconds(stage: Demand, feed: Feed) -> float:
    return stage.images / min(limits(stage.gpu_rate, stage.pixels, feed).values())


def hours_to_fill_cache(stages: Sequence[Demand], feed: Feed) -> float:
    """What the first epoch waits for the network, where the images stay on a local disk afterwards."""
    if feed.machines.network is None or not feed.cached:
        return 0.0
    training = feed.images / stages[0].images * _seconds(stages[0], feed)
    return max(0.0, feed.images * feed.bytes_per_image / feed.machines.network - training) / 3600


def stays_cached(data: Data, size: float) -> bool:
    """Whether a data set of so many bytes that comes from a bucket stays on the local disk after the first epoch."""
    limit = re.fullmatch(r"([\d.]+) *([kmgt]?)b?", (data.cache_limit or "").lower())
    fits = limit is None or float(limit[1]) * 1024 ** " kmgt".index(limit[2] or " ") >= size
    return data.remote is not None and fits


class Advice(NamedTuple):
    """Something to change, the hours that the run then takes, and the bytes a second that it reads at most."""

    change: str
    hours: float
    bytes_per_second: float


def advice(cfg: Supervised | SelfSupervised, stages: Sequence[Demand], feed: Feed) -> list[Advice]:
    """What to change where GPUs wait: machines first, then the input, the best first."""
    more = [_try(what, stages, other) for what, other in _larger(stages, feed)]
    cheaper = []
    if feed.given is not None:
        scale = feed.bytes_per_image / feed.given.bytes_per_image
        for what, given in _cheaper(cfg, feed):
            other = replace(feed, given=given, bytes_per_image=scale * given.bytes_per_image)
            cheaper.append(_try(what, stages, other))
    worth = _WORTH * hours(stages, feed)
    return [one for one in (*more, *sorted(cheaper, key=lambda one: one.hours)) if one.hours < worth][:_CHANGES]


def _cheaper(cfg: Supervised | SelfSupervised, feed: Feed) -> list[Change]:
    """Other inputs of the same recipe, with small images where the data set has them."""
    assert feed.plain is not None
    found, column = changes(cfg, feed.plain, feed.known), feed.has_column
    if column is None:
        return found
    found = [Change(what, at_small_sizes(cfg, given, feed.known, column=column)) for what, given in found]
    stored = at_small_sizes(cfg, feed.plain, feed.known, column=True)
    return found if column else [*found, Change("vitcomposer convert --for this yaml", stored)]


def _try(what: str, stages: Sequence[Demand], feed: Feed) -> Advice:
    return Advice(what, hours(stages, feed), bytes_read(stages, feed))


def bytes_read(stages: Sequence[Demand], feed: Feed) -> float:
    """A second, in the stage that reads most."""
    return max(min(limits(s.gpu_rate, s.pixels, feed).values()) for s in stages) * feed.bytes_per_image


def _larger(stages: Sequence[Demand], feed: Feed) -> list[tuple[str, Feed]]:
    """Twice the cores, or as many as the stages ask for; disk and network as fast as they ask."""
    found, has = [], feed.machines
    if feed.given is not None and has.cpus is not None:
        asked = max(stage.gpu_rate * feed.given.seconds(stage.pixels) for stage in stages)
        cores = math.ceil(min(2 * has.cpus, asked))
        found.append((f"{cores:,d} CPU cores", replace(has, cpus=cores)))
    fastest = max(stage.gpu_rate for stage in stages) * feed.bytes_per_image
    if has.disk is not None:
        found.append((f"a disk of {fastest / 1e9:.1f} GB/s", replace(has, disk=fastest)))
    if has.network is not None:
        found.append((f"a network of {fastest / 1e9:.1f} GB/s", replace(has, network=fastest)))
    return [(what, replace(feed, machines=machines)) for what, machines in found]


def workers_to_set(
    cfg: Supervised | SelfSupervised, stages: Sequence[Demand], feed: Feed, gpus: int
) -> dict[str, float] | None:
    """Where the loader's workers are too few for the cores: their number, a better one, and the hours of now."""
    cpus = feed.machines.cpus
    if feed.given is None or cpus is None:
        return None
    workers = cfg.data.num_workers
    if isinstance(workers, str):
        workers = planned_workers(cpus, gpus)
        if gpus * (workers + 1) >= cpus:  # a core is left to the process of each GPU
            return None
    busy = min(cpus, gpus * max(1, workers))
    now = hours(stages, replace(feed, machines=replace(feed.machines, cpus=busy)))
    if _WORTH * now < hours(stages, feed):
        return None
    asked = max(stage.gpu_rate * feed.given.seconds(stage.pixels) for stage in stages)
    return {"now": workers, "wanted": max(1, math.ceil(min(cpus, asked) / gpus)), "cores_at_work": busy, "hours": now}
