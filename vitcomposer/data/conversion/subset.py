"""Writes a class-balanced part of a split as a split of its own, for low-shot evaluation with any recipe.

Rows are copied byte by byte, whatever their columns, so a model sees the very samples of the whole split.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vitcomposer.data.conversion.inspect import columns_of_row, read_shard_index
from vitcomposer.data.conversion.plan import read_json, to_json
from vitcomposer.data.conversion.sources import hash_order
from vitcomposer.data.mds.index import CLASS_NAMES
from vitcomposer.data.mds.reader import LABEL_COLUMNS, LABEL_FORMATS
from vitcomposer.json_file import parse_json
from vitcomposer.stores.objects import Store, open_store

_RECORD = "subset.json"
_SHARD_BYTES = 64 << 20


def write_subset(
    location: str | Path, name: str, *, fraction: float, seed: int, split: str = "train"
) -> dict[str, Any]:
    """Write ``round(fraction * samples)`` samples of a split as the split ``name`` beside it.

    Every class gives the same number, or one more where that does not come out even; a class that has fewer gives all
    it has, and the others make up for it. Which samples is drawn by ``seed`` from their places in the split. Called
    again with the same arguments it does nothing.

    Args:
        location: Folder or ``s3://bucket/prefix`` of the splits.
        fraction: In (0, 1).

    Returns:
        What ``subset.json`` in the new split holds: of, fraction, seed, images, class_counts.

    Raises:
        ValueError: No such split, compressed shards, a name in use, or a fraction that leaves a class without sample.
    """
    _check_arguments(name, split, fraction)
    store = open_store(location)
    with store.one_writer():
        return _write_subset(store, name, fraction, seed, split)


def _finished(store: Store, name: str, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the same subset, if it is whole."""
    done = read_json(store, f"{name}/{_RECORD}")
    if done is not None and {key: done[key] for key in record} == record and store.read(f"{name}/index.json", 0, 1):
        return done
    if done is None and store.read(f"{name}/index.json", 0, 1) is not None:
        raise ValueError(f"{store.url}/{name} must be a new split, it holds a data set. Choose another name.")
    if done is not None and {key: done[key] for key in record} != record:
        raise ValueError(f"{store.url}/{name} is another subset: {done}. Choose another name.")
    return None


def _write_subset(store: Store, name: str, fraction: float, seed: int, split: str) -> dict[str, Any]:
    record = {"of": split, "fraction": fraction, "seed": seed}
    done = _finished(store, name, record)
    if done is not None:
        return done
    index = store.read(f"{split}/index.json")
    if index is None:
        raise ValueError(f"There must be an index.json in {store.url}/{split}. There is none: check the path.")
    shards = read_shard_index(index, f"{store.url}/{split}/index.json")
    labels = np.concatenate([_labels(_read(store, split, shard), shard) for shard in shards])
    chosen = choose_balanced(labels, fraction, seed)
    counts = Counter(labels[chosen].tolist())
    record |= {"images": len(chosen), "class_counts": {str(label): counts[label] for label in sorted(counts)}}
    store.write(f"{name}/{_RECORD}", to_json(record))
    entries = list(_write_shards(store, split, name, shards, set(chosen.tolist())))
    class_names = store.read(f"{split}/{CLASS_NAMES}")
    if class_names is not None:
        store.write(f"{name}/{CLASS_NAMES}", class_names)
    whole = {**parse_json(index), "shards": entries}  # with what holds for all images
    store.write(f"{name}/index.json", json.dumps(whole, sort_keys=True).encode())
    store.clean()
    return record


