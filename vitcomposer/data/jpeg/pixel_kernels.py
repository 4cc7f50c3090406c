"""Compiled second half of the region decode: DCT coefficients to RGB rows, bit for bit what libjpeg-turbo gives.

Coefficients come in tiles of 16 blocks, coefficient by coefficient (64 x 16), so that every step is a loop over 16
lanes without a transposition, which LLVM turns into vector code (it would not with 8: too few to check for overlap).
All arithmetic is on 32 bits; numba widens to 64 by itself, hence the casts around whatever is shifted, compared or
used twice.
"""

import numpy as np

from vitcomposer.data.jpeg.kernel import part

I16, I32, U64 = np.int16, np.int32, np.uint64

TILE = 16  # blocks of a tile


@part
def _butterfly(d0, d1, d2, d3, d4, d5, d6, d7):  # noqa: PLR0913, PLR0917
    """Eight-point inverse DCT times 8192 (Loeffler, Ligtenberg and Moschytz, ICASSP 1989), constants of 13 bits."""
    # Even part. d2 and d6 are turned by sqrt(2) * c6 with three products instead of four; ck is cos(k * pi / 16).
    even = I32((d2 + d6) * 4433)
    e2 = I32(even - d6 * 15137)
    e3 = I32(even + d2 * 6270)
    e0 = I32((d0 + d4) << 13)
    e1 = I32((d0 - d4) << 13)
    s0, s3, s1, s2 = I32(e0 + e3), I32(e0 - e3), I32(e1 + e2), I32(e1 - e2)
    # Odd part, where z5 is common to z3 and z4.
    z5 = I32((d7 + d3 + d5 + d1) * 9633)
    z1 = I32((d7 + d1) * -7373)
    z2 = I32((d5 + d3) * -20995)
    z3 = I32((d7 + d3) * -16069 + z5)
    z4 = I32((d5 + d1) * -3196 + z5)
    o3 = I32(d7 * 2446 + z1 + z3)
    o2 = I32(d5 * 16819 + z2 + z4)
    o1 = I32(d3 * 25172 + z2 + z3)
    o0 = I32(d1 * 12299 + z1 + z4)
    return (
        I32(s0 + o0),
        I32(s1 + o1),
        I32(s2 + o2),
        I32(s3 + o3),
        I32(s3 - o3),
        I32(s2 - o2),
        I32(s1 - o1),
        I32(s0 - o0),
    )


@part
def _columns(coef, tile, quant, table):
    """First pass, down the columns, in place; keeps two bits of fraction."""
    for u in range(8):
        # Column u of a tile of coef, int16 (8, 8, TILE), and of a table of quant, int32 (8, 8).
        at, q = tile + u * TILE, table + u
        q0, q1, q2, q3 = quant[U64(q)], quant[U64(q + 8)], quant[U64(q + 16)], quant[U64(q + 24)]
        q4, q5, q6, q7 = quant[U64(q + 32)], quant[U64(q + 40)], quant[U64(q + 48)], quant[U64(q + 56)]
        for lane in range(TILE):
            i0 = U64(at + lane)
            i1, i2, i3 = i0 + U64(8 * TILE), i0 + U64(16 * TILE), i0 + U64(24 * TILE)
            i4, i5, i6, i7 = i0 + U64(32 * TILE), i0 + U64(40 * TILE), i0 + U64(48 * TILE), i0 + U64(56 * TILE)
            x0, x1, x2, x3, x4, x5, x6, x7 = _butterfly(
                I32(coef[i0] * q0),
                I32(coef[i1] * q1),
                I32(coef[i2] * q2),
                I32(coef[i3] * q3),
                I32(coef[i4] * q4),
                I32(coef[i5] * q5),
                I32(coef[i6] * q6),
                I32(coef[i7] * q7),
            )
            # 13 bits of the constants less the two that are kept, rounded.
            coef[i0] = I32(x0 + 1024) >> 11
            coef[i1] = I32(x1 + 1024) >> 11
            coef[i2] = I32(x2 + 1024) >> 11
            coef[i3] = I32(x3 + 1024) >> 11
            coef[i4] = I32(x4 + 1024) >> 11
            coef[i5] = I32(x5 + 1024) >> 11
            coef[i6] = I32(x6 + 1024) >> 11
            coef[i7] = I32(x7 + 1024) >> 11


