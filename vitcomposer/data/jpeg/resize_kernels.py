"""Pillow's antialiased resize of uint8 RGB, bit for bit: the compiled half of vitcomposer.data.jpeg.resize.

Both passes are one loop over neighbouring bytes, ``out[i] = level(sum of weights[k] * source[i + k * step])``: the
vertical one over a row, the horizontal one over a tile of rows that was turned so that its columns lie one after the
other. LLVM makes vector code of that, which it cannot along a row, where every output pixel starts elsewhere.

Weights have 22 bits of fraction. The magnitudes of either filter's sum to less than 1.5 after normalising: times
2 ** 22 times 255 that is below 2 ** 31 less the half added for rounding, so 32 bits are exact in any order.
"""

import numpy as np

from vitcomposer.data.jpeg.kernel import kernel, part

I32, U8, U64 = np.int32, np.uint8, np.uint64

BITS = 22  # of fraction; 255 needs 8 and the sign and the overshoot one each
HALF = 1 << (BITS - 1)
SPARE = 6  # pixels, rows: long sums are of 6 n + 4 values, the last of them times zero
NO_END = 1 << 62  # of the lines of scratch memory, which has SPARE of them behind those that count


@part
def _bicubic(x):
    x = abs(x)  # Keys 1981 with a = -0.5
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@part
def _bilinear(x):
    return max(1.0 - abs(x), 0.0)


@kernel
def coefficients(size, target, bicubic, spans, weights):
    """Where each of target pixels of an axis of size takes its value from.

    Args:
        spans: int64 (target * 2): first source pixel and number of weights; weights of zero at the ends are left out.
        weights: int32 (target * n), filled with zeros; n at least 2 * ceil(support) + 1.
    """
    # Pillow's operations in its order and in double precision: the last bit of a weight depends on both.
    scale = size / target
    stretch = max(scale, 1.0)
    support = stretch * 2.0 if bicubic else stretch
    inverse, n = 1.0 / stretch, len(weights) // target
    terms = np.empty(n)  # float64
    for i in range(target):
        center = (i + 0.5) * scale
        first = max(int(center - support + 0.5), 0)  # int cuts off, as C does
        count = min(int(center + support + 0.5), size) - first
        total = 0.0
        for k in range(count):
            x = (k + first - center + 0.5) * inverse
            terms[k] = _bicubic(x) if bicubic else _bilinear(x)
            total += terms[k]
        used = 0
        for k in range(count):
            share = terms[k] / total if total != 0.0 else terms[k]
            # Rounded half away from zero, as Pillow does; BITS of fraction.
            weight = int(share * (1 << BITS) - 0.5) if share < 0.0 else int(share * (1 << BITS) + 0.5)
            if weight != 0 or used:
                weights[i * n + used] = weight
                used += 1
            else:
                first += 1
        while used and weights[i * n + used - 1] == 0:
            used -= 1
        spans[2 * i], spans[2 * i + 1] = first, used


@part
def _level(total):
    # HALF is in the total: the shift rounds. The overshoot of the cubic is clipped, as in Pillow.
    return U8(min(max(I32(total >> I32(BITS)), I32(0)), I32(255)))


# One function for each number of weights, so that the loop has no loop inside. A line with one weight less than the
# function takes has a zero after its own, and source has bytes there (SPARE).
@part
def _sum_two(source, at, step, count, weights, first, out, into):  # noqa: PLR0913, PLR0917
    f = U64(first)
    w0, w1 = weights[f], weights[f + U64(1)]  # int32
    s1 = U64(step)
    for i in range(count):
        p = U64(at + i)  # of source, uint8 (n,)
        a = I32(I32(w0 * source[p]) + I32(w1 * source[p + s1]))
        out[U64(into + i)] = _level(I32(HALF + a))  # uint8 (n,)


@part
def _sum_four(source, at, step, count, weights, first, out, into):  # noqa: PLR0913, PLR0917
    f = U64(first)
    w0, w1, w2, w3 = weights[f], weights[f + U64(1)], weights[f + U64(2)], weights[f + U64(3)]
    s1, s2, s3 = U64(step), U64(2 * step), U64(3 * step)
    for i in range(count):
        p = U64(at + i)
        # Sums of two, added at the end: neighbouring products need not wait for each other.
        a = I32(I32(w0 * source[p]) + I32(w1 * source[p + s1]))
        b = I32(I32(w2 * source[p + s2]) + I32(w3 * source[p + s3]))
        out[U64(into + i)] = _level(I32(HALF + a + b))


