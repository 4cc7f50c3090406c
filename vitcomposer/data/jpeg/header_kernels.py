"""Compiled reading of a seekable JPEG's header: markers, Huffman tables, and the index of its segments.

Nothing here trusts a byte of the file: what is not plain baseline JPEG is refused, and decoded elsewhere.
"""

import numpy as np

from vitcomposer.data.jpeg.kernel import part

I64, U64, U32 = np.int64, np.uint64, np.uint32

# Places in info, int64 (INFO_SIZE,), the header as numbers: ACROSS and DOWN are the luma blocks of an MCU, INTERVAL the
# MCUs of a restart segment, SCAN the offset of the coded data, QUANT and TABLES the tables of each component, STEP to
# ROWS what the index says. DEFINED has a bit for every table that the file holds: DC 0 to 3, AC 4 to 7, quantisation 8
# to 11. After GROW the sizes wanted are at WANTED.
HEIGHT, WIDTH, COMPONENTS, ACROSS, DOWN, INTERVAL, SCAN, DEFINED = range(8)
QUANT, TABLES, STEP, PER_ROW, ROWS, WANTED = 8, 11, 17, 18, 19, 20
RGB = 24  # 1 where Adobe's marker says that three components are no YCbCr
INFO_SIZE = 25

MAGIC = int.from_bytes(b"vitseek1", "little")
LENGTHS = 26  # offset in the file of the index's lengths

LOOKUP_BITS = 10
LOOKUP = 1 << LOOKUP_BITS
RAW = 16 + 256  # a Huffman table as DHT holds it: 16 counts, then the symbols
LONGEST = 17  # lengths of codes run from 1 to 16

INVALID, END, FIRST = 64, 128, 192  # steps that no run of zeros makes; FIRST is a DC code's
# T.81, figure A.6: from zigzag position to 8 * row + column.
ZIGZAG = np.array(
    [
        *(0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14),
        *(21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53),
        *(60, 61, 54, 47, 55, 62, 63),
    ],
    np.int64,
)


@part
def _short(data, i):
    # All numbers of a JPEG are big-endian; those of our index are little-endian.
    return I64(data[U64(i)]) << 8 | I64(data[U64(i + 1)])


@part
def little(data, i, count):
    value = 0
    for n in range(count):
        value |= I64(data[U64(i + n)]) << (8 * n)
    return value


@part
def _build_table(raw, table, lookup, limits):
    """Canonical codes (T.81, annex C) as entries of bits in all | bits of code << 8 | bits of value << 16 | step << 24.

    Codes longer than LOOKUP_BITS leave 0 in the lookup and are found by their limits: the highest code of each
    length, and what to add to a code for the place of its symbol.
    """
    at, code, symbol = table * RAW, 0, 0  # raw uint8 (8 * RAW,)
    lookup[table * LOOKUP : (table + 1) * LOOKUP] = 0  # uint32 (8 * LOOKUP,)
    for bits in range(1, LONGEST):
        count = I64(raw[at + bits - 1])
        limits[table, 0, bits] = code + count - 1 if count else -1  # int64 (8, 2, LONGEST)
        limits[table, 1, bits] = symbol - code
        if code + count > 1 << bits:  # more codes than there are patterns of this length
            return False
        for _ in range(count):
            value = I64(raw[at + 16 + symbol])
            if table < 4 and value > 15:  # a DC symbol is the size of a difference; libjpeg refuses such tables too
                return False
            if bits <= LOOKUP_BITS:
                # Every pattern of LOOKUP_BITS bits that begins with the code finds its entry.
                spread = 1 << (LOOKUP_BITS - bits)
                start = table * LOOKUP + code * spread
                lookup[start : start + spread] = entry_of(value, bits, table)
            code += 1
            symbol += 1
        code <<= 1
    return True


@part
def entry_of(symbol, bits, table):
    # RRRRSSSS of T.81, F.1.2.2: zeros before the coefficient, and its bits. A size of 0 ends the block, as in libjpeg
    # for the runs 1 to 14 too, which baseline does not define; with a run of 15 it is 16 zeros.
    run, size = symbol >> 4, symbol & 15
    step = run + 1
    if table < 4:
        step = FIRST
    elif size == 0 and run != 15:
        step = END
    return U32(bits + size | bits << 8 | size << 16 | step << 24)


@part
def _read_tables(data, p, end, info, raw, lookup, limits):
    """DHT. A table equal to the one kept from an earlier image is not built again."""
    while p < end:
        if p + 17 > end:
            return False
        # T.81, B.2.4.2: class and number of a table, its 16 counts, its symbols; then perhaps another table.
        kind, number = I64(data[p]) >> 4, I64(data[p]) & 15
        table = 4 * kind + number
        size = 16
        for i in range(16):
            size += I64(data[p + 1 + i])
        if kind > 1 or number > 3 or size > RAW or p + 1 + size > end:
            return False
        same = True
        for i in range(size):
            same &= raw[table * RAW + i] == data[p + 1 + i]
        if not same:
            for i in range(size):  # for a slice numba compiles the text of its error, which takes a second and a half
                raw[table * RAW + i] = data[p + 1 + i]
            if not _build_table(raw, table, lookup, limits):
                raw[table * RAW : table * RAW + 16] = 255  # equal to no table that is read: never taken for built
                return False
        info[DEFINED] |= 1 << table
        p += 1 + size
    return True