@part
def _sample(x):
    # Of the 18 bits 13 are the constants', 2 the fraction's, and 3 divide by the 8 of a two-dimensional transform.
    # Rounding and the level shift of 128 in one addition, then the range limit.
    return I32(min(max(I32(I32(x + 33685504) >> 18), I32(0)), I32(255)))


@part
def _rows(coef, tile, pairs):
    """Second pass, along the rows, into samples (8 rows, 16 blocks, 8); pairs holds two of them in each int16."""
    for y in range(8):
        start, line = tile + y * 8 * TILE, y * 4 * TILE
        for lane in range(TILE):
            i = U64(start + lane)
            x0, x1, x2, x3, x4, x5, x6, x7 = _butterfly(
                I32(coef[i]),
                I32(coef[i + U64(TILE)]),
                I32(coef[i + U64(2 * TILE)]),
                I32(coef[i + U64(3 * TILE)]),
                I32(coef[i + U64(4 * TILE)]),
                I32(coef[i + U64(5 * TILE)]),
                I32(coef[i + U64(6 * TILE)]),
                I32(coef[i + U64(7 * TILE)]),
            )
            o = U64(line + 4 * lane)
            # The lower byte comes first in memory: eight samples in their order are one word.
            pairs[o] = I32(_sample(x0) | I32(_sample(x1) << 8))
            pairs[o + U64(1)] = I32(_sample(x2) | I32(_sample(x3) << 8))
            pairs[o + U64(2)] = I32(_sample(x4) | I32(_sample(x5) << 8))
            pairs[o + U64(3)] = I32(_sample(x6) | I32(_sample(x7) << 8))


@part
def inverse_dct(coef, quant, table, homes, strides, words):  # noqa: PLR0913, PLR0917
    """Tiles of coefficients (spoilt) to samples in their planes.

    Args:
        table: The quantisation table of each tile.
        homes: Place in words of each block's first row, -1 for none; strides the distance of its rows.
        words: uint64 (n): eight samples each. The first 8 * TILE are scratch.
    """
    pairs = words[: 8 * TILE].view(np.int16)  # int16 (8 rows * TILE blocks * 4 pairs)
    for t in range(len(table)):
        _columns(coef, t * 64 * TILE, quant, table[t] * 64)
        _rows(coef, t * 64 * TILE, pairs)
        for lane in range(t * TILE, (t + 1) * TILE):
            if homes[lane] < 0:  # a lane that only fills up its tile
                continue
            home, stride = homes[lane], strides[lane]
            for y in range(8):
                words[U64(home + y * stride)] = words[U64(y * TILE + lane - t * TILE)]


@part
def _three_to_one(near, far):
    # NumPy's functions stay in 16 bits, where numba's operators would widen and LLVM sees no reason to narrow again.
    return np.add(np.multiply(I16(near), I16(3)), I16(far))


@part
def _blend(planes, near, far, bias, into, count):  # noqa: PLR0913, PLR0917
    # The other axis has full resolution: 3/4 of the nearer row and 1/4 of the other one.
    for i in range(count):
        mid = _three_to_one(planes[U64(near + i)], planes[U64(far + i)])
        planes[U64(into + i)] = np.right_shift(np.add(mid, bias), I16(2))


@part
def _spread(sums, planes, into, count, low, high, shift):  # noqa: PLR0913, PLR0917
    low, high, shift = I16(low), I16(high), I16(shift)
    for i in range(count):
        mid = sums[U64(i + 1)]
        # The two pixels of a sample lie a quarter of its width to the left and right of its middle.
        left, right = _three_to_one(mid, sums[U64(i)]), _three_to_one(mid, sums[U64(i + 2)])
        planes[U64(into + 2 * i)] = np.right_shift(np.add(left, low), shift)
        planes[U64(into + 2 * i + 1)] = np.right_shift(np.add(right, high), shift)


