"""Writes image data sets as MDS shards, in parallel and in chunks, so that a second call continues a killed one.

One task makes one chunk of the plan (conversion.plan), which is one shard or a few: it reads, checks and
stores every image and then the done-marker. So the result does not depend on the number of workers, and after a crash
only chunks without a marker are made again::

    OUT/train/shard.00000.mds ...  index.json  class_names.json
    OUT/.convert/train/plan.json  items.json.gz  done/00000.json ...
    OUT/summary.json  [left_out.csv]

Several machines make one data set together in vitcomposer.data.conversion.parts, out of the same steps.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vitcomposer.data.conversion.chunk_workers import run_chunks
from vitcomposer.data.conversion.encode import StoreOptions
from vitcomposer.data.conversion.left_out import (
    LEFT_OUT,
    MAX_BAD_FRACTION,
    bad_images,
    check_bad,
    check_fraction,
    count_images,
    write_list,
)
from vitcomposer.data.conversion.plan import Chunk, check_room, plan_split, read_json, read_plan, to_json
from vitcomposer.data.conversion.shard import parse_bytes
from vitcomposer.data.conversion.sources import Source, check_same_classes
from vitcomposer.data.mds.index import CLASS_NAMES
from vitcomposer.data.mds.small_column import LOW_RESOLUTION_COLUMN
from vitcomposer.stores.objects import LocalStore, Store, open_store

Progress = Callable[[int, int], None]


def convert(
    source: Source,
    out: str | Path,
    *,
    workers: int | None = None,
    shard_size: int | str = "64mb",
    max_bad_fraction: float = MAX_BAD_FRACTION,
    seed: int = 0,
    stored: StoreOptions | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write every split of a source as MDS shards with columns ``image`` (bytes) and ``label`` (int).

    Called again after a crash with the same arguments it makes what is missing; on a finished data set it does nothing.

    Args:
        source: What to convert.
        out: Local folder or ``s3://bucket/prefix``.
        workers: Processes; None is one per core. The result does not depend on it.
        shard_size: Largest shard, in bytes or as ``64mb`` (powers of 1024). A larger image gets a shard of its own.
        max_bad_fraction: Share of a split's images that may be left out as they cannot be decoded; ``left_out.csv``
            lists them.
        seed: Of the order that samples are stored in, and of the draw of raw images.
        stored: How images are stored. By default those of the split train become seekable, which changes no pixel.
        on_progress: Called with images done (in this call and before) and images in all, first before any work, then
            for every image or several times a second.

    With several workers a script must call this below ``if __name__ == "__main__"``.

    Returns:
        What ``summary.json`` holds for the splits of ``source``.

    Raises:
        ValueError: Anything the user can mend: more bad images than may be left out, another source or other options
            than the ones ``out`` was begun with, a place that cannot be written, or that another process writes.
    """
    check_fraction(max_bad_fraction)
    with open_store(out).one_writer():
        store, chunks = begin(source, out, shard_size=shard_size, seed=seed, stored=stored)
        store.clean()
        done = make(source, store, chunks, workers=workers, on_progress=on_progress)
        markers = {split: [done[chunk.marker] for chunk in chunks if chunk.split == split] for split in source.splits}
        return finish(store, dict.fromkeys(source.splits, source.class_names), markers, max_bad_fraction)


def begin(
    source: Source,
    out: str | Path,
    *,
    shard_size: int | str = "64mb",
    seed: int = 0,
    stored: StoreOptions | None = None,
) -> tuple[Store, list[Chunk]]:
    """Open the place and record the plan there, or compare with the one on record.

    Raises:
        ValueError: As of :func:`convert`.
    """
    store = open_store(out)
    limit = parse_bytes(shard_size)
    _check_apart(source, store)
    store.check()
    options = dataclasses.replace(stored or StoreOptions(), seed=seed)
    chunks: list[Chunk] = []
    for split in source.splits:
        _check_split(store, source, split)
        chunks += plan_split(store, source, split, limit, options)
    return store, chunks