@part
def _sum_five(source, at, step, count, weights, first, out, into):  # noqa: PLR0913, PLR0917
    f = U64(first)
    w0, w1, w2, w3 = weights[f], weights[f + U64(1)], weights[f + U64(2)], weights[f + U64(3)]
    w4 = weights[f + U64(4)]
    s1, s2, s3, s4 = U64(step), U64(2 * step), U64(3 * step), U64(4 * step)
    for i in range(count):
        p = U64(at + i)
        a = I32(I32(w0 * source[p]) + I32(w1 * source[p + s1]))
        b = I32(I32(w2 * source[p + s2]) + I32(w3 * source[p + s3]))
        c = I32(w4 * source[p + s4])
        out[U64(into + i)] = _level(I32(HALF + a + b + c))


@part
def _sum_six(source, at, step, count, weights, first, out, into):  # noqa: PLR0913, PLR0917
    f = U64(first)
    w0, w1, w2, w3 = weights[f], weights[f + U64(1)], weights[f + U64(2)], weights[f + U64(3)]
    w4, w5 = weights[f + U64(4)], weights[f + U64(5)]
    s1, s2, s3, s4 = U64(step), U64(2 * step), U64(3 * step), U64(4 * step)
    s5 = U64(5 * step)
    for i in range(count):
        p = U64(at + i)
        a = I32(I32(w0 * source[p]) + I32(w1 * source[p + s1]))
        b = I32(I32(w2 * source[p + s2]) + I32(w3 * source[p + s3]))
        c = I32(I32(w4 * source[p + s4]) + I32(w5 * source[p + s5]))
        out[U64(into + i)] = _level(I32(HALF + a + b + c))


@part
def _sum_seven(source, at, step, count, weights, first, out, into):  # noqa: PLR0913, PLR0917
    f = U64(first)
    w0, w1, w2, w3 = weights[f], weights[f + U64(1)], weights[f + U64(2)], weights[f + U64(3)]
    w4, w5, w6 = weights[f + U64(4)], weights[f + U64(5)], weights[f + U64(6)]
    s1, s2, s3, s4 = U64(step), U64(2 * step), U64(3 * step), U64(4 * step)
    s5, s6 = U64(5 * step), U64(6 * step)
    for i in range(count):
        p = U64(at + i)
        a = I32(I32(w0 * source[p]) + I32(w1 * source[p + s1]))
        b = I32(I32(w2 * source[p + s2]) + I32(w3 * source[p + s3]))
        c = I32(I32(w4 * source[p + s4]) + I32(w5 * source[p + s5]))
        d = I32(w6 * source[p + s6])
        out[U64(into + i)] = _level(I32(HALF + a + b + c + d))


@part
def _sum_eight(source, at, step, count, weights, first, out, into):  # noqa: PLR0913, PLR0917
    f = U64(first)
    w0, w1, w2, w3 = weights[f], weights[f + U64(1)], weights[f + U64(2)], weights[f + U64(3)]
    w4, w5, w6, w7 = weights[f + U64(4)], weights[f + U64(5)], weights[f + U64(6)], weights[f + U64(7)]
    s1, s2, s3, s4 = U64(step), U64(2 * step), U64(3 * step), U64(4 * step)
    s5, s6, s7 = U64(5 * step), U64(6 * step), U64(7 * step)
    for i in range(count):
        p = U64(at + i)
        a = I32(I32(w0 * source[p]) + I32(w1 * source[p + s1]))
        b = I32(I32(w2 * source[p + s2]) + I32(w3 * source[p + s3]))
        c = I32(I32(w4 * source[p + s4]) + I32(w5 * source[p + s5]))
        d = I32(I32(w6 * source[p + s6]) + I32(w7 * source[p + s7]))
        out[U64(into + i)] = _level(I32(HALF + a + b + c + d))


@part
def _add_six(source, at, step, count, weights, first, sums):  # noqa: PLR0913, PLR0917
    """Six values at a time, added to ``sums``."""
    f = U64(first)
    w0, w1, w2 = weights[f], weights[f + U64(1)], weights[f + U64(2)]
    w3, w4, w5 = weights[f + U64(3)], weights[f + U64(4)], weights[f + U64(5)]
    s1, s2, s3, s4, s5 = U64(step), U64(2 * step), U64(3 * step), U64(4 * step), U64(5 * step)
    for i in range(count):
        p = U64(at + i)
        a = I32(I32(w0 * source[p]) + I32(w1 * source[p + s1]))
        b = I32(I32(w2 * source[p + s2]) + I32(w3 * source[p + s3]))
        c = I32(I32(w4 * source[p + s4]) + I32(w5 * source[p + s5]))
        sums[U64(i)] = I32(sums[U64(i)] + I32(a + b + c))  # int32 (count,)


