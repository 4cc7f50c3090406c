"""Checks an ``index.json`` of MDS: what is read from it has the type and the range that its readers rely on."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from vitcomposer.data.mds.small_column import small_side
from vitcomposer.errors import ConfigError
from vitcomposer.schema import Data

INDEX = "index.json"
CLASS_NAMES = "class_names.json"  # beside it: a list in the order of the labels
IMAGE_COLUMNS = ("image", "x")
IMAGE_ENCODINGS = ("bytes", "jpeg", "png", "pil")


def no_split(local: str, split: str) -> str:
    """The message where a folder does not hold a split."""
    root = Path(local)
    if not root.is_dir():
        given = "which does not exist"
    else:
        given = f"where the splits are: {', '.join(sorted(p.parent.name for p in root.glob(f'*/{INDEX}'))) or 'none'}"
    return (
        f"data.local must be a folder with the split {split!r}, got {local!r}, {given}. "
        "Set data.local, data.train_split and data.val_split, or write the split with `vitcomposer convert`."
    )


_SHARD_BYTES = 1 << 32


class SplitSize(NamedTuple):
    """What the index of a split counts: samples, and bytes of its shards as they are read, not compressed.

    ``small_side`` is the shorter side of its column ``image_small``, where the index names it.
    """

    samples: int
    raw_bytes: int
    small_side: int | None = None


def count_samples(data: Data, split: str) -> int | None:
    """Number of samples of a split, by its index; None where it is not here.

    Raises:
        ConfigError: The index is none.
    """
    if data.source == "synthetic":
        return data.synthetic_samples
    size = size_of_split(data, split)
    return None if size is None else size.samples


def size_of_split(data: Data, split: str) -> SplitSize | None:
    """Samples and bytes of a split, by its index; None where it is not here.

    Raises:
        ConfigError: The index is none.
    """
    index = Path(data.local or "", split, INDEX)
    if data.source == "synthetic" or not index.is_file():
        return None
    try:
        content = json.loads(index.read_bytes())
        fault = index_fault(content)
    except (ValueError, RecursionError) as error:
        content, fault = {}, str(error)
    if fault:
        raise ConfigError(
            f"{index} must be the index of an MDS data set: {fault}. Write it with `vitcomposer convert`."
        )
    shards = content["shards"]
    files = [shard for shard in shards if shard["format"] == "mds"]  # of other formats nothing is known here
    read = sum(shard["raw_data"]["bytes"] for shard in files)
    return SplitSize(sum(shard["samples"] for shard in shards), read, small_side(content))


def index_fault(index: Any) -> str | None:
    """What is wrong with the content of an index.json, or None. Shards of formats other than MDS are not looked at."""
    if not isinstance(index, dict) or not isinstance(index.get("shards"), list):
        return "it must hold a list called shards"
    if index.get("version") != 2:
        return f"its version must be 2, it is {index.get('version')!r}"
    for number, shard in enumerate(index["shards"]):
        if not isinstance(shard, dict) or not isinstance(shard.get("format"), str):
            return f"shard {number} must be an object with a format"
        fault = _shard_fault(shard) if shard["format"] == "mds" else None
        if fault:
            return f"of shard {number}, {fault}"
    return None


def _shard_fault(shard: dict[str, Any]) -> str | None:
    if shard.get("version") != 2:
        return f"version must be 2, it is {shard.get('version')!r}"
    if not _is_file(shard.get("raw_data")):
        return "raw_data must be an object with basename, bytes and hashes"
    if "zip_data" not in shard or not (shard["zip_data"] is None or _is_file(shard["zip_data"])):
        return "zip_data must be null or an object with basename, bytes and hashes"
    if isinstance(shard.get("compression"), str) is (shard["zip_data"] is None):
        return "compression must be null without zip_data, and its name with it"
    hashes, limit = shard.get("hashes", []), shard.get("size_limit")
    if not isinstance(hashes, list) or not all(isinstance(name, str) for name in hashes):
        return "hashes must be a list of names"
    if limit is not None and not _is_count(limit) and not isinstance(limit, str):
        return f"size_limit must be null or a number of bytes, it is {limit!r}"
    samples: Any = shard.get("samples")
    size = shard["raw_data"]["bytes"]
    if size >= _SHARD_BYTES:
        return f"raw_data.bytes must be below 2^32, with which a shard counts its bytes, it is {size}"
    if not _is_count(samples) or 4 * (samples + 2) > size:  # the table of a shard takes four bytes a sample
        return f"samples must be a number that {size} bytes can hold, it is {samples!r}"
    return _column_fault(shard)


def _column_fault(shard: dict[str, Any]) -> str | None:
    columns: list[Any] = [shard.get(f"column_{what}") for what in ("names", "encodings", "sizes")]
    if not all(isinstance(column, list) for column in columns):
        return "column_names, column_encodings and column_sizes must be lists"
    names, encodings, sizes = columns
    if not len(names) == len(encodings) == len(sizes) or not all(isinstance(x, str) for x in [*names, *encodings]):
        return "column_names, column_encodings and column_sizes must be as long as each other, the first two of names"
    if not all(size is None or (_is_count(size) and size > 0) for size in sizes):
        return f"column_sizes must be null or numbers of bytes, they are {sizes}"
    return None


def _is_file(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("hashes"), dict):
        return False
    name = entry.get("basename")
    return (
        isinstance(name, str)
        and bool(name)
        and "\0" not in name
        and _is_count(entry.get("bytes"))
        and all(isinstance(digest, str) for digest in entry["hashes"].values())
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