def make(
    source: Source, store: Store, chunks: list[Chunk], *, workers: int | None, on_progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Make those chunks that have no done-marker yet and return the markers of all, whose bad images are unchecked.

    Raises:
        ValueError: As of :func:`convert`.
    """
    done = read_markers(store, {chunk.marker: chunk.plan for chunk in chunks})
    pending = [chunk for chunk in chunks if chunk.marker not in done]
    check_room(store, pending)
    progress = counted(on_progress, sum(len(chunk.items) for chunk in chunks))
    progress(sum(len(chunk.items) for chunk in chunks if chunk.marker in done))
    for chunk, marker in run_chunks(source, store, pending, workers, progress):
        done[chunk.marker] = marker
    return done


def finish(
    store: Store,
    class_names: dict[str, list[str]],
    markers: dict[str, list[dict[str, Any]]],
    max_bad_fraction: float,
) -> dict[str, dict[str, Any]]:
    """Write what lies beside the shards of these splits, from their markers in order, and return the summary.

    Raises:
        ValueError: More bad images than may be left out, or no good one.
    """
    bad = {split: bad_images(found) for split, found in markers.items()}
    write_list(store, bad)  # also where there are too many: it is what the user needs then
    images = {split: count_images(found) for split, found in markers.items()}
    check_bad(bad, images, max_bad_fraction, f" {store.url}/{LEFT_OUT} lists them.")
    summary = {split: _finish_split(store, class_names[split], split, found) for split, found in markers.items()}
    _write_summary(store, summary)
    store.clean()
    return summary


def _check_apart(source: Source, store: Store) -> None:
    """Refuse to write into the folder that is read, or into one that holds it."""
    if source.folder is None or not isinstance(store, LocalStore):
        return
    read, written = source.folder.resolve(), store.root.resolve()
    if written.is_relative_to(read) or read.is_relative_to(written):
        raise ValueError(
            f"OUT must be a folder outside of the one that is converted, {source.folder}, and not hold it, got "
            f"{store.url}. Choose another, such as {read.parent / (read.name + '-mds')}."
        )


def _check_split(store: Store, source: Source, split: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
        raise ValueError(f"--split must be a folder name of letters, digits, - and _, got {split!r}. Use train or val.")
    if not source.splits[split]:
        raise ValueError(f"The split {split} must hold at least one image. It holds none.")
    twice = [name for name, count in Counter(source.class_names).items() if count > 1]
    if twice:
        raise ValueError(f"Class names must be different from each other, got {twice[0]!r} twice.")
    for other, names in finished_splits(store).items():
        if other not in source.splits:
            check_same_classes(source.class_names, names, split, f"{store.url}/{other}")


def finished_splits(store: Store) -> dict[str, list[str]]:
    """Class names of every split that the summary lists."""
    splits = (read_json(store, "summary.json") or {}).get("splits", {})
    return {split: list(facts["class_counts"]) for split, facts in splits.items()}


def existing_class_names(out: str | Path, split: str) -> list[str] | None:
    """Class names of another finished split in ``out``, so that a split that is added gets the same labels."""
    splits = finished_splits(open_store(out))
    return next((names for name, names in splits.items() if name != split), None)


def read_markers(store: Store, plans: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The done-markers that are there, of these names and hashes of plans; one of another plan does not count."""
    found = {name for folder in {name.rpartition("/")[0] for name in plans} for name in store.sizes(f"{folder}/")}
    there = [name for name in plans if name in found]
    with ThreadPoolExecutor(16) as pool:  # hides the latency of a bucket
        markers = zip(there, pool.map(lambda name: _read_marker(store, name), there), strict=True)
        return {name: marker for name, marker in markers if marker.get("plan", plans[name]) == plans[name]}


def _read_marker(store: Store, name: str) -> dict[str, Any]:
    marker = read_json(store, name)
    if "shards" not in marker:  # of a version that stored every image as it came, one shard a chunk
        marker["shards"] = [marker["shard"]] if marker["shard"] else []
        marker["original_bytes"] = marker["bytes"]
        marker["outcomes"] = {"kept": sum(marker["formats"].values())}
    return marker


def _finish_split(store: Store, class_names: list[str], split: str, markers: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the files beside the shards, the index last, and return the split's part of the summary."""
    shards = [shard for marker in markers for shard in marker["shards"]]
    if not shards:
        raise ValueError(
            f"The split {split} must hold an image that can be decoded, none of {count_images(markers):,} can. "
            f"{store.url}/{LEFT_OUT} says why."
        )
    total = {key: Counter[str]() for key in ("sizes", "formats", "classes", "outcomes")}
    for marker in markers:
        for key, counter in total.items():
            counter.update(marker[key])
    widths, heights = Counter[int](), Counter[int]()
    for size, count in total["sizes"].items():
        width, height = map(int, size.split("x"))
        widths[width] += count
        heights[height] += count
    counts = {name: total["classes"][str(label)] for label, name in enumerate(class_names)}
    write_new(store, f"{split}/{CLASS_NAMES}", to_json(class_names))
    index = {"version": 2, "shards": shards}
    stored = (read_plan(store, split) or {}).get("stored") or {}
    if stored.get("--exif") == "apply":
        index["exif"] = "apply"
    if (side := stored.get("--raw-below")) is not None:
        index[LOW_RESOLUTION_COLUMN] = side
    # laid out as MDSWriter does, without line breaks
    write_new(store, f"{split}/index.json", json.dumps(index, sort_keys=True).encode())
    return {
        "images": sum(shard["samples"] for shard in shards),
        "bytes": sum(marker["bytes"] for marker in markers),
        "original_bytes": sum(marker["original_bytes"] for marker in markers),
        "stored": dict(total["outcomes"].most_common()),
        "shards": len(shards),
        "shard_bytes": sum(shard["raw_data"]["bytes"] for shard in shards),
        "left_out": len(bad_images(markers)),
        "formats": dict(sorted(total["formats"].items())),
        "width": _spread(widths),
        "height": _spread(heights),
        "images_per_class": _spread(Counter(counts.values())),
        "class_counts": counts,
    }


def _spread(counter: Counter[int]) -> dict[str, int]:
    values = sorted(counter.elements())
    return {"min": values[0], "median": values[len(values) // 2], "max": values[-1]}


def _write_summary(store: Store, splits: dict[str, Any]) -> None:
    old = read_json(store, "summary.json") or {}
    write_new(store, "summary.json", to_json({"splits": dict(sorted({**old.get("splits", {}), **splits}.items()))}))


def write_new(store: Store, name: str, data: bytes) -> None:
    """Write an object unless it holds this already."""
    if store.read(name) != data:
        store.write(name, data)


def counted(on_progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that adds up images and reports the sum."""
    done = 0

    def add(images: int) -> None:
        nonlocal done
        done += images
        if on_progress:
            on_progress(done, total)

    return add
