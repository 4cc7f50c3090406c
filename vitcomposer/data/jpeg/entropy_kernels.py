"""Compiled entropy decoding of a seekable JPEG's segments: bytes to DCT coefficients.

Segments start on a byte and carry no state over, so two are decoded at a time: each symbol's position depends on the
symbol before it, and a second, independent stream fills the processor's waiting time.
"""

import numpy as np

from vitcomposer.data.jpeg.header_kernels import (
    END,
    FIRST,
    INVALID,
    LONGEST,
    LOOKUP,
    LOOKUP_BITS,
    RAW,
    ZIGZAG,
    entry_of,
)
from vitcomposer.data.jpeg.kernel import part
from vitcomposer.data.jpeg.pixel_kernels import TILE

I64, U64, U32 = np.int64, np.uint64, np.uint32

SLACK = 512  # a block takes at most 64 symbols of 31 bits: how far damaged data can lead past its segment

_PLACE = ZIGZAG * TILE  # int64 (64,): offset in a tile (64, TILE) of the coefficient at a zigzag position
# EXTEND of ITU-T T.81, figure F.12, at [2 * size + first bit]. A table, because the compiler would make the sign a
# branch, which is wrong every other time.
_EXTEND = np.array([(1 - (1 << size), 0)[bit] for size in range(16) for bit in (0, 1)], np.int64)


@part
def _word(data, i):
    """Eight bytes, big-endian; LLVM makes it one load."""
    i = U64(i)
    high = U64(data[i]) << U64(56) | U64(data[i + U64(1)]) << U64(48) | U64(data[i + U64(2)]) << U64(40)
    middle = U64(data[i + U64(3)]) << U64(32) | U64(data[i + U64(4)]) << U64(24) | U64(data[i + U64(5)]) << U64(16)
    return high | middle | U64(data[i + U64(6)]) << U64(8) | U64(data[i + U64(7)])


@part
def _peek(clean, position):
    """At least 57 bits from a bit position on, first bit highest."""
    return _word(clean, position >> 3) << U64(position & 7)


@part
def _long_code(word, table, raw, limits):
    # DECODE of T.81, figure F.16: the first length whose highest code is no lower. limits int64 (8, 2, LONGEST) has -1
    # for a length without codes. & 255 keeps the read inside the table whatever the bits are.
    for bits in range(LOOKUP_BITS + 1, LONGEST):
        code = I64(word >> U64(64 - bits))
        if code <= limits[table, 0, bits]:
            return entry_of(I64(raw[table * RAW + 16 + ((code + limits[table, 1, bits]) & 255)]), bits, table)
    return U32(INVALID << 24)


@part
def _value(word, entry):
    # RECEIVE (T.81, F.2.2.4) of the bits behind the code, then EXTEND. Two shifts, because size may be 0 and one shift
    # by 64 is not defined.
    rest = word << U64((entry >> U32(8)) & U32(255))
    size = U64((entry >> U32(16)) & U32(255))
    return I64((rest >> U64(1)) >> (U64(63) - size)) + _EXTEND[size << U64(1) | rest >> U64(63)]


@part
def _unstuff(data, i, end, clean, o):
    """Copy a segment, which a marker ends, without its stuffed zeros; the end in clean, or -1 for a marker inside."""
    safe = min(end, len(data) - 8)  # what _word can read
    while i < safe:
        # Eight bytes at once if none is 0xFF, by the search for a zero byte (Warren, Hacker's Delight, 6-1) in the
        # complement. data[end] is the 0xFF of a marker, so such a group never passes the end.
        flipped = ~_word(data, i)
        if (flipped - U64(0x0101010101010101)) & ~flipped & U64(0x8080808080808080) == U64(0):
            for n in range(8):
                clean[U64(o + n)] = data[U64(i + n)]
            i += 8
            o += 8
            continue
        i, o = _unstuff_bytes(data, i, min(i + 8, end), end, clean, o)
        if i < 0:
            return I64(-1)
    i, o = _unstuff_bytes(data, i, end, end, clean, o)
    return I64(o) if i >= 0 else I64(-1)