@part
def _end_four(source, at, step, count, weights, first, sums, out, into):  # noqa: PLR0913, PLR0917
    f = U64(first)
    w0, w1, w2, w3 = weights[f], weights[f + U64(1)], weights[f + U64(2)], weights[f + U64(3)]
    s1, s2, s3 = U64(step), U64(2 * step), U64(3 * step)
    for i in range(count):
        p = U64(at + i)
        a = I32(I32(w0 * source[p]) + I32(w1 * source[p + s1]))
        b = I32(I32(w2 * source[p + s2]) + I32(w3 * source[p + s3]))
        out[U64(into + i)] = _level(I32(sums[U64(i)] + I32(a + b)))


@part
def _sum_many(source, at, step, count, weights, first, taps, out, into, sums):  # noqa: PLR0913, PLR0917
    for i in range(count):
        sums[U64(i)] = HALF  # int32 (count,)
    k = 0
    # 6 n + 4 weights, the fewest that hold all taps; those beyond them are zero.
    while taps - k > 4:
        _add_six(source, at + k * step, step, count, weights, first + k, sums)
        k += 6
    _end_four(source, at + k * step, step, count, weights, first + k, sums, out, into)


@part
def _sum_few(source, at, step, count, weights, first, taps, out, into, sums):  # noqa: PLR0913, PLR0917
    """Any number of weights, and no line is read beyond the last of them."""
    for i in range(count):
        sums[U64(i)] = HALF  # int32 (count,)
    for k in range(taps):
        weight, p = weights[U64(first + k)], at + k * step
        for i in range(count):
            sums[U64(i)] = I32(sums[U64(i)] + I32(weight * source[U64(p + i)]))
    for i in range(count):
        out[U64(into + i)] = _level(sums[U64(i)])


@part
def apply_weights(source, step, end, axis, out, count, sums):  # noqa: PLR0913, PLR0917
    """One pass: lines of count bytes, each the sum of as many lines of source, step apart, as its span says.

    Lines that follow those of a span may be read too, times zero, but none from line ``end`` on.
    """
    spans, weights = axis  # int64 (2 * target,), int32 (target * most,)
    target = len(spans) // 2
    most = len(weights) // target
    for i in range(target):
        taps = spans[U64(2 * i + 1)]
        at, first, into = spans[U64(2 * i)] * step, i * most, i * count
        if spans[U64(2 * i)] + taps + SPARE > end:
            _sum_few(source, at, step, count, weights, first, taps, out, into, sums)
        # Up to 8 taps, such as bicubic to half the size has, the sums stay in registers.
        elif taps <= 2:
            _sum_two(source, at, step, count, weights, first, out, into)
        elif taps <= 4:
            _sum_four(source, at, step, count, weights, first, out, into)
        elif taps == 5:
            _sum_five(source, at, step, count, weights, first, out, into)
        elif taps == 6:
            _sum_six(source, at, step, count, weights, first, out, into)
        elif taps == 7:
            _sum_seven(source, at, step, count, weights, first, out, into)
        elif taps == 8:
            _sum_eight(source, at, step, count, weights, first, out, into)
        else:
            _sum_many(source, at, step, count, weights, first, taps, out, into, sums)


