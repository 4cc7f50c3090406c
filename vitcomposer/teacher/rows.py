"""Stores the rows of a teacher cache in MDS shards: which image and view, how it was cut, and the teacher's answer.

All columns have a fixed size, so a shard is its head and one array. Streaming's MDSWriter makes the same bytes; it is
not used because it takes 90 us of the main process for a row, a tenth of what a GPU's teacher takes for the image.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vitcomposer.data.mds.reader import FileMapping

MAX_CLASSES = 1 << 16  # that a column of uint16 can name


def column_encodings(top_k: int) -> dict[str, str]:
    """MDS encodings of the columns, in the order in which they lie in a row.

    ``box`` is top, left, height, width; ``rest`` the log-sum-exp of the logits of the classes that are not stored.
    """
    return {
        "box": "ndarray:int32:4",
        "classes": f"ndarray:uint16:{top_k}",
        "flip": "uint8",
        "logits": f"ndarray:float16:{top_k}",
        "rest": "float32",
        "sample_id": "uint32",
        "view_seed": "uint64",
    }


def row_dtype(top_k: int) -> np.dtype:
    """A row as MDS stores it."""
    fields = []
    for name, encoding in column_encodings(top_k).items():
        kind, *shape = encoding.removeprefix("ndarray:").split(":")
        fields.append((name, np.dtype(kind).newbyteorder("<"), tuple(map(int, shape))))
    return np.dtype(fields)


def bytes_per_row(top_k: int) -> int:
    """Bytes that a row takes in a shard, its offset included."""
    return row_dtype(top_k).itemsize + 4


def encode_rows(rows: NDArray[Any], basename: str) -> tuple[bytes, dict[str, Any]]:
    """A shard of rows, and its entry in ``index.json``."""
    dtype = rows.dtype
    encodings = column_encodings(rows["classes"].shape[1])
    assert dtype.names == tuple(encodings)
    config = {
        "column_encodings": list(encodings.values()),
        "column_names": list(encodings),
        "column_sizes": [dtype[name].itemsize for name in encodings],
        "compression": None,
        "format": "mds",
        "hashes": ["xxh64"],
        "size_limit": None,
        "version": 2,
    }
    header = json.dumps(config, sort_keys=True).encode()
    begins = 4 * (len(rows) + 2) + len(header) + dtype.itemsize * np.arange(len(rows) + 1)
    data = b"".join([np.array([len(rows), *begins], "<u4").tobytes(), header, rows.tobytes()])
    raw = {"basename": basename, "bytes": len(data), "hashes": {"xxh64": xxhash.xxh64(data).hexdigest()}}
    return data, {**config, "samples": len(rows), "raw_data": raw, "zip_data": None}


def map_rows(path: Path, entry: dict[str, Any], dtype: np.dtype) -> NDArray[Any]:
    """The rows of a shard, over the mapped file; size and hash are those of its entry in the index.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not the one that was written.
    """
    raw, count = entry["raw_data"], entry["samples"]
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != raw["bytes"]:
            raise ValueError(f"it has {size} bytes, its index says {raw['bytes']}")
        data = np.asarray(FileMapping(file.fileno(), size))
    found = xxhash.xxh64(data.data).hexdigest()
    if found != raw["hashes"]["xxh64"]:
        raise ValueError(f"its xxh64 is {found}, its index says {raw['hashes']['xxh64']}")
    return data[size - count * dtype.itemsize :].view(dtype)