@part
def _read_quant(data, p, end, info, quant):
    while p < end:
        # T.81, B.2.4.1: 64 values of one or two bytes in zigzag order; kept row by row, as the inverse DCT takes them.
        wide, number = I64(data[p]) >> 4, I64(data[p]) & 15
        size = 64 * (1 + wide)
        if wide > 1 or number > 3 or p + 1 + size > end:
            return False
        for i in range(64):
            value = _short(data, p + 1 + 2 * i) if wide else I64(data[p + 1 + i])
            quant[number * 64 + ZIGZAG[i]] = value  # int32 (4 * 64,)
        info[DEFINED] |= 256 << number
        p += 1 + size
    return True


@part
def _read_frame(data, p, end, info):
    """SOF of 8 bits: grey, or YCbCr whose chroma is not sampled more finely than its luma."""
    # T.81, B.2.2: precision, height, width, count; then of each component its name, sampling and quantisation table.
    if end - p < 9 or data[p] != 8 or info[COMPONENTS]:
        return False
    count = I64(data[p + 5])
    if (count != 1 and count != 3) or end - p != 6 + 3 * count:
        return False
    info[HEIGHT], info[WIDTH], info[COMPONENTS] = _short(data, p + 1), _short(data, p + 3), count
    across, down = I64(data[p + 7]) >> 4, I64(data[p + 7]) & 15
    if count == 1:
        across = down = 1  # a scan of one component is not interleaved, whatever its sampling
    info[ACROSS], info[DOWN] = across, down
    for c in range(count):
        if (c and data[p + 7 + 3 * c] != 0x11) or data[p + 8 + 3 * c] > 3:  # both chroma components 1 x 1
            return False
        info[QUANT + c] = data[p + 8 + 3 * c]
    is_rgb = count == 3 and data[p + 6] == 82 and data[p + 9] == 71 and data[p + 12] == 66  # named R, G, B
    return not is_rgb and 1 <= across <= 2 and 1 <= down <= 2 and info[HEIGHT] > 0 and info[WIDTH] > 0


@part
def _read_scan(data, p, end, info):
    # T.81, B.2.3. All components in one scan, each with tables that are there.
    count = info[COMPONENTS]
    if count == 0 or end - p != 4 + 2 * count or data[p] != count or (count == 3 and info[RGB]):
        return False
    for c in range(count):
        dc, ac = I64(data[p + 2 + 2 * c]) >> 4, I64(data[p + 2 + 2 * c]) & 15
        if dc > 3 or ac > 3 or not info[DEFINED] >> dc & info[DEFINED] >> (4 + ac) & 1:
            return False
        if not info[DEFINED] >> (8 + info[QUANT + c]) & 1:
            return False
        info[TABLES + c], info[TABLES + 3 + c] = dc, 4 + ac
    p += 1 + 2 * count
    info[SCAN] = end
    return data[p] == 0 and data[p + 1] == 63 and data[p + 2] == 0  # all 64 coefficients, all bits


@part
def read_header(data, info, quant, raw, lookup, limits):  # noqa: PLR0913, PLR0917
    """All markers up to the scan; False for what is not a plain baseline JPEG with the tables it needs."""
    info[:] = 0
    p = 2  # behind SOI
    while p + 4 <= len(data):
        if data[p] != 0xFF:
            return False
        marker, end = data[p + 1], p + 2 + _short(data, p + 2)
        p += 4
        if end < p or end > len(data):
            return False
        good = True
        if marker == 0xC4:  # DHT
            good = _read_tables(data, p, end, info, raw, lookup, limits)
        elif marker == 0xDB:  # DQT
            good = _read_quant(data, p, end, info, quant)
        elif marker in (0xC0, 0xC1):  # SOF0, SOF1: sequential with Huffman codes
            good = _read_frame(data, p, end, info)
        elif marker == 0xDD:  # DRI
            good = end - p == 2
            info[INTERVAL] = _short(data, p) if good else 0
        elif marker == 0xEE and end - p >= 12 and data[p] == 65:  # APP14 of Adobe; its transform 1 is YCbCr
            info[RGB] = data[p + 11] != 1
        elif marker == 0xDA:  # SOS
            return _read_scan(data, p, end, info)
        else:
            good = 0xE0 <= marker <= 0xEF or marker == 0xFE  # APPn and COM say nothing of the pixels
        if not good:
            return False
        p = end
    return False


@part
def read_index(data, info):
    """The index after SOI: does it agree with the header? Its lengths begin at LENGTHS."""
    # The numbers of markers.INDEX_HEAD. A segment is a restart interval, and a row of MCUs is a whole number of them.
    size = _short(data, 4) - 2
    info[STEP], info[PER_ROW], info[ROWS] = little(data, 14, 2), little(data, 16, 2), little(data, 18, 2)
    across, down = 8 * info[ACROSS], 8 * info[DOWN]
    return (
        size == 20 + 2 * info[PER_ROW] * info[ROWS]
        and info[STEP] > 0
        and info[STEP] == info[INTERVAL]
        and info[STEP] * info[PER_ROW] == (info[WIDTH] + across - 1) // across
        and info[ROWS] == (info[HEIGHT] + down - 1) // down
        and little(data, 22, 4) == info[SCAN]
    )