@part
def upsample_line(planes, near, far, first, size, sums, into, ratio):  # noqa: PLR0913, PLR0917
    """One chroma row at full width: libjpeg's triangle filter, which takes 3/4 of the nearer sample on each axis.

    Args:
        near: Offset in planes of the first sample needed of the nearer row; far that of the other one.
        first: Its place in the whole row, which has size samples.
        sums: int16 (n + 2), scratch for the n samples needed.
        into: Offset in planes of the result, n or 2 * n samples.
        ratio: (pixels across, pixels down, 1 for the lower of two output rows, which rounds the other way).
    """
    count = len(sums) - 2
    across, down, lower = ratio
    if across == 1:
        _blend(planes, near, far, I16(1 + lower), into, count)
        return
    if size <= 2:  # libjpeg only repeats where there are no three samples to blend
        for i in range(count):
            planes[U64(into + 2 * i)] = planes[U64(into + 2 * i + 1)] = planes[U64(near + i)]
        return
    # Past the image's edge, where there is no neighbour, the outermost sample counts twice.
    low, high = -1 if first > 0 else 0, count if first + count < size else count - 1
    if down == 2:
        # Columns first: sums of up to 4 * 255, and 16 * 255 after the rows, fit into 16 bits. As in libjpeg, one half
        # is rounded up in the left pixel and down in the right one, so that the image as a whole gains no brightness.
        for i in range(count):
            sums[U64(i + 1)] = _three_to_one(planes[U64(near + i)], planes[U64(far + i)])
        sums[0] = _three_to_one(planes[U64(near + low)], planes[U64(far + low)])
        sums[U64(count + 1)] = _three_to_one(planes[U64(near + high)], planes[U64(far + high)])
        _spread(sums, planes, into, count, 8, 7, 4)
    else:
        for i in range(count):
            sums[U64(i + 1)] = planes[U64(near + i)]
        sums[0], sums[U64(count + 1)] = planes[U64(near + low)], planes[U64(near + high)]
        _spread(sums, planes, into, count, 1, 2, 2)


@part
def _rounded(factor, chroma):
    """(factor * chroma + 32768) >> 16, in 16 bits: the high half of the doubled product, rounded."""
    high = np.right_shift(np.multiply(I32(np.add(chroma, chroma)), I32(factor)), I32(16))
    return np.right_shift(np.add(I16(high), I16(1)), I16(1))


@part
def _clip(x):
    return min(max(x, I16(0)), I16(255))


@part
def colour_line(planes, luma, blue, red, out, at, count):  # noqa: PLR0913, PLR0917
    """JFIF's YCbCr to RGB with libjpeg's 16-bit factors; luma, blue, red are offsets in planes, at one in out.

    The factors are 1.402, -0.34414, -0.71414 and 1.772 times 65536, less the nearest multiple of 65536 where that
    leaves a number of 16 bits.
    """
    for x in range(count):
        # 1.402 is 1 + 26345 / 65536, -0.71414 is -1 + 18734 / 65536, 1.772 is 2 - 14942 / 65536.
        y = I16(planes[U64(luma + x)])
        cb = np.subtract(I16(planes[U64(blue + x)]), I16(128))
        cr = np.subtract(I16(planes[U64(red + x)]), I16(128))
        both = np.add(np.multiply(I32(cb), I32(-22554)), np.multiply(I32(cr), I32(18734)))
        green = I16(np.right_shift(np.add(both, I32(32768)), I32(16)))
        o = U64(at + 3 * x)  # out uint8, RGB side by side
        out[o] = _clip(np.add(np.add(y, cr), _rounded(26345, cr)))
        out[o + U64(1)] = _clip(np.add(np.subtract(y, cr), green))
        out[o + U64(2)] = _clip(np.add(np.add(y, np.add(cb, cb)), _rounded(-14942, cb)))


@part
def gray_line(planes, luma, out, at, count):
    for x in range(count):
        v = planes[U64(luma + x)]
        o = U64(at + 3 * x)
        out[o] = v
        out[o + U64(1)] = v
        out[o + U64(2)] = v
