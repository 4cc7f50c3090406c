"""Compiled geometry and blur of one uint8 image, in place and equal to Pillow's pixel for pixel.

An image is C-contiguous (H, W, 3). Positions are those of Image.transform: an output pixel is read at a point of the
input, both counted from the middles of the pixels; what lies outside takes the colour ``fill``.
"""

from typing import Any

import numpy as np
from numba import njit

from vitcomposer.data.jpeg.kernel import kernel, part

_HALF = np.float32(0.5)
_ZERO, _FULL = np.float32(0), np.float32(255)
# Single precision errs by less than half of this: the cubic's weights sum to 1.5 in magnitude along either axis, and
# some 14 roundings of 2**-24 lie on the way of a value: 255 * 1.5**2 * 14 * 2**-24 = 4.8e-4.
_DOUBT = np.float32(2**-10)


@kernel
def flip(pixels: Any) -> None:
    height, width, _ = pixels.shape
    for y in range(height):
        for x in range(width // 2):
            for c in range(3):
                pixels[y, x, c], pixels[y, width - 1 - x, c] = pixels[y, width - 1 - x, c], pixels[y, x, c]


@kernel
def transpose(pixels: Any, out: Any) -> None:
    """(H, W, 3) to (W, H, 3), in tiles that stay in the cache."""
    height, width, _ = pixels.shape
    # A tile of 16 x 16 pixels of either image has 16 pieces of 48 bytes, which stay in the first level cache.
    for top in range(0, height, 16):
        for left in range(0, width, 16):
            for x in range(left, min(left + 16, width)):
                for y in range(top, min(top + 16, height)):
                    for c in range(3):
                        out[x, y, c] = pixels[y, x, c]


@njit(nogil=True, inline="always")
def _cubic(a: Any, b: Any, c: Any, d: Any, share: float) -> float:
    """Between b and c; Pillow's cubic of a transform has the slope -1, unlike that of its resize."""
    return b + share * (c - a + share * (2.0 * (a - b) + c - d + share * (b - a - c + d)))


@njit(nogil=True, inline="always")
def _cut(value: Any) -> Any:
    return np.uint8(np.int32(min(max(value, 0.0), 255.0)))


@njit(nogil=True, inline="always")
def _position(x: int, move: float, offset: float) -> float:
    return x + 0.5 + move + offset  # in Pillow's order: rounding decides what is inside


@kernel
def slide_rows(pixels: Any, slope: float, offset: float, fill: Any, cubic: bool) -> None:
    """Every output pixel is read at x + slope * y + offset of its own row, in the middles of the pixels."""
    height, width, _ = pixels.shape
    line = np.empty(3 * (width + 5), np.uint8)  # the row with two pixels more on the left and three on the right
    for y in range(height):
        out = pixels[y].reshape(-1)  # uint8 (3 * W,), a view
        _pad_row(out, line)
        move = slope * (y + 0.5)
        # The first and last pixel inside: two pixels early by a formula that rounds otherwise, then one by one.
        first = int(min(max(-0.5 - move - offset - 2.0, 0.0), float(width)))
        while first < width and not _position(first, move, offset) >= 0.0:
            first += 1
        last = int(min(max(width - 0.5 - move - offset - 2.0, float(first)), float(width)))
        while last < width and _position(last, move, offset) < width:
            last += 1
        for x in range(first):
            for c in range(3):
                out[3 * x + c] = fill[c]
        for x in range(last, width):
            for c in range(3):
                out[3 * x + c] = fill[c]
        if first < last:
            # The row moves as a whole: all its pixels have one share, and line is read in order.
            start = int(np.floor(_position(first, move, offset) - 0.5))
            share = _position(first, move, offset) - 0.5 - start
            length = last - first
            if _position(last - 1, move, offset) - 0.5 - (start + length - 1) != share:
                length = 1  # the sums are rounded, which only slopes and offsets near 0 cause: pixel by pixel
            for x in range(first, last, length):
                # From the first pixel's column on, so that a sum which rounding lifts over an integer has share 1.
                share = _position(x, move, offset) - 0.5 - (start + x - first)
                source = line[3 * (start + x - first + 1) :]  # a, b, c, d: one pixel apart
                target = out[3 * x : 3 * (x + length)]
                _mix_lines(source, source[3:], source[6:], source[9:], target, share, cubic)


@kernel
def shift_rows(pixels: Any, offset: float, fill: Any, cubic: bool) -> None:
    """Every output pixel is read at y + offset of its own column."""
    height, width, _ = pixels.shape
    source = pixels.copy().reshape(height, 3 * width)  # a copy: rows are read after they were written
    for y in range(height):
        position, out = _position(y, 0.0, offset), pixels[y].reshape(-1)
        if position >= 0.0 and position < height:
            place = int(np.floor(position - 0.5))
            # The edge rows count for those outside, as in Pillow.
            above, top = max(place - 1, 0), max(place, 0)
            bottom, below = min(place + 1, height - 1), min(place + 2, height - 1)
            share = position - 0.5 - place
            _mix_lines(source[above], source[top], source[bottom], source[below], out, share, cubic)
        else:
            for x in range(width):
                for c in range(3):
                    out[3 * x + c] = fill[c]


@part
def _mix_lines(a: Any, b: Any, c: Any, d: Any, out: Any, share: float, cubic: bool) -> None:
    if cubic:
        # In double precision, as Pillow; a line's bytes are neighbours, so this is vector code.
        for i in range(out.size):
            left, right = np.float64(b[i]), np.float64(c[i])
            out[i] = _cut(_cubic(np.float64(a[i]), left, right, np.float64(d[i]), share))
    else:
        for i in range(out.size):
            out[i] = _cut(np.float64(b[i]) + (np.float64(c[i]) - np.float64(b[i])) * share)


@part
def _copy(source: Any, target: Any, at: int) -> None:
    # For a slice that is set numba compiles the text of its error, which takes a second and a half.
    for i in range(source.size):
        target[at + i] = source[i]


@part
def _pad_row(row: Any, line: Any) -> None:
    _copy(row, line, 6)  # uint8 (3 * (W + 5),)
    for c in range(3):
        line[c] = line[3 + c] = row[c]
        line[6 + row.size + c] = line[9 + row.size + c] = line[12 + row.size + c] = row[row.size - 3 + c]


@kernel
def affine(pixels: Any, matrix: Any, fill: Any, cubic: bool) -> None:
    """Image.transform(AFFINE): the output pixel (x, y) is read at ``matrix`` (6,) times its middle.

    Pillow works in double precision and cuts off. Here a row is interpolated in single precision first, and what
    comes near an integer, where the two could be cut off differently, again as Pillow does it.
    """
    height, width, _ = pixels.shape
    stride = width + 4
    packed = np.empty((height + 4, stride), np.uint32)  # a pixel is one number: one read for three channels
    for y in range(height + 4):
        _pack_row(pixels[min(max(y - 2, 0), height - 1)].reshape(-1), packed[y])
    source = packed.reshape(-1)
    # Of one output row: where each pixel reads, how far behind, its 4 x 4 (or 2 x 2) pixels, and the weights.
    places, shares = np.empty(width, np.int64), np.empty((2, width), np.float64)
    taps, weights = np.empty((16, width), np.uint32), np.empty((8, width), np.float32)
    margins = np.empty(width, np.float32)
    for y in range(height):
        _locate(matrix, y, height, places, shares)
        out = pixels[y].reshape(-1)
        if cubic:
            _gather(source, places, stride, 4, taps)
            _all_weights(shares, weights)
            _mix_taps(taps, weights, out, margins)
        else:
            # The 2 x 2 pixels of the linear case begin one row and one column later.
            _gather(source, places + stride + 1, stride, 2, taps)
            _mix_linear(taps, shares, out)
        for x in range(width):
            if places[x] < 0:
                for c in range(3):
                    out[3 * x + c] = fill[c]
            elif cubic and margins[x] < _DOUBT:
                flat = _is_flat(taps, x)
                for c in range(3):
                    out[3 * x + c] = _byte(taps[0, x], 8 * c) if flat else _exact(taps, x, 8 * c, shares)


@part
def _gather(source: Any, places: Any, stride: int, size: int, taps: Any) -> None:
    for x in range(places.size):
        # Pixels outside, at -1, read something too, which spares a branch; they are filled afterwards.
        place = max(places[x], 0)
        for j in range(size):
            for i in range(size):
                taps[size * j + i, x] = source[place + j * stride + i]  # uint32 (16, W)


@part
def _pack_row(row: Any, packed: Any) -> None:
    """A row as one integer a pixel, with two more on either side."""
    inner = packed[2:-2]
    for x in range(inner.size):
        inner[x] = np.uint32(row[3 * x]) | (np.uint32(row[3 * x + 1]) << 8) | (np.uint32(row[3 * x + 2]) << 16)
    packed[:2], packed[-2:] = inner[0], inner[-1]


@part
def _locate(matrix: Any, y: int, height: int, places: Any, shares: Any) -> None:
    """Where the 4 x 4 pixels around a source position begin, -1 outside, and how far it is behind the second."""
    m0, m1, m2, m3, m4, m5 = matrix
    width = places.size
    for x in range(width):
        # In double precision and Pillow's order, since rounding decides what is inside.
        px = m0 * (x + 0.5) + m1 * (y + 0.5) + m2
        py = m3 * (x + 0.5) + m4 * (y + 0.5) + m5
        inside = px >= 0.0 and px < width and py >= 0.0 and py < height
        px = px - 0.5 if inside else -1.0
        py = py - 0.5 if inside else -1.0
        left, top = np.floor(px), np.floor(py)
        shares[0, x], shares[1, x] = px - left, py - top
        places[x] = (int(top) + 1) * (width + 4) + int(left) + 1 if inside else -1


@part
def _all_weights(shares: Any, weights: Any) -> None:
    """Of the four columns and the four rows of the cubic."""
    for axis in range(2):
        for x in range(shares.shape[1]):
            share = np.float32(shares[axis, x])
            rest = np.float32(1) - share
            bend = share * rest
            # The cubic with slope -1 as a weight for each pixel; weights float32 (8, W).
            weights[4 * axis, x] = -bend * rest
            weights[4 * axis + 1, x] = rest + bend * rest
            weights[4 * axis + 2, x] = share + bend * share
            weights[4 * axis + 3, x] = -bend * share


@part
def _mix_linear(taps: Any, shares: Any, out: Any) -> None:
    for x in range(shares.shape[1]):
        out[3 * x] = _linear(taps, shares, x, 0)
        out[3 * x + 1] = _linear(taps, shares, x, 8)
        out[3 * x + 2] = _linear(taps, shares, x, 16)


@njit(nogil=True, inline="always")
def _linear(taps: Any, shares: Any, x: int, shift: int) -> Any:
    a, b = np.float64(_byte(taps[0, x], shift)), np.float64(_byte(taps[1, x], shift))
    c, d = np.float64(_byte(taps[2, x], shift)), np.float64(_byte(taps[3, x], shift))
    above, below = a + (b - a) * shares[0, x], c + (d - c) * shares[0, x]
    return _cut(above + (below - above) * shares[1, x])


@part
def _mix_taps(taps: Any, weights: Any, out: Any, margins: Any) -> None:
    """A row in single precision, and how far each pixel's nearest channel is from an integer."""
    for x in range(margins.size):
        r, g, b = _mix(taps, weights, x, 0), _mix(taps, weights, x, 8), _mix(taps, weights, x, 16)
        margins[x] = min(_margin(r), _margin(g), _margin(b))
        out[3 * x] = np.uint8(np.int32(min(max(r, _ZERO), _FULL)))
        out[3 * x + 1] = np.uint8(np.int32(min(max(g, _ZERO), _FULL)))
        out[3 * x + 2] = np.uint8(np.int32(min(max(b, _ZERO), _FULL)))


@njit(nogil=True, inline="always")
def _mix(taps: Any, weights: Any, x: int, shift: int) -> Any:
    a, b = _mix_row(taps, weights, x, 0, shift), _mix_row(taps, weights, x, 4, shift)
    c, d = _mix_row(taps, weights, x, 8, shift), _mix_row(taps, weights, x, 12, shift)
    total = weights[4, x] * a + weights[5, x] * b + (weights[6, x] * c + weights[7, x] * d)
    # Beyond the range both ways give 0 or 255: half a step outside is far from an integer, hence never in doubt.
    return min(max(total, -_HALF), _FULL + _HALF)


@njit(nogil=True, inline="always")
def _mix_row(taps: Any, weights: Any, x: int, row: int, shift: int) -> Any:
    a, b = np.float32(_byte(taps[row, x], shift)), np.float32(_byte(taps[row + 1, x], shift))
    c, d = np.float32(_byte(taps[row + 2, x], shift)), np.float32(_byte(taps[row + 3, x], shift))
    return weights[0, x] * a + weights[1, x] * b + (weights[2, x] * c + weights[3, x] * d)


@njit(nogil=True, inline="always")
def _margin(value: Any) -> Any:
    cut = np.floor(value)
    return min(value - cut, cut + np.float32(1) - value)


@njit(nogil=True, inline="always")
def _byte(packed: Any, shift: int) -> Any:
    return np.uint8(packed >> shift)


@part
def _exact(taps: Any, x: int, shift: int, shares: Any) -> Any:
    """One value in double precision, in the order of Pillow's operations."""
    a, b = _exact_row(taps, x, 0, shift, shares[0, x]), _exact_row(taps, x, 4, shift, shares[0, x])
    c, d = _exact_row(taps, x, 8, shift, shares[0, x]), _exact_row(taps, x, 12, shift, shares[0, x])
    return _cut(_cubic(a, b, c, d, shares[1, x]))


@part
def _exact_row(taps: Any, x: int, row: int, shift: int, share: float) -> float:
    a, b = np.float64(_byte(taps[row, x], shift)), np.float64(_byte(taps[row + 1, x], shift))
    c, d = np.float64(_byte(taps[row + 2, x], shift)), np.float64(_byte(taps[row + 3, x], shift))
    return _cubic(a, b, c, d, share)


@part
def _is_flat(taps: Any, x: int) -> bool:
    # Of 16 equal pixels every sum is that pixel: no need for the slow exact way, which flat areas would take always.
    differing = np.uint32(0)
    for i in range(1, 16):
        differing |= taps[i, x] ^ taps[0, x]
    return differing == 0


@kernel
def box_blur(pixels: Any, reach: int, inner: int, outer: int) -> None:
    """Three box filters along the rows, then three along the columns, each rounded to uint8, edges replicated.

    A box weighs its ``2 * reach + 1`` middle pixels with ``inner`` and one more on either side with ``outer``, in
    units of 2**-24.
    """
    height, width, _ = pixels.shape
    stride, pad = 3 * width, reach + 1  # pad: pixels that a box takes beyond its middle
    image = np.empty((height + 2 * pad, stride), np.uint8)  # room for replicated rows
    other = np.empty((height + 2 * pad, stride), np.uint8)
    line, spare = np.empty(stride + 6 * pad, np.uint8), np.empty(stride + 6 * pad, np.uint8)
    for y in range(height):
        _copy(pixels[y].reshape(-1), line, 3 * pad)
        _replicate(line, 3, pad)
        _box(line, spare[3 * pad : 3 * pad + stride], 3, reach, inner, outer)
        _replicate(spare, 3, pad)
        _box(spare, line[3 * pad : 3 * pad + stride], 3, reach, inner, outer)
        _replicate(line, 3, pad)
        _box(line, image[y + pad], 3, reach, inner, outer)
    # Along the columns the whole image is one line, whose neighbours are a stride apart.
    columns, others, begin = image.reshape(-1), other.reshape(-1), pad * stride
    _replicate(columns, stride, pad)
    _box(columns, others[begin : begin + height * stride], stride, reach, inner, outer)
    _replicate(others, stride, pad)
    _box(others, columns[begin : begin + height * stride], stride, reach, inner, outer)
    _replicate(columns, stride, pad)
    _box(columns, pixels.reshape(-1), stride, reach, inner, outer)


@part
def _replicate(line: Any, step: int, pad: int) -> None:
    """Repeat the first and the last ``step`` values inside the ``pad`` of either end."""
    end = line.size - pad * step
    for k in range(pad):
        _copy(line[pad * step : (pad + 1) * step], line, k * step)
        _copy(line[end - step : end], line, end + k * step)


@part
def _box(line: Any, out: Any, step: int, reach: int, inner: int, outer: int) -> None:
    inside, outside = np.uint32(inner), np.uint32(outer)
    # The smallest reaches are written out: sums of up to 3 bytes fit into 16 bits, which has twice the lanes of 32.
    if reach == 0:
        a, b, c = line, line[step:], line[2 * step :]
        for i in range(out.size):
            out[i] = _round(np.uint32(b[i]) * inside + np.uint16(np.uint16(a[i]) + np.uint16(c[i])) * outside)
    elif reach == 1:
        a, b, c, d, e = line, line[step:], line[2 * step :], line[3 * step :], line[4 * step :]
        for i in range(out.size):
            middle = np.uint16(np.uint16(b[i]) + np.uint16(c[i]) + np.uint16(d[i]))
            out[i] = _round(middle * inside + np.uint16(np.uint16(a[i]) + np.uint16(e[i])) * outside)
    else:
        middles = np.zeros(out.size, np.uint32)  # the 2 * reach + 1 inner values
        for k in range(1, 2 * reach + 2):
            shifted = line[k * step :]
            for i in range(out.size):
                middles[i] += np.uint32(shifted[i])
        end = line[(2 * reach + 2) * step :]
        for i in range(out.size):
            out[i] = _round(middles[i] * inside + (np.uint32(line[i]) + np.uint32(end[i])) * outside)


@njit(nogil=True, inline="always")
def _round(weighted: Any) -> Any:
    # The sum of the weights is 2**24 at most: 255 * 2**24 and a half fit into 32 bits.
    return np.uint8(np.uint32(weighted + np.uint32(1 << 23)) >> np.uint32(24))
