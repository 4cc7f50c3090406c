"""Shows what a data set on disk or in a bucket holds, and whether its files are what its index says.

Everything is read with our own few lines, not with Streaming: an index from a stranger can name files outside its
folder and columns that run code, and must be looked at before anything acts on it.
"""

import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash

from vitcomposer.data.jpeg.markers import read_index
from vitcomposer.data.jpeg.pixels import UNKNOWN_FORMAT, is_deep, open_image, scaling
from vitcomposer.data.jpeg.raw import read_raw_size
from vitcomposer.data.mds.index import CLASS_NAMES, IMAGE_COLUMNS, IMAGE_ENCODINGS, index_fault
from vitcomposer.data.mds.unpack import unpack
from vitcomposer.json_file import MOST_BYTES, parse_json
from vitcomposer.stores.objects import LocalStore, Store, open_store

_IMAGE_ENCODINGS = ("bytes", "jpeg", "png", "jpeg_array")
_CHEAP = 256 << 20  # bytes of a shard that is read without being asked for


@dataclass
class SplitReport:
    """One split. ``problems`` is empty when every shard is what the index says."""

    name: str
    samples: int
    shards: int
    bytes: int  # uncompressed
    hashes: list[str]
    columns: dict[str, str]
    class_names: list[str] | None
    class_counts: dict[str, int] | None
    first_sample: str
    forms: Counter[str] = field(default_factory=Counter)  # seekable, raw, other: of the samples that were read
    problems: list[str] = field(default_factory=list)


def inspect_data(
    location: str | Path, split: str | None = None, *, verify: bool = False, decode: bool = False
) -> list[SplitReport]:
    """Look at every split below a folder or ``s3://`` address, or at the one that it is itself.

    Args:
        location: Folder of the splits, or of one split.
        split: Name of the only split to look at.
        verify: Read every shard, compare its hashes rather than its size alone, and count the forms of all samples;
            otherwise those of the first shard, if it is on this machine.
        decode: Also decode every image, on all cores; those that training and evaluation leave out are problems.

    Raises:
        ValueError: No data set, or an index that is not safe to use.
    """
    store = open_store(location)
    names = [split] if split is not None else ["", *store.folders()]
    summary = parse_json(store.read("summary.json", most=MOST_BYTES) or b"{}").get("splits", {})
    reports = []
    for name in names:
        prefix = f"{name}/" if name else ""
        index = store.read(f"{prefix}index.json", most=MOST_BYTES)
        if index is not None:
            shards = read_shard_index(index, f"{store.url}/{prefix}index.json")
            report = _inspect_split(store, prefix, shards, summary.get(name, {}).get("class_counts"))
            report.problems += _check_shards(store, prefix, shards, report.forms, verify or decode)
            if decode:
                report.problems += _undecodable(store, prefix, shards)
            reports.append(report)
    if not reports:
        where = f"{store.url}/{split}" if split is not None else f"{store.url} or a folder in it"
        raise ValueError(f"There must be an index.json in {where}. There is none: check the path, or convert first.")
    return reports


def read_shard_index(data: bytes, where: str) -> list[dict[str, Any]]:
    """The shards of an index that is safe to use."""
    try:
        index = parse_json(data)
        if fault := index_fault(index):
            raise ValueError(fault)
    except ValueError as error:
        raise ValueError(f"{where} must be an MDS index (version 2): {error}. Convert again.") from error
    shards = index["shards"]
    for shard in shards:
        if shard["format"] != "mds":
            raise ValueError(f"{where} must list shards of format mds, got {shard['format']}. Convert again.")
        for column, encoding in zip(shard["column_names"], shard["column_encodings"], strict=True):
            if encoding == "pkl":
                raise ValueError(
                    f"{where}: column {column!r} is stored as pkl, which runs code of whoever wrote it when it is "
                    "read. Write it again as bytes, int, str or json."
                )
        _check_name(shard["raw_data"]["basename"], where)
        _check_name(_stored(shard)["basename"], where)
    return shards


