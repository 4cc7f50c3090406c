"""Stores and reads images as raw rows of RGB pixels, and knows which formats of encoded ones are read."""

import struct
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from vitcomposer.data.jpeg.markers import ARITHMETIC, frame_marker
from vitcomposer.data.jpeg.pixels import check_pixels, is_deep

Encoded = bytes | memoryview

RAW_MAGIC = b"\x00RAW"
_PIXELS_PER_BYTE = 512  # of Huffman-coded data, at most: a bit for each block of 64
_RAW_HEAD = struct.Struct("<4s3I")  # magic, height, width, zero; then height * width * 3 bytes, row by row, RGB

_PIL_HEAD = struct.Struct("<3I")  # width, height, length of the mode: what MDS writes before mode and pixels


def raw_sample(pil: memoryview) -> bytes:
    """A value of encoding ``pil`` as a raw sample; one that is not whole as one that no decoder takes."""
    if len(pil) < _PIL_HEAD.size:
        return RAW_MAGIC
    width, height, mode_size = _PIL_HEAD.unpack_from(pil)
    pixels: bytes | memoryview = pil[_PIL_HEAD.size + mode_size :]
    mode = bytes(pil[_PIL_HEAD.size : _PIL_HEAD.size + mode_size])
    if mode != b"RGB":
        if width * height > 8 * len(pixels):  # a bit a pixel is the least, and Pillow would make room for all of them
            pixels = b""
        else:
            try:
                image = Image.frombytes(mode.decode(), (width, height), bytes(pixels))
                if is_deep(image):
                    return _as_tiff(image)
                pixels = image.convert("RGB").tobytes()
            except (ValueError, KeyError):  # another length than the mode has, or no mode
                pixels = b""
    return b"".join((_RAW_HEAD.pack(RAW_MAGIC, height, width, 0), pixels))


def check_jpeg_size(height: int, width: int, jpeg: bytes | memoryview) -> None:
    """Refuse a JPEG whose header alone would take gigabytes.

    Raises:
        ValueError: It says more pixels than may be read, or than its bytes can hold.
    """
    check_pixels(width, height)
    if height * width > _PIXELS_PER_BYTE * len(jpeg) and frame_marker(jpeg) not in ARITHMETIC:
        raise ValueError(f"its header says {width} x {height} pixels, which {len(jpeg):,} bytes do not hold")


def read_raw_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a raw sample; None if it is none, or not whole."""
    if data[:4] != RAW_MAGIC or len(data) < _RAW_HEAD.size:
        return None
    _, height, width, zero = _RAW_HEAD.unpack_from(data)
    return (height, width) if not zero and len(data) == _RAW_HEAD.size + 3 * height * width else None


def raw_of(pixels: np.ndarray) -> bytes:
    """Pixels uint8 (height, width, 3) as a raw sample."""
    height, width, _ = pixels.shape
    return _RAW_HEAD.pack(RAW_MAGIC, height, width, 0) + pixels.tobytes()


def _is_raw(encoded: Encoded) -> bool:
    return encoded[:4] == RAW_MAGIC


def raw_pixels(encoded: Encoded) -> np.ndarray:
    """The pixels of a raw sample where they lie."""
    if len(encoded) < _RAW_HEAD.size:
        raise ValueError(f"a raw sample starts with {_RAW_HEAD.size} bytes, got {len(encoded)}. The shard is damaged.")
    _, height, width, zero = _RAW_HEAD.unpack_from(encoded)
    size = _RAW_HEAD.size + height * width * 3
    if zero or not height or not width or len(encoded) != size:
        raise ValueError(
            f"a raw sample of {height}x{width} must have {size} bytes and a zero before its pixels, got {len(encoded)} "
            f"and {zero}. The shard is damaged: convert it again."
        )
    return np.frombuffer(encoded, np.uint8, offset=_RAW_HEAD.size).reshape(height, width, 3)


def _as_tiff(image: Any) -> bytes:
    """An image of more than 8 bits as a file, which decoders scale or refuse by name."""
    buffer = BytesIO()
    image.save(buffer, "TIFF")
    return buffer.getvalue()
