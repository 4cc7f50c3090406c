"""Compiled colour arithmetic on one uint8 image, in place and equal to Pillow's pixel for pixel.

An image is C-contiguous (H, W, 3), ``flat`` its one-dimensional view. Pillow's sources decide where floats have single
or double precision and where they are cut off instead of rounded. Integers are kept in floats where those are exact,
because numba widens integers to 64 bits, which halves what a vector register holds.
"""

from typing import Any

import numpy as np
from numba import njit

from vitcomposer.data.jpeg.kernel import kernel, part

_R, _G, _B = np.float32(19595 / 65536), np.float32(38470 / 65536), np.float32(7471 / 65536)
_HALF = np.float32(0.5)
_ZERO, _FULL = np.float32(0), np.float32(255)


@njit(nogil=True, inline="always")
def _luma(r: Any, g: Any, b: Any) -> Any:
    """ITU-R 601-2 luma in 16-bit fixed point, rounded; all of it is exact in float32, whose mantissa has 24 bits."""
    return np.floor(np.float32(r) * _R + np.float32(g) * _G + np.float32(b) * _B + _HALF)


@njit(nogil=True, inline="always")
def _blend(low: Any, high: Any, factor: Any) -> Any:
    """Image.blend of two float32 values: single precision, clipped, cut off."""
    return np.uint8(np.int32(min(max(low + factor * (high - low), _ZERO), _FULL)))