def _check_name(basename: str, where: str) -> None:
    steps = re.split(r"[/\\]", basename)
    if ".." in steps or not steps[0] or ":" in basename:
        raise ValueError(
            f"{where}: shard names must stay in the split's folder, got {basename!r}. Do not use this data."
        )


def _inspect_split(
    store: Store, prefix: str, shards: list[dict[str, Any]], class_counts: dict[str, int] | None
) -> SplitReport:
    class_names = store.read(f"{prefix}{CLASS_NAMES}", most=MOST_BYTES)
    report = SplitReport(
        name=prefix.rstrip("/") or ".",
        samples=sum(shard["samples"] for shard in shards),
        shards=len(shards),
        bytes=sum(shard["raw_data"]["bytes"] for shard in shards),
        hashes=sorted({algorithm for shard in shards for algorithm in _stored(shard)["hashes"]}),
        columns=dict(zip(shards[0]["column_names"], shards[0]["column_encodings"], strict=True)) if shards else {},
        class_names=None if class_names is None else parse_json(class_names),
        class_counts=class_counts,
        first_sample=_first_sample(store, prefix, shards[0]) if shards else "none",
    )
    if not report.samples:
        report.problems.append(f"{store.url}/{prefix}index.json lists no samples")
    return report


def _stored(shard: dict[str, Any]) -> dict[str, Any]:
    """The file that is really there: the compressed one where shards are compressed."""
    return shard["zip_data"] or shard["raw_data"]


def _check_shards(
    store: Store, prefix: str, shards: list[dict[str, Any]], forms: Counter[str], verify: bool
) -> list[str]:
    sizes = store.sizes(prefix)
    problems = []
    for shard in shards:
        file = _stored(shard)
        name = prefix + file["basename"]
        if name not in sizes:
            problems.append(f"{name} is missing")
        elif sizes[name] != file["bytes"]:
            problems.append(f"{name} must have {file['bytes']} bytes, it has {sizes[name]}")
        elif verify:
            data = store.read(name) or b""
            problems += _check_hashes(data, name, file["hashes"])
            forms.update(_forms(data, shard))
        elif shard is shards[0] and isinstance(store, LocalStore) and file["bytes"] <= _CHEAP:
            forms.update(_forms(store.read(name) or b"", shard))
    return problems


def _forms(data: bytes, shard: dict[str, Any]) -> Iterator[str]:
    """In what form each sample of an uncompressed shard holds its image."""
    if shard["zip_data"]:
        return
    try:
        offsets = struct.unpack_from(f"<{shard['samples'] + 1}I", data, 4)
        for start, stop in pairwise(offsets):
            values = [
                value for kind, value in columns_of_row(data[start:stop], shard).values() if kind in _IMAGE_ENCODINGS
            ]
            if values:
                seekable = read_index(values[0]) is not None
                yield "seekable" if seekable else "raw" if read_raw_size(values[0]) else _form(values[0])
    except struct.error:  # the shard is damaged, which its hash tells
        return


def _form(encoded: bytes) -> str:
    """How an image is decoded that is neither seekable nor raw."""
    if encoded[:2] == b"\xff\xd8":
        return "other"
    try:
        with open_image(encoded) as image:
            return scaling(image) or "other"
    except ValueError:  # --decode tells why
        return "not readable"


def _undecodable(store: Store, prefix: str, shards: list[dict[str, Any]]) -> Iterator[str]:
    """The samples whose image cannot be decoded, or not as it is in training, by shard and place in it."""
    first = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the decoders run without the interpreter's lock
        for shard in shards:
            name = prefix + _stored(shard)["basename"]
            data = store.read(name) or b""
            try:
                if shard["zip_data"]:
                    data = unpack(shard["compression"], data, shard["raw_data"]["bytes"])
                offsets = struct.unpack_from(f"<{shard['samples'] + 1}I", data, 4)
                rows = [columns_of_row(data[start:stop], shard) for start, stop in pairwise(offsets)]
            except Exception:  # the shard is damaged, which its size or hash has told
                rows = []
            for row, fault in enumerate(pool.map(_decoding_fault, rows)):
                if fault is not None:
                    yield f"{name}, sample {row} (sample_id {first + row}) {fault}"
            first += shard["samples"]


