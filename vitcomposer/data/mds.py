"""Write image data sets as MDS shards, in parallel and in pieces that a second call can continue.

The plan of a split cuts its shuffled items into shards before anything is written, from sizes alone. One task makes
one shard: it reads, decodes and checks every image, stores the shard and then a done-marker. So the result does not
depend on the number of workers, and after a crash only shards without a marker are made again::

    OUT/train/shard.00000.mds ...  index.json  class_names.json  [skipped.json]
    OUT/.convert/train/plan.json  items.json.gz  done/00000.json ...
    OUT/summary.json
"""

import gzip
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from vitcomposer.data.mds_shard import SAMPLE_OVERHEAD, check_image, empty_shard_bytes, encode_shard, parse_bytes
from vitcomposer.data.sources import Item, Source, check_same_classes, hash_order
from vitcomposer.data.storage import Store, open_store

_STATE = ".convert"
_SHOWN = 10  # bad images that an error lists

Progress = Callable[[int, int], None]


class _Part(NamedTuple):
    """What becomes one shard."""

    split: str
    number: int
    items: list[Item]

    @property
    def marker(self) -> str:
        return f"{_STATE}/{self.split}/done/{self.number:05}.json"


def convert(
    source: Source,
    out: str | Path,
    *,
    workers: int | None = None,
    shard_size: int | str = "64mb",
    skip_bad: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Write every split of a source as MDS shards with columns ``image`` (bytes as they are) and ``label`` (int).

    Called again after a crash with the same arguments it makes what is missing; on a finished data set it does nothing.

    Args:
        source: What to convert.
        out: Local folder or ``s3://bucket/prefix``.
        workers: Processes; None is one per core. The result does not depend on it.
        shard_size: Largest shard, in bytes or as ``64mb`` (powers of 1024). A larger image gets a shard of its own.
        skip_bad: Leave images out that cannot be decoded, list them in ``skipped.json``, and go on.
        seed: Of the order that samples are stored in.
        on_progress: Called with images done (in this call and before) and images in all, first before any work.

    With several workers a script must call this below ``if __name__ == "__main__"``.

    Returns:
        What ``summary.json`` holds for the splits of ``source``.

    Raises:
        ValueError: Anything the user can mend: a bad image without ``skip_bad``, another source or other options than
            the ones ``out`` was begun with, a place that cannot be written.
    """
    store = open_store(out)
    limit = parse_bytes(shard_size)
    store.check()
    parts: list[_Part] = []
    for split, items in source.splits.items():
        _check_split(store, source, split)
        parts += _plan(store, source, split, items, limit, seed)
    done = _read_markers(store, parts)
    pending = [part for part in parts if part.marker not in done]
    _check_room(store, pending)
    progress = _counted(on_progress, sum(len(part.items) for part in parts))
    progress(sum(len(part.items) for part in parts if part.marker in done))
    for part, marker in _run(source, store, pending, limit, workers):
        done[part.marker] = marker
        progress(len(part.items))
    bad = [entry for part in parts for entry in done[part.marker]["bad"]]
    if bad and not skip_bad:
        raise ValueError(_bad_images(bad))
    summary = {}
    for split in source.splits:
        summary[split] = _finish(store, source, split, [done[part.marker] for part in parts if part.split == split])
    _write_summary(store, summary)
    store.clean()
    return summary


def _check_split(store: Store, source: Source, split: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", split):
        raise ValueError(f"--split must be a folder name of letters, digits, - and _, got {split!r}. Use train or val.")
    if not source.splits[split]:
        raise ValueError(f"The split {split} must hold at least one image. It holds none.")
    twice = [name for name, count in Counter(source.class_names).items() if count > 1]
    if twice:
        raise ValueError(f"Class names must be different from each other, got {twice[0]!r} twice.")
    for other, names in _finished_splits(store).items():
        if other not in source.splits:
            check_same_classes(source.class_names, names, split, f"{store.url}/{other}")


def _finished_splits(store: Store) -> dict[str, list[str]]:
    """Class names of every split that the summary lists."""
    splits = (_read_json(store, "summary.json") or {}).get("splits", {})
    return {split: list(facts["class_counts"]) for split, facts in splits.items()}


def existing_class_names(out: str | Path, split: str) -> list[str] | None:
    """Class names of another finished split in ``out``, so that a split that is added gets the same labels."""
    splits = _finished_splits(open_store(out))
    return next((names for name, names in splits.items() if name != split), None)


def _plan(store: Store, source: Source, split: str, items: list[Item], limit: int, seed: int) -> list[_Part]:
    """Record the plan, or compare with the one on record, and cut the items into parts.

    Both splits are shuffled. In training StreamingDataset shuffles within blocks of neighbouring shards only, so a
    shard must hold a mixture of classes; of ``val`` any first part is then a fair sample.
    """
    items = sorted(items, key=lambda item: hash_order(seed, item.name))
    listing = json.dumps([list(item) for item in items]).encode()
    plan = {
        "class_names": source.class_names,
        "images": len(items),
        "items_sha256": hashlib.sha256(listing).hexdigest(),
        "seed": seed,
        "shard_size": limit,
    }
    folder = f"{_STATE}/{split}"
    old = _read_json(store, f"{folder}/plan.json")
    if old is None:
        if store.read(f"{split}/index.json", 0, 1) is not None:
            raise ValueError(f"{store.url}/{split} already holds a data set of another making. Choose an empty place.")
        store.write(f"{folder}/items.json.gz", gzip.compress(listing, mtime=0))
        store.write(f"{folder}/plan.json", _json(plan))
    elif old != plan:
        found = _plan_difference(old, plan, items, lambda: store.read(f"{folder}/items.json.gz"))
        raise ValueError(
            f"{store.url}/{split} was begun with other input: {found}. Repeat the first call, or choose an empty place."
        )
    return list(_cut(split, items, limit))


def _cut(split: str, items: list[Item], limit: int) -> Iterator[_Part]:
    """Parts whose shards stay within the limit, filled as MDSWriter fills them."""
    empty = empty_shard_bytes(limit)
    number, size, chosen = 0, empty, []
    for item in items:
        if chosen and size + item.size + SAMPLE_OVERHEAD > limit:
            yield _Part(split, number, chosen)
            number, size, chosen = number + 1, empty, []
        chosen.append(item)
        size += item.size + SAMPLE_OVERHEAD
    yield _Part(split, number, chosen)


def _read_markers(store: Store, parts: list[_Part]) -> dict[str, dict[str, Any]]:
    found = {name for split in {part.split for part in parts} for name in store.sizes(f"{_STATE}/{split}/done/")}
    names = [part.marker for part in parts if part.marker in found]
    with ThreadPoolExecutor(16) as pool:  # hides the latency of a bucket
        return dict(zip(names, pool.map(lambda name: _read_json(store, name), names), strict=True))


def _plan_difference(old: dict, new: dict, items: list[Item], read_listing: Callable[[], bytes | None]) -> str:
    if old["shard_size"] != new["shard_size"]:
        return f"--shard-size was {old['shard_size']} bytes and is {new['shard_size']} bytes"
    if old["seed"] != new["seed"]:
        return f"--seed was {old['seed']} and is {new['seed']}"
    before = {name: rest for name, *rest in json.loads(gzip.decompress(read_listing() or gzip.compress(b"[]")))}
    now = {item.name: [item.size, item.label] for item in items}
    kinds = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "with another size or label": [name for name in now if name in before and now[name] != before[name]],
    }
    found = [f"{len(names)} images are {kind} (such as {min(names)})" for kind, names in kinds.items() if names]
    return "; ".join(found) or f"the classes were {old['class_names'][:_SHOWN]} and are {new['class_names'][:_SHOWN]}"


def _check_room(store: Store, pending: list[_Part]) -> None:
    needed, free = sum(item.size + SAMPLE_OVERHEAD for part in pending for item in part.items), store.free_bytes()
    if free is not None and needed > free:
        raise ValueError(
            f"{store.url} must have room for {needed / 1e9:.1f} GB more, it has {free / 1e9:.1f} GB. Free some space."
        )


_job: tuple[Source, Store, int]  # set once per process: the source may be large


def _start_worker(source: Source, store: Store, limit: int) -> None:
    global _job
    _job = source, store, limit
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what happens on Ctrl-C
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End when the parent is killed: waiting for work on a pipe that it holds open itself, a worker would stay."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _make_shard_in_worker(part: _Part) -> dict[str, Any]:
    return _make_shard(part, *_job)


def _make_shard(part: _Part, source: Source, store: Store, limit: int) -> dict[str, Any]:
    """Write one shard and its done-marker; the marker's content is all that the merge needs."""
    samples: list[tuple[bytes, int]] = []
    bad: list[dict[str, str]] = []
    sizes, formats, classes = Counter[str](), Counter[str](), Counter[str]()
    for item in part.items:
        try:
            data = source.read(item)
        except OSError as error:  # a disk or network that fails is no bad image: nothing may be left out for it
            raise ValueError(f"{item.name} cannot be read: {error}. Mend it and call again.") from error
        try:
            name, width, height = check_image(data)
        except ValueError as error:
            bad.append({"file": item.name, "reason": str(error)})
            continue
        samples.append((data, item.label))
        sizes[f"{width}x{height}"] += 1
        formats[name] += 1
        classes[str(item.label)] += 1
    marker: dict[str, Any] = {"bad": bad, "shard": None, "sizes": sizes, "formats": formats, "classes": classes}
    marker["bytes"] = sum(len(data) for data, _ in samples)
    if samples:
        basename = f"shard.{part.number:05}.mds"
        shard, marker["shard"] = encode_shard(samples, limit, basename)
        store.write(f"{part.split}/{basename}", shard)
    store.write(part.marker, _json(marker))
    return marker


def _run(
    source: Source, store: Store, parts: list[_Part], limit: int, workers: int | None
) -> Iterator[tuple[_Part, dict[str, Any]]]:
    """Make the shards in any order and yield each with its marker."""
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be 1 or more, got {workers}. Leave it out for one per core.")
    workers = min(workers or os.cpu_count() or 1, len(parts))
    if workers <= 1:
        yield from ((part, _make_shard(part, source, store, limit)) for part in parts)
        return
    # spawn, not fork: the parent may run threads (progress bar, S3 client), and a forked lock stays locked for ever
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(source, store, limit))
    try:
        futures = {pool.submit(_make_shard_in_worker, part): part for part in parts}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A worker process died, most likely for want of memory. Call again to continue, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _bad_images(bad: list[dict[str, str]]) -> str:
    shown = "\n".join(
        f"  {entry['file']}: {entry['reason']}" for entry in sorted(bad, key=lambda e: e["file"])[:_SHOWN]
    )
    more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return (
        f"Every image must be readable, {len(bad)} cannot be decoded:\n{shown}{more}\n"
        "Call again with --skip-bad to leave them out, or mend them and convert into an empty place."
    )


