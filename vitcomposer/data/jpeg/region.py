"""Decodes of a seekable JPEG only the segments that a box touches, exactly as libjpeg-turbo decodes them."""

import threading
from typing import Any

import numpy as np

from vitcomposer.data.jpeg import header_kernels as header
from vitcomposer.data.jpeg.markers import INDEX_MAGIC
from vitcomposer.data.jpeg.region_kernels import DONE, GROW, decode_box


class _Workspace(threading.local):
    """Scratch memory of one thread. It only grows: fresh pages cost as much as the decoding into them."""

    def __init__(self) -> None:
        self.state = (
            np.zeros(header.INFO_SIZE, np.int64),  # info
            np.zeros(4 * 64, np.int32),  # quant: (4, 8, 8), four tables
            np.zeros(8 * header.RAW, np.uint8),  # raw: the Huffman tables as DHT holds them, DC 0 to 3, AC 4 to 7
            np.zeros(8 * header.LOOKUP, np.uint32),  # lookup: what the first bits of a code say
            np.full((8, 2, header.LONGEST), -1, np.int64),  # limits: of codes longer than that
            np.zeros(12, np.int64),  # bases (6,), then the DC predictions of two streams (2, 3)
        )
        self.scratch: Any = (
            np.empty(1 << 15, np.uint8),  # clean: bytes of a band of segments without stuffing
            np.empty(1 << 15, np.int16),  # coef: (tiles, 64, 16 blocks)
            np.empty(1 << 15, np.uint64),  # words: planes of samples, eight a word
            np.empty(1 << 12, np.int64),  # plan: what goes where in a band
            np.empty(1 << 12, np.int16),  # sums of a chroma line
        )
        self.out = np.empty(1 << 19, np.uint8)  # RGB of the box, flat

    def grow(self) -> None:
        clean, coef, words, plan = (int(n) * 5 // 4 for n in self.state[0][header.WANTED : header.WANTED + 4])
        sizes = (clean, coef, words, plan, plan)
        self.scratch = tuple(
            old if old.size >= size else np.empty(size, old.dtype)
            for old, size in zip(self.scratch, sizes, strict=True)
        )


_workspace = _Workspace()

_ROWS = 512  # that decodes_to takes at a time: the workspace stays small whatever the image


def is_seekable(encoded: bytes | memoryview) -> bool:
    """Whether a file claims to be a JPEG that ``seekable`` has written."""
    return encoded[:4] == b"\xff\xd8\xff\xeb" and encoded[6:14] == INDEX_MAGIC


def compile_decoder() -> None:
    """Compile the decoder, or load it from disk."""
    space = _workspace
    data = np.zeros(2, np.uint8)
    data.setflags(write=False)
    decode_box(data, (0, 0, 1, 1), space.state, space.scratch, space.out)


def decode_seekable(encoded: bytes | memoryview, box: tuple[int, int, int, int]) -> np.ndarray | None:
    """RGB of the box, uint8 (height, width, 3) over memory that the same thread's next call reuses.

    None for everything else: no seekable JPEG, a colour space or sampling that has no place in one, damage, an index
    that does not agree with the header, or a box that leaves the image.
    """
    if not is_seekable(encoded):  # and where no file is, the decoder need not be compiled
        return None
    space = _workspace
    height, width = box[2], box[3]
    size = 3 * height * width
    data = np.frombuffer(encoded, np.uint8)  # uint8 (bytes,)
    data.setflags(write=False)  # one type for bytes and mapped memory of either kind: one compilation
    status = decode_box(data, box, space.state, space.scratch, space.out)
    while status == GROW:
        if size > space.out.size:
            space.out = np.empty(size * 5 // 4, np.uint8)
        space.grow()
        status = decode_box(data, box, space.state, space.scratch, space.out)
    return space.out[:size].reshape(height, width, 3) if status == DONE else None


def decodes_to(encoded: bytes | memoryview, pixels: np.ndarray) -> bool:
    """Whether a seekable JPEG is read here, and as these pixels: uint8 (height, width, 3), or (height, width) of grey.

    Where coefficients leave 16 bits, which takes a damaged file, the vector code of libjpeg-turbo gives other samples.
    """
    height, width = pixels.shape[:2]
    for top in range(0, height, _ROWS):
        rows = pixels[top : top + _ROWS]
        found = decode_seekable(encoded, (top, 0, len(rows), width))
        if found is None or not np.array_equal(found if pixels.ndim == 3 else found[:, :, 0], rows):
            return False
    return True