def _decoding_fault(columns: dict[str, tuple[str, bytes]]) -> str | None:
    from vitcomposer.data.jpeg.decode import decode_as_stored
    from vitcomposer.data.jpeg.raw import raw_sample
    from vitcomposer.data.jpeg.region import decodes_to
    from vitcomposer.data.mds.small_column import LOW_RESOLUTION_COLUMN
    from vitcomposer.errors import ShardError

    for name, (encoding, value) in columns.items():
        try:
            if name in (*IMAGE_COLUMNS, LOW_RESOLUTION_COLUMN) and encoding in IMAGE_ENCODINGS:
                pixels = decode_as_stored(raw_sample(memoryview(value)) if encoding == "pil" else value)
                if read_index(value) is not None and not decodes_to(value, pixels):
                    return "has an index that does not lead to its pixels: convert the data set again"
        except (ValueError, ShardError, struct.error) as error:
            return f"cannot be decoded: {error}"
        except MemoryError:
            raise  # the machine's fault, not the image's
        except Exception as error:  # the list of what is broken ends at no sample
            return f"cannot be decoded: {type(error).__name__}: {error}"
    return None


def _check_hashes(data: bytes, name: str, hashes: dict[str, str]) -> list[str]:
    if not hashes:
        return [f"{name} cannot be verified: the index has no hash of it"]
    problems = []
    for algorithm, digest in hashes.items():
        hasher = getattr(xxhash if algorithm in xxhash.algorithms_available else hashlib, algorithm)
        if hasher(data).hexdigest() != digest:
            problems.append(f"{name} has another {algorithm} than the index says: its bytes were changed")
    return problems


def _first_sample(store: Store, prefix: str, shard: dict[str, Any]) -> str:
    """Size and format of the first image of a shard, from the few bytes that hold it."""
    if shard["zip_data"]:
        return f"not read: shards are compressed ({shard['compression']})"
    name = prefix + shard["raw_data"]["basename"]
    offsets = store.read(name, 4, 12) or b""
    if len(offsets) < 8:
        return "not readable"
    start, stop = struct.unpack("<2I", offsets)
    sample = store.read(name, start, stop) or b""
    if len(sample) < stop - start:
        return "not readable"
    for column, (encoding, value) in columns_of_row(sample, shard).items():
        if encoding in _IMAGE_ENCODINGS:
            raw = read_raw_size(value)
            if raw:
                return f"{column}: raw {raw[1]}x{raw[0]} RGB, {len(value):,} bytes"
            try:
                with open_image(value) as image:
                    how = f" ({scaling(image)})" if is_deep(image) else ""
                    size = f"{image.width}x{image.height}"
                    return f"{column}: {image.format} {size} {image.mode}{how}, {len(value):,} bytes"
            except ValueError as error:
                if str(error) != UNKNOWN_FORMAT:
                    return f"{column}: {error}"  # else some other column of bytes
    return f"{len(sample):,} bytes, no encoded image among its columns"


def columns_of_row(sample: bytes, shard: dict[str, Any]) -> dict[str, tuple[str, bytes]]:
    """Encoding and raw bytes of every column: first the lengths that vary (uint32), then the values."""
    varying = sum(size is None for size in shard["column_sizes"])
    lengths = iter(struct.unpack_from(f"<{varying}I", sample))
    position, columns = 4 * varying, {}
    for name, encoding, size in zip(
        shard["column_names"], shard["column_encodings"], shard["column_sizes"], strict=True
    ):
        length = next(lengths) if size is None else size
        columns[name] = encoding, sample[position : position + length]
        position += length
    return columns