@kernel
def gray(flat: Any) -> None:
    # flat is uint8 (3 * H * W,), as in all functions below.
    for i in range(flat.size // 3):
        luma = np.uint8(np.int32(_luma(flat[3 * i], flat[3 * i + 1], flat[3 * i + 2])))
        flat[3 * i] = flat[3 * i + 1] = flat[3 * i + 2] = luma


@kernel
def saturation(flat: Any, value: float) -> None:
    factor = np.float32(value)
    for i in range(flat.size // 3):
        r, g, b = np.float32(flat[3 * i]), np.float32(flat[3 * i + 1]), np.float32(flat[3 * i + 2])
        luma = _luma(r, g, b)  # float32, a whole number
        flat[3 * i] = _blend(luma, r, factor)
        flat[3 * i + 1] = _blend(luma, g, factor)
        flat[3 * i + 2] = _blend(luma, b, factor)


@njit(nogil=True, inline="always")
def _hue_weight(distance: Any, share: Any) -> Any:
    """How much of a channel the saturation ``share`` takes away; ``distance`` is in sixths of 255 from its plateau."""
    return np.float32(1) - share * (min(max(distance, _ZERO), _FULL) / _FULL)


@kernel
def hue(flat: Any, shift: int) -> None:
    """To Pillow's HSV, ``shift`` added to the uint8 hue, and back."""
    # Constants in float32, or numba would compute in float64.
    turn, one, three, five = np.float32(shift & 255), np.float32(1), np.float32(3), np.float32(5)
    sixth, period = np.float32(6), np.float32(256)
    for i in range(flat.size // 3):
        r, g, b = np.float32(flat[3 * i]), np.float32(flat[3 * i + 1]), np.float32(flat[3 * i + 2])
        top, low = max(r, max(g, b)), min(r, min(g, b))
        chroma = top - low
        # The middle channel from 0, at the highest, to 1, at the lowest; sector is the hue in sixths of a circle.
        middle = (top - (r + g + b - top - low)) / max(chroma, one)
        # A hue of gray would be wrong here, but has no effect: its saturation is 0.
        if r == top:
            sector = one - middle if g >= b else middle - one
        elif g == top:
            sector = one + middle if r >= b else three - middle
        else:
            sector = five - middle if r >= g else three + middle
        # As a uint8, cut off, turned modulo 256; then times 6, so that a sixth of the circle is 255.
        angle = sector / sixth * _FULL
        angle = np.floor(angle + _FULL if sector < _ZERO else angle)
        angle = _ZERO if angle >= _FULL else angle
        angle += turn
        angle = sixth * (angle - period if angle >= period else angle)
        # Pillow's saturation, a uint8, over 255.
        share = np.floor(chroma / max(top, one) * _FULL) / _FULL
        # Each channel is full within a sixth of its place: red at 0, green at 510, blue at 1020 of 1530.
        red = _hue_weight(np.float32(510) - abs(angle - np.float32(765)), share)
        green = _hue_weight(abs(angle - np.float32(510)) - _FULL, share)
        blue = _hue_weight(abs(angle - np.float32(1020)) - _FULL, share)
        flat[3 * i] = np.uint8(np.int32(top * red + _HALF))
        flat[3 * i + 1] = np.uint8(np.int32(top * green + _HALF))
        flat[3 * i + 2] = np.uint8(np.int32(top * blue + _HALF))


@kernel
def sharpness(pixels: Any, value: float) -> None:
    """Blend with the 3 x 3 smooth filter (centre 5, the rest 1, over 13), which leaves the border as it is."""
    height, width, _ = pixels.shape
    if height < 3 or width < 3:
        return
    factor, share, five = np.float32(value), np.float32(1 / 13), np.float32(5)
    above, row = pixels[0].copy().reshape(-1), pixels[0].copy().reshape(-1)  # uint8 (3 * W,): rows as they were
    for y in range(1, height - 1):
        out, below = pixels[y].reshape(-1), pixels[y + 1].reshape(-1)
        for i in range(out.size):
            above[i], row[i] = row[i], out[i]
        inner = out[3:-3]  # without the border
        for i in range(inner.size):
            total = np.float32(above[i]) + np.float32(above[i + 3]) + np.float32(above[i + 6])
            total += np.float32(row[i]) + five * np.float32(row[i + 3]) + np.float32(row[i + 6])
            total += np.float32(below[i]) + np.float32(below[i + 3]) + np.float32(below[i + 6])
            inner[i] = _blend(np.floor(total * share + _HALF), np.float32(row[i + 3]), factor)


@kernel
def look_up(flat: Any, table: Any) -> None:
    """Replace every value by the entry of its channel; ``table`` is (3, 256)."""
    for i in range(flat.size // 3):
        for c in range(3):
            flat[3 * i + c] = table[c, flat[3 * i + c]]


@kernel
def histogram_step(flat: Any, table: Any, equalize: bool) -> Any:
    """ImageOps.equalize or autocontrast as a table (3, 256), for the image as it is after ``table`` (3, 256)."""
    step = np.empty((3, 256), np.uint8)  # one table a channel
    _fill_step(_histograms(flat, table), equalize, step)
    return step


@part
def _histograms(flat: Any, table: Any) -> Any:
    """Counts (3, 256) of the image as it is after ``table``."""
    # Neighbours are often equal: two sets of counters keep an increment from waiting for the one before it.
    raw = np.zeros((6, 256), np.uint32)
    count = flat.size // 3
    for i in range(count // 2):
        for c in range(6):
            raw[c, flat[6 * i + c]] += np.uint32(1)
    if count % 2:
        for c in range(3):
            raw[c, flat[3 * count - 3 + c]] += np.uint32(1)
    counts = np.zeros((3, 256), np.int64)
    for c in range(3):
        for i in range(256):
            counts[c, table[c, i]] += np.int64(raw[c, i]) + np.int64(raw[c + 3, i])
    return counts


@part
def _fill_step(counts: Any, equalize: bool, step: Any) -> None:
    for c in range(3):
        low, high, total = 255, 0, 0
        for i in range(256):
            total += counts[c, i]
            if counts[c, i] > 0:
                low, high = min(low, i), max(high, i)
        # As ImageOps.equalize has it, the pixels of the highest level do not count for the size of a step.
        size = (total - counts[c, high]) // 255
        if high <= low or (equalize and size == 0):
            for i in range(256):
                step[c, i] = i
        elif equalize:
            below = size // 2
            for i in range(256):
                step[c, i] = min(255, below // size)
                below += counts[c, i]
        else:
            scale = 255.0 / (high - low)
            offset = -low * scale
            for i in range(256):
                step[c, i] = np.uint8(int(min(max(i * scale + offset, 0.0), 255.0)))


@kernel
def mean_luma(flat: Any) -> int:
    """The mean of the gray image, rounded as ImageEnhance.Contrast does."""
    total, count = 0, flat.size // 3
    for i in range(count):
        # A sum of whole numbers, exact in any order.
        total += np.int32(_luma(flat[3 * i], flat[3 * i + 1], flat[3 * i + 2]))
    return int(total / count + 0.5)


@kernel
def normalize_lines(lines: Any, mean: Any, std: Any, result: Any) -> None:
    """(value - mean) / std of every number of every line, in float32."""
    # lines are uint8 (rows, 3 * W), mean and std float32 (3 * W,) of such values, result float32 (rows, 3 * W).
    for i in range(lines.shape[0]):
        for j in range(lines.shape[1]):
            # The operator would test for zero, which keeps the loop from being vectorised.
            result[i, j] = np.divide(np.float32(lines[i, j]) - mean[j], std[j])