@part
def _transpose(a, at, step, b, to, hop, count):  # noqa: PLR0913, PLR0917
    """Blocks of 8 x 8 bytes: 8 words of a, step apart, to 8 words of b, hop apart; count times, at the next word of a.

    The halves, then the quarters, then the bytes of pairs of words change places (Warren, Hacker's Delight, 7-3).
    """
    m4, m2, m1 = U64(0x00000000FFFFFFFF), U64(0x0000FFFF0000FFFF), U64(0x00FF00FF00FF00FF)
    s4, s2, s1 = U64(32), U64(16), U64(8)
    for j in range(count):
        p = U64(at + j)
        a0, a1, a2, a3 = a[p], a[p + U64(step)], a[p + U64(2 * step)], a[p + U64(3 * step)]
        a4, a5 = a[p + U64(4 * step)], a[p + U64(5 * step)]
        a6, a7 = a[p + U64(6 * step)], a[p + U64(7 * step)]
        # Halves: rows 0 to 3 with rows 4 to 7.
        b0, b4 = (a0 & m4) | (a4 << s4), (a0 >> s4) | (a4 & ~m4)
        b1, b5 = (a1 & m4) | (a5 << s4), (a1 >> s4) | (a5 & ~m4)
        b2, b6 = (a2 & m4) | (a6 << s4), (a2 >> s4) | (a6 & ~m4)
        b3, b7 = (a3 & m4) | (a7 << s4), (a3 >> s4) | (a7 & ~m4)
        # Quarters: rows two apart.
        a0, a2 = (b0 & m2) | ((b2 & m2) << s2), ((b0 >> s2) & m2) | (b2 & ~m2)
        a1, a3 = (b1 & m2) | ((b3 & m2) << s2), ((b1 >> s2) & m2) | (b3 & ~m2)
        a4, a6 = (b4 & m2) | ((b6 & m2) << s2), ((b4 >> s2) & m2) | (b6 & ~m2)
        a5, a7 = (b5 & m2) | ((b7 & m2) << s2), ((b5 >> s2) & m2) | (b7 & ~m2)
        # Bytes: neighbours.
        q = U64(to + 8 * j * hop)
        b[q] = (a0 & m1) | ((a1 & m1) << s1)
        b[q + U64(hop)] = ((a0 >> s1) & m1) | (a1 & ~m1)
        b[q + U64(2 * hop)] = (a2 & m1) | ((a3 & m1) << s1)
        b[q + U64(3 * hop)] = ((a2 >> s1) & m1) | (a3 & ~m1)
        b[q + U64(4 * hop)] = (a4 & m1) | ((a5 & m1) << s1)
        b[q + U64(5 * hop)] = ((a4 >> s1) & m1) | (a5 & ~m1)
        b[q + U64(6 * hop)] = (a6 & m1) | ((a7 & m1) << s1)
        b[q + U64(7 * hop)] = ((a6 >> s1) & m1) | (a7 & ~m1)


@part
def _turn(pixels, stride, width, top, count, lines, tile):  # noqa: PLR0913, PLR0917
    """count rows from top on, column by column, eight rows at a time by way of lines."""
    across, groups = (3 * width + 7) // 8, (count + 7) // 8
    rows = lines.view(np.uint8)  # 8 rows of 8 * across bytes
    for g in range(groups):
        for r in range(min(8, count - 8 * g)):
            at, into = (top + 8 * g + r) * stride, 8 * r * across
            for x in range(3 * width):
                rows[U64(into + x)] = pixels[U64(at + x)]
        # tile becomes (8 * across columns, groups) words: word g of a column holds its rows 8 g to 8 g + 7.
        _transpose(lines, 0, across, tile, g, groups, across)


@part
def _resize_across(source, stride, shape, depth, axis, scratch):  # noqa: PLR0913, PLR0917
    """The horizontal pass, from rows stride apart to middle: rows of as many whole words as 3 * target bytes need."""
    height, width = shape
    (lines, tile, middle), sums, (tile8, _, _) = scratch[0], scratch[2], scratch[3]
    lines8 = lines.view(np.uint8)
    target = len(axis[0]) // 2
    wide = (3 * target + 7) // 8
    for top in range(0, height, depth):
        count = min(depth, height - top)
        groups = (count + 7) // 8
        _turn(source, stride, width, top, count, lines, tile)
        # A pixel is three columns of 8 * groups bytes: lines becomes (3 * target columns, 8 * groups rows) bytes.
        apply_weights(tile8, 24 * groups, NO_END, axis, lines8, 24 * groups, sums)
        # Turned back, 8 columns at a time: middle has rows of wide words, 3 * target bytes and what fills the last one.
        for j in range(wide):
            _transpose(lines, 8 * j * groups, groups, middle, top * wide + j, wide, groups)


@kernel
def resize_axes(pixels, stride, shape, depth, axes, down_first, scratch, out):  # noqa: PLR0913, PLR0917
    """Both passes, the vertical one first if ``down_first``.

    Args:
        pixels: Rows of 3 * shape[1] bytes, shape[0] of them, stride apart; read-only.
        depth: Rows of a tile, a multiple of 8.
        axes: Of the columns and of the rows, the spans and weights from ``coefficients``.
        scratch: What ``resize._Workspace`` has, large enough.
        out: Rows of 3 * target bytes.
    """
    across, down = axes
    height, width = shape
    target, rows = len(across[0]) // 2, len(down[0]) // 2
    size = 8 * ((3 * target + 7) // 8)
    _, reduced, sums, (_, middle8, reduced8) = scratch
    if down_first:
        apply_weights(pixels, stride, height, down, reduced, 3 * width, sums)
        _resize_across(reduced8, 3 * width, (rows, width), depth, across, scratch)
        for y in range(rows):
            for x in range(3 * target):
                out[U64(3 * target * y + x)] = middle8[U64(size * y + x)]
    else:
        _resize_across(pixels, stride, shape, depth, across, scratch)
        apply_weights(middle8, size, NO_END, down, out, 3 * target, sums)