def _finish(store: Store, source: Source, split: str, markers: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the files beside the shards, the index last, and return the split's part of the summary."""
    bad = sorted((entry for marker in markers for entry in marker["bad"]), key=lambda entry: entry["file"])
    shards = [marker["shard"] for marker in markers if marker["shard"]]
    if not shards:
        raise ValueError(f"The split {split} must hold a readable image. All {len(bad)} are bad:\n{_bad_images(bad)}")
    total = {key: Counter[str]() for key in ("sizes", "formats", "classes")}
    for marker in markers:
        for key, counter in total.items():
            counter.update(marker[key])
    widths, heights = Counter[int](), Counter[int]()
    for size, count in total["sizes"].items():
        width, height = map(int, size.split("x"))
        widths[width] += count
        heights[height] += count
    counts = {name: total["classes"][str(label)] for label, name in enumerate(source.class_names)}
    if bad:
        _write_new(store, f"{split}/skipped.json", _json(bad))
    _write_new(store, f"{split}/class_names.json", _json(source.class_names))
    # laid out as MDSWriter does, without line breaks
    _write_new(store, f"{split}/index.json", json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())
    return {
        "images": sum(shard["samples"] for shard in shards),
        "bytes": sum(marker["bytes"] for marker in markers),
        "shards": len(shards),
        "shard_bytes": sum(shard["raw_data"]["bytes"] for shard in shards),
        "skipped": len(bad),
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
    old = _read_json(store, "summary.json") or {}
    _write_new(store, "summary.json", _json({"splits": dict(sorted({**old.get("splits", {}), **splits}.items()))}))


def _write_new(store: Store, name: str, data: bytes) -> None:
    if store.read(name) != data:
        store.write(name, data)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _read_json(store: Store, name: str) -> Any:
    data = store.read(name)
    return None if data is None else json.loads(data)


def _counted(on_progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def add(images: int) -> None:
        nonlocal done
        done += images
        if on_progress:
            on_progress(done, total)

    return add