def choose_balanced(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Sorted places of ``round(fraction * len(labels))`` samples, of each class as many as of the others.

    Raises:
        ValueError: Fewer samples than classes.
    """
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels.tolist()):
        places.setdefault(label, []).append(place)
    total = round(fraction * len(labels))
    if total < len(places):
        least = len(places) / len(labels)
        raise ValueError(
            f"--fraction must leave every of the {len(places)} classes a sample, got {fraction}, which is {total} of "
            f"{len(labels)} samples. Use {least:.2g} or more."
        )
    chosen: list[int] = []
    # The smallest first: what they lack is left to those after them. Equal ones in an order drawn from the seed.
    classes = sorted(places, key=lambda label: (len(places[label]), hash_order(seed, f"class/{label}")))
    for number, label in enumerate(classes):
        count = (total - len(chosen)) // (len(classes) - number)
        members = sorted(places[label], key=lambda place: hash_order(seed, f"subset/{place}"))
        chosen += members[:count]
    return np.sort(np.array(chosen))


def _check_arguments(name: str, split: str, fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"--fraction must be above 0 and below 1, got {fraction}. Use 0.01 or 0.1.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name == split:
        raise ValueError(f"The new split must be a folder name other than {split}, got {name!r}. Use train_1pct.")


def _write_shards(
    store: Store, split: str, name: str, shards: list[dict[str, Any]], chosen: set[int]
) -> Iterator[dict[str, Any]]:
    """Store the chosen rows in shards of their own and yield the index entries of these."""
    rows: list[bytes] = []
    first, number, head = 0, 0, b""
    for shard in shards:
        here = [row for row in range(shard["samples"]) if first + row in chosen]
        first += shard["samples"]
        if here:
            data = _read(store, split, shard)
            offsets = _offsets(data, shard)
            head = data[4 * (shard["samples"] + 2) : offsets[0]]  # the columns, as JSON
            rows += [data[offsets[row] : offsets[row + 1]] for row in here]
        if rows and (shard is shards[-1] or sum(map(len, rows)) >= _SHARD_BYTES):
            yield _write_shard(store, f"{name}/", f"shard.{number:05}.mds", head, rows, shard)
            rows, number = [], number + 1


def _write_shard(
    store: Store, folder: str, basename: str, head: bytes, rows: list[bytes], like: dict[str, Any]
) -> dict[str, Any]:
    offsets = np.cumsum([4 * (len(rows) + 2) + len(head), *map(len, rows)])
    data = b"".join((np.array([len(rows), *offsets], dtype="<u4").tobytes(), head, *rows))
    store.write(folder + basename, data)
    raw = {"basename": basename, "bytes": len(data), "hashes": {"xxh64": xxhash.xxh64(data).hexdigest()}}
    return {**like, "samples": len(rows), "raw_data": raw, "zip_data": None, "compression": None, "hashes": ["xxh64"]}


def _read(store: Store, split: str, shard: dict[str, Any]) -> bytes:
    name = f"{split}/{shard['raw_data']['basename']}"
    if shard["zip_data"]:
        raise ValueError(f"{store.url}/{name} must not be compressed ({shard['compression']}). Convert again.")
    data = store.read(name)
    if data is None or len(data) != shard["raw_data"]["bytes"]:
        raise ValueError(f"{store.url}/{name} is missing or cut. Restore it, or convert again.")
    return data


def _offsets(data: bytes, shard: dict[str, Any]) -> list[int]:
    return np.frombuffer(data, "<u4", shard["samples"] + 1, offset=4).tolist()


def _labels(data: bytes, shard: dict[str, Any]) -> NDArray[np.int64]:
    named = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    column = next((name for name in LABEL_COLUMNS if named.get(name) in LABEL_FORMATS), None)
    if column is None:
        found = ", ".join(f"{name}: {encoding}" for name, encoding in named.items())
        raise ValueError(f"There must be a column {' or '.join(LABEL_COLUMNS)} of integers, the columns are {found}.")
    offsets = _offsets(data, shard)
    labels = []
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        _, value = columns_of_row(data[begin:end], shard)[column]
        labels.append(_label(value, named[column]))
    return np.array(labels, np.int64)


def _label(value: bytes, encoding: str) -> int:
    if LABEL_FORMATS[encoding] is None:  # decimal digits
        return int(value)
    return int.from_bytes(value, "little", signed=not encoding.startswith("uint"))
