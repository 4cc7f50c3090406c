"""Resizes uint8 RGB images, antialiased and bit for bit as ``PIL.Image.resize``, in about the time of torch's."""

import math
import threading
from functools import lru_cache
from typing import Any

import numpy as np

from vitcomposer.data.jpeg.resize_kernels import SPARE, coefficients, resize_axes

_TILE = 600_000  # bytes; the fewer tiles the better, as long as one stays in the second level cache
_DEEPEST = 384


class _Workspace(threading.local):
    """Scratch memory of one thread. It only grows: fresh pages cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._arrays = (*(np.empty(0, np.uint64) for _ in range(3)), np.empty(0, np.uint8), np.empty(0, np.int32))
        self.scratch: Any = None

    def sized(self, height: int, width: int, target: int, depth: int, down_first: bool) -> Any:
        """For the horizontal pass over so many rows and columns: (words, reduced, sums, what the passes read)."""
        # In words of eight bytes: a source row, a resized row, and the rows of a tile.
        across, wide, groups = (3 * width + 7) // 8, (3 * target + 7) // 8, min(depth, height + 7) // 8
        sizes = (
            max(8 * across, 8 * wide * groups),  # lines: eight source rows, then the resized tile by columns
            (8 * across + 3 * SPARE) * groups,  # tile: its source by columns, (8 * across, groups)
            (-(-height // 8) * 8 + SPARE) * wide,  # middle: all rows after the horizontal pass, (height, wide)
            3 * width * height * down_first,  # reduced: what a vertical pass leaves that is the first
            max(24 * groups, 3 * target, 3 * width),  # sums, int32: of one line of either pass
        )
        if self.scratch is None or any(old.size < size for old, size in zip(self._arrays, sizes, strict=True)):
            self._arrays = tuple(
                old if old.size >= size else np.zeros(size * 5 // 4, old.dtype)
                for old, size in zip(self._arrays, sizes, strict=True)
            )
            lines, tile, middle, reduced, sums = self._arrays
            self.scratch = (lines, tile, middle), reduced, sums, tuple(map(_read_only, (tile, middle, reduced)))
        return self.scratch


_workspace = _Workspace()


def resize_rgb(pixels: np.ndarray, out: np.ndarray, bicubic: bool) -> None:
    """Resize uint8 (h, w, 3), of any strides, into ``out``, uint8 (height, width, 3), contiguous.

    Equal to ``resize`` of Pillow 13 with ``BICUBIC``, or else ``BILINEAR``. Pillow 12 and older begin with the columns
    always; as both passes round, and cut overshoot off, some values then differ.
    """
    height, width, _ = pixels.shape
    rows, columns, _ = out.shape
    # Pillow begins with the pass that leaves less to the other one, by this rule.
    down_first = height - rows > max(2 * (width - columns), 0)
    lines = rows if down_first else height  # of the horizontal pass
    # At most so many rows a tile, and all tiles of one depth, a multiple of 8.
    depth = min(_DEEPEST, max(_TILE // (3 * width) & ~7, 64))
    tiles = -(-lines // depth)
    depth = -(-lines // (8 * tiles)) * 8
    resize_axes(
        *_flat(pixels),
        (height, width),
        depth,
        (_axis(width, columns, bicubic), _axis(height, rows, bicubic)),
        down_first,
        _workspace.sized(lines, width, columns, depth, down_first),
        out.reshape(-1),
    )


@lru_cache(1024)
def _axis(size: int, target: int, bicubic: bool) -> tuple[np.ndarray, np.ndarray]:
    support = max(size / target, 1.0) * (2 if bicubic else 1)
    spans = np.zeros(2 * target, np.int64)  # first source pixel and number of weights of each
    weights = np.zeros(target * (2 * math.ceil(support) + 1 + SPARE), np.int32)  # (target * most,), zeros behind
    coefficients(size, target, bicubic, spans, weights)
    return spans, weights


def _flat(pixels: np.ndarray) -> tuple[np.ndarray, int]:
    """The bytes from the first pixel to the last, read-only, and the distance of the rows."""
    height, width, _ = pixels.shape
    stride = pixels.strides[0]
    if not pixels.flags.c_contiguous and pixels.strides[1:] == (3, 1) and stride >= 3 * width:
        size = (height - 1) * stride + 3 * width
        return np.lib.stride_tricks.as_strided(pixels, (size,), (1,), writeable=False), stride
    return _read_only(np.ascontiguousarray(pixels)), 3 * width


def _read_only(array: np.ndarray) -> np.ndarray:
    """Its bytes, one after the other. Whatever a pass reads has this one type: each kernel is compiled once."""
    flat = array.reshape(-1).view(np.uint8)
    flat.setflags(write=False)
    return flat
