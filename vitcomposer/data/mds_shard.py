"""One MDS shard (version 2) of images and labels as bytes, and the check that an image can be decoded.

Streaming's MDSWriter makes the same bytes; it is not used because ``import streaming`` takes 8 s of CPU and 0.7 GB in
every worker of a conversion, and this module 0.3 s and 40 MB.
"""

import json
import re
import warnings
from io import BytesIO
from typing import Any

import numpy as np
import xxhash
from PIL import Image, UnidentifiedImageError

SAMPLE_OVERHEAD = 16  # bytes a shard spends on a sample beside its image: offset, length, label
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_bytes(size: int | str) -> int:
    """A shard size such as ``64mb`` (powers of 1024) as a number of bytes.

    Example:
        >>> parse_bytes("64mb")
        67108864
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", str(size).strip().lower())
    value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not 0 < value < 1 << 32:  # MDS counts bytes inside a shard with 32 bits
        raise ValueError(f"--shard-size must be a size below 4gb such as 64mb, got {size!r}. 64mb is usual.")
    return value


def empty_shard_bytes(size_limit: int) -> int:
    """What MDSWriter counts for a shard without samples."""
    return 8 + len(_header(size_limit))


def encode_shard(samples: list[tuple[bytes, int]], size_limit: int, basename: str) -> tuple[bytes, dict[str, Any]]:
    """A shard of images and labels, and its entry in ``index.json``.

    Layout: number of samples, offsets of all samples and of the end (uint32 each), the configuration as JSON, then per
    sample the length of the image (uint32), the image, and the label (int64); all little-endian.
    """
    header = _header(size_limit)
    lengths = [12 + len(image) for image, _ in samples]
    offsets = np.cumsum([4 + 4 * (len(samples) + 1) + len(header), *lengths])
    pieces = [np.array([len(samples), *offsets], dtype="<u4").tobytes(), header]
    for image, label in samples:
        pieces += [np.array(len(image), dtype="<u4").tobytes(), image, np.array(label, dtype="<i8").tobytes()]
    data = b"".join(pieces)
    raw = {"basename": basename, "bytes": len(data), "hashes": {"xxh64": xxhash.xxh64(data).hexdigest()}}
    return data, {**_config(size_limit), "samples": len(samples), "raw_data": raw, "zip_data": None}


def check_image(data: bytes) -> tuple[str, int, int]:
    """Decode an image to its last pixel and return format, width and height.

    Pillow stops at a file that ends early (its LOAD_TRUNCATED_IMAGES is off) and at more than about 179 million pixels,
    its guard against decompression bombs. Of an animation only the first frame is decoded.

    Raises:
        ValueError: The reason why it cannot be decoded.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks and palettes do not keep an image from being used
            with Image.open(BytesIO(data)) as image:
                image.load()
                return str(image.format), image.width, image.height
    except UnidentifiedImageError as error:
        raise ValueError("no image format that Pillow knows") from error
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Exception as error:  # decoders raise almost anything on damaged input: SyntaxError, struct.error, ...
        raise ValueError(str(error) or type(error).__name__) from error


def _config(size_limit: int) -> dict[str, Any]:
    return {
        "column_encodings": ["bytes", "int"],
        "column_names": ["image", "label"],
        "column_sizes": [None, 8],
        "compression": None,
        "format": "mds",
        "hashes": ["xxh64"],
        "size_limit": size_limit,
        "version": 2,
    }


def _header(size_limit: int) -> bytes:
    return json.dumps(_config(size_limit), sort_keys=True).encode()