@part
def _unstuff_bytes(data, i, stop, end, clean, o):  # noqa: PLR0913, PLR0917
    while i < stop:
        byte = data[U64(i)]
        clean[U64(o)] = byte
        i += 1
        o += 1
        if byte == 0xFF:
            # T.81, B.1.1.5: a zero is stuffed after each 0xFF of the coded data; anything else makes it a marker.
            if i >= end or data[U64(i)] != 0:
                return I64(-1), I64(o)
            i += 1
    return I64(i), I64(o)


@part
def decode_segments(clean, spans, blocks, kinds, slots, bases, tables, last, coef):  # noqa: PLR0913, PLR0917
    """Two streams, A and B, take segment after segment until none is left; then one finishes alone.

    The three loops are one text: a function for it would keep the streams' state in memory.

    Args:
        spans: int64 (2 * n), first byte and end in clean of every segment.
        blocks: (blocks of a segment, blocks of them all).
        kinds: The component of each block; slots the place of its first coefficient.
        bases: The DC and then the AC table of each component.
        last: int64 (6,), the DC predictions of both streams.
    """
    lookup, raw, limits = tables
    per_segment, total = blocks
    count, following = len(spans) // 2, 2
    last[:] = 0
    last_a, last_b = last[:3], last[3:]  # int64 (3,) each
    # Of each stream: its segment, block, the block to stop at, and where in coef, int16 (tiles * 64 * TILE), the block
    # goes; the zigzag position reached, the bit of clean that is read next, and where in lookup its table begins.
    segment_a, block_a, stop_a, out_a = 0, 0, min(per_segment, total), slots[0]
    step_a, place_a, table_a = 0, spans[0] * 8, U64(bases[0] * LOOKUP)
    segment_b, block_b, stop_b, out_b = segment_a, block_a, stop_a, out_a
    step_b, place_b, table_b = step_a, place_a, table_a
    if count > 1:
        segment_b, block_b, stop_b, out_b = 1, per_segment, min(2 * per_segment, total), slots[per_segment]
        place_b = spans[2] * 8

    while count > 1:
        # Stream A, one symbol: DECODE (T.81, F.2.2.3) of up to LOOKUP_BITS bits by one look-up.
        word = _peek(clean, place_a)
        entry = lookup[table_a + (word >> U64(64 - LOOKUP_BITS))]
        if entry == 0:
            entry = _long_code(word, I64(table_a >> U64(LOOKUP_BITS)), raw, limits)
        step_a += I64(entry >> U32(24))
        place_a += I64(entry & U32(255))
        # A run of 16 zeros (ZRL) writes the last of them, a zero, which saves a branch.
        if step_a < 63:
            coef[U64(out_a + _PLACE[U64(step_a)])] = _value(word, entry)
        # A DC difference (F.2.2.1). The AC table of the component follows.
        elif step_a == FIRST:
            component = kinds[U64(block_a)]
            value = last_a[U64(component)] + _value(word, entry)
            last_a[U64(component)] = value
            coef[U64(out_a)] = value
            step_a, table_a = 0, U64(bases[U64(3 + component)] * LOOKUP)
        else:
            if step_a == 63:
                coef[U64(out_a + 63 * TILE)] = _value(word, entry)
            elif step_a < END or step_a > FIRST:  # no such code, or a run beyond the 63rd coefficient
                return False
            block_a += 1
            # Looked at once a block, so that damage reads at most SLACK bytes too far.
            if place_a > spans[U64(2 * segment_a + 1)] * 8:
                return False
            if block_a == stop_a:
                # A whole segment ends in its last byte. Only the last one may stop earlier, where the box ends.
                if block_a % per_segment == 0 and (place_a + 7) >> 3 != spans[U64(2 * segment_a + 1)]:
                    return False
                # No segment is left: A takes over the state of B, to finish it below.
                if following == count:
                    segment_a, block_a, stop_a, out_a = segment_b, block_b, stop_b, out_b
                    step_a, place_a, table_a = step_b, place_b, table_b
                    for component in range(3):
                        last_a[component] = last_b[component]
                    break
                segment_a, following = following, following + 1
                block_a = segment_a * per_segment
                stop_a = min(block_a + per_segment, total)
                place_a = spans[U64(2 * segment_a)] * 8
                last_a[:] = 0
            step_a, out_a = 0, slots[U64(block_a)]
            table_a = U64(bases[U64(kinds[U64(block_a)])] * LOOKUP)

        # Stream B, one symbol, likewise.
        word = _peek(clean, place_b)
        entry = lookup[table_b + (word >> U64(64 - LOOKUP_BITS))]
        if entry == 0:
            entry = _long_code(word, I64(table_b >> U64(LOOKUP_BITS)), raw, limits)
        step_b += I64(entry >> U32(24))
        place_b += I64(entry & U32(255))
        if step_b < 63:
            coef[U64(out_b + _PLACE[U64(step_b)])] = _value(word, entry)
        elif step_b == FIRST:
            component = kinds[U64(block_b)]
            value = last_b[U64(component)] + _value(word, entry)
            last_b[U64(component)] = value
            coef[U64(out_b)] = value
            step_b, table_b = 0, U64(bases[U64(3 + component)] * LOOKUP)
        else:
            if step_b == 63:
                coef[U64(out_b + 63 * TILE)] = _value(word, entry)
            elif step_b < END or step_b > FIRST:
                return False
            block_b += 1
            if place_b > spans[U64(2 * segment_b + 1)] * 8:
                return False
            if block_b == stop_b:
                if block_b % per_segment == 0 and (place_b + 7) >> 3 != spans[U64(2 * segment_b + 1)]:
                    return False
                if following == count:
                    break
                segment_b, following = following, following + 1
                block_b = segment_b * per_segment
                stop_b = min(block_b + per_segment, total)
                place_b = spans[U64(2 * segment_b)] * 8
                last_b[:] = 0
            step_b, out_b = 0, slots[U64(block_b)]
            table_b = U64(bases[U64(kinds[U64(block_b)])] * LOOKUP)

    # The last segment, alone.
    while True:
        word = _peek(clean, place_a)
        entry = lookup[table_a + (word >> U64(64 - LOOKUP_BITS))]
        if entry == 0:
            entry = _long_code(word, I64(table_a >> U64(LOOKUP_BITS)), raw, limits)
        step_a += I64(entry >> U32(24))
        place_a += I64(entry & U32(255))
        if step_a < 63:
            coef[U64(out_a + _PLACE[U64(step_a)])] = _value(word, entry)
        elif step_a == FIRST:
            component = kinds[U64(block_a)]
            value = last_a[U64(component)] + _value(word, entry)
            last_a[U64(component)] = value
            coef[U64(out_a)] = value
            step_a, table_a = 0, U64(bases[U64(3 + component)] * LOOKUP)
        else:
            if step_a == 63:
                coef[U64(out_a + 63 * TILE)] = _value(word, entry)
            elif step_a < END or step_a > FIRST:
                return False
            block_a += 1
            if place_a > spans[U64(2 * segment_a + 1)] * 8:
                return False
            if block_a == stop_a:
                return block_a % per_segment != 0 or (place_a + 7) >> 3 == spans[U64(2 * segment_a + 1)]
            step_a, out_a = 0, slots[U64(block_a)]
            table_a = U64(bases[U64(kinds[U64(block_a)])] * LOOKUP)


@part
def gather_band(data, first, starts, per_row, clean, spans):  # noqa: PLR0913, PLR0917
    """The segments of one MCU row, first and following, without stuffing; False if a marker is not where it belongs.

    Args:
        starts: Offset in data of each of these segments and of the one after the last.
        per_row: Segments of the whole image, to tell the last one, which EOI ends.
    """
    o = 0
    for n in range(len(spans) // 2):
        # Markers RST0 to RST7 follow the segments in turn, EOI the image's last one (T.81, B.2.1).
        start, end = starts[n], starts[n + 1] - 2
        marker = 0xD9 if first + n + 1 == per_row else 0xD0 + ((first + n) & 7)
        if end <= start or data[U64(end)] != 0xFF or data[U64(end + 1)] != marker:
            return False
        spans[2 * n] = o  # bytes of clean
        o = _unstuff(data, start, end, clean, o)
        if o < 0:
            return False
        spans[2 * n + 1] = o
    return True
