"""Turns photographs upright by their EXIF orientation: the pixels are those of Pillow's ``ImageOps.exif_transpose``.

Which images are turned is decided where they come in: ``vitcomposer convert`` when it stores them, ``data.files`` when
it reads a file. A JPEG that shall be turned gets a mark: an APP11 segment with its orientation, right after SOI or
after the index of a seekable file. It stays an ordinary JPEG, and its EXIF says the same to every viewer. Decoders turn
what they have decoded of a file with the mark, and read all others as they are stored.
"""

from typing import Any

import numpy as np
from PIL import Image

from vitcomposer.data.jpeg import Box
from vitcomposer.data.jpeg.markers import INDEX_MAGIC

_MAGIC, _NO_MAGIC = b"vitturn1", b"not turn"
_SEGMENT = b"\xff\xeb" + (2 + len(_MAGIC) + 1).to_bytes(2, "big")
_ORIENTATION = 0x0112  # tag of EXIF

# By orientation: whether rows become columns, and whether the rows, then the columns, run the other way after that.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def exif_orientation(image: Image.Image) -> int:
    """How an opened image lies, 1 to 8 as EXIF counts; 1 is upright, or it says nothing that makes sense.

    A TIFF counts as upright: Pillow itself turns it as it decodes it.
    """
    try:
        value: Any = 1 if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Exception:  # a damaged block of EXIF raises almost anything, and keeps no image from being read
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def with_mark(jpeg: bytes, orientation: int) -> bytes:
    """The JPEG as one that decoders turn; an index that it has counts no more."""
    return jpeg[:2] + _SEGMENT + _MAGIC + bytes([orientation]) + jpeg[2:]


def without_mark(jpeg: bytes) -> bytes:
    """The JPEG as one that decoders read as it is stored; every byte of it stays where it is."""
    at = _mark_at(jpeg)
    return jpeg if at is None else jpeg[: at - len(_MAGIC)] + _NO_MAGIC + jpeg[at:]


def read_mark(encoded: bytes | memoryview) -> int:
    """The orientation by which the pixels of an encoded image are turned; 1 where they are not."""
    at = _mark_at(encoded)
    return encoded[at] if at is not None and encoded[at] in _TURNS else 1


def _mark_at(encoded: bytes | memoryview) -> int | None:
    """Where the orientation stands."""
    if encoded[2:4] != b"\xff\xeb" or encoded[:2] != b"\xff\xd8":
        return None
    at = 2
    if encoded[6:14] == INDEX_MAGIC:
        at = 4 + (encoded[4] << 8 | encoded[5])
    end = at + len(_SEGMENT) + len(_MAGIC)
    return end if encoded[at:end] == _SEGMENT + _MAGIC and len(encoded) > end else None


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (height, width, ...) as they were seen: a contiguous copy, or themselves where they are upright."""
    swap, rows, columns = _TURNS[orientation]
    if orientation == 1:
        return pixels
    seen = pixels.swapaxes(0, 1) if swap else pixels
    return np.ascontiguousarray(seen[:: -1 if rows else 1, :: -1 if columns else 1])


def turned_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """Height and width after the turn; stored ones of upright ones too."""
    return (width, height) if _TURNS[orientation][0] else (height, width)


def stored_box(box: Box, orientation: int, height: int, width: int) -> Box:
    """Where a box of the upright image of this size lies in the stored one."""
    top, left, rows, columns = box
    swap, flip_rows, flip_columns = _TURNS[orientation]
    top = height - top - rows if flip_rows else top
    left = width - left - columns if flip_columns else left
    return (left, top, columns, rows) if swap else (top, left, rows, columns)
