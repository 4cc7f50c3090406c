"""JPEG coefficients from any Huffman-coded scan, progressive too, and back into a baseline scan, as compiled loops.

ITU-T T.81, Annexes F and G. Coefficients are quantised and in zigzag order. As in the other kernels a negative result
says that the input is damaged.
"""

from typing import NamedTuple

import numpy as np

from vitcomposer.data.jpeg.huffman_kernels import (
    ENDS_EARLY,
    NO_CODE,
    TOO_FAR,
    WINDOW,
    category,
    end_segment,
    long_code,
    put,
    put_dc,
)
from vitcomposer.data.jpeg.kernel import kernel, part


class Order(NamedTuple):
    """Which block each coded block is, and the component of each block of an MCU."""

    blocks: np.ndarray  # int32 (MCUs, blocks of an MCU)
    component: np.ndarray  # int64 (blocks of an MCU)


@part
def _peek(words, position):
    """The 32 bits from bit ``position`` on."""
    # They may begin in one word, uint32, and end in the next.
    i = position >> 5
    pair = np.uint64(words[i]) << np.uint64(32) | np.uint64(words[i + 1])
    return np.int64((pair << np.uint64(position & 31)) >> np.uint64(32))


@part
def _extend(peek, skip, size):
    """The signed value in the ``size`` bits after ``skip`` of 32 (T.81, Figure F.12)."""
    if size == 0:
        return 0
    value = (peek >> (32 - skip - size)) & ((1 << size) - 1)
    return value if value >> (size - 1) else value - (1 << size) + 1


@part
def _decode_ac(words, position, decoders, row, block, band, run_left):
    """First pass over the coefficients of a band (sequential, or G.1.2.2). Returns the position and EOB run."""
    if run_left > 0:
        return position, run_left - 1
    look = decoders.look[row]
    k = band[0]
    while k <= band[1]:
        peek = _peek(words, position)
        # DECODE of T.81, F.2.2.3: a look-up, and the slow path for codes longer than WINDOW.
        entry = np.int64(look[peek >> (32 - WINDOW)])
        if entry == 0:
            entry = long_code(decoders, row, peek >> 16)
            if entry == 0:
                return NO_CODE, 0
        length, run, size = entry >> 8, (entry >> 4) & 15, entry & 15
        position += length + size
        # EOBn: the band ends here, in this block and in (1 << run) + extra - 1 blocks after it. Run 0 is plain EOB.
        if size == 0 and run < 15:
            extra = (peek >> (32 - length - run)) & ((1 << run) - 1)
            return position + run, (1 << run) + extra - 1
        # Size 0 is ZRL here, 16 zeros: 15 of the run and the step below.
        k += run
        if size:
            if k > band[1]:
                return TOO_FAR, 0
            block[k] = _extend(peek, length, size) << band[2]  # int16 (64,); band[2] is Al, the bits that come later
        k += 1
    return position, 0


@part
def _refine_ac(words, position, decoders, row, block, band, run_left):
    """A further bit of the coefficients of a band (G.1.2.3). Returns the position and EOB run."""
    look = decoders.look[row]
    bit = 1 << band[2]
    k = band[0]
    while k <= band[1]:
        zeros, value = 64, 0  # within a run of blocks nothing new comes, only bits of what is there
        if run_left == 0:
            peek = _peek(words, position)
            entry = np.int64(look[peek >> (32 - WINDOW)])
            if entry == 0:
                entry = long_code(decoders, row, peek >> 16)
                if entry == 0:
                    return NO_CODE, 0
            length, run, size = entry >> 8, (entry >> 4) & 15, entry & 15
            position += length
            if size == 1:  # a new coefficient after ``run`` zeros, and its sign
                value = bit if (peek >> (31 - length)) & 1 else -bit
                position += 1
                zeros = run
            elif size > 1:  # it would have shown in an earlier scan
                return NO_CODE, 0
            elif run < 15:  # EOBn, this block counted in
                run_left = (1 << run) + ((peek >> (32 - length - run)) & ((1 << run) - 1))
                position += run
            else:
                zeros = 15
        while k <= band[1]:
            # Passing by, a coefficient that is not zero takes its correction bit; zeros alone count for the run.
            if block[k]:
                if _peek(words, position) >> 31:
                    block[k] += bit if block[k] > 0 else -bit
                position += 1
            elif zeros == 0:
                break
            else:
                zeros -= 1
            k += 1
        if value:
            if k > band[1]:
                return TOO_FAR, 0
            block[k] = value
        k += 1
    return position, max(run_left - 1, 0)


@kernel
def decode(bits, decoders, order, band, progressive, coefficients):
    """Decode one scan into ``coefficients`` int16 (blocks, 64); ``band`` is first, last, low, high of its header."""
    last = np.zeros(4, np.int64)  # the DC prediction of each component
    position, end, left, segment, run_left = np.int64(0), np.int64(0), 0, -1, 0
    ac = (max(band[0], 1), band[1], band[2])
    for mcu in range(order.blocks.shape[0]):
        if left == 0:
            left = bits.interval
            segment += 1
            # A restart interval begins: predictions and runs of blocks start afresh.
            last[:] = 0
            run_left = 0
            position, end = bits.starts[segment], bits.ends[segment]
        left -= 1
        for i in range(order.component.shape[0]):
            c = order.component[i]
            block = coefficients[order.blocks[mcu, i]]  # int16 (64,), a view
            # DC: a further bit, or the first ones (G.1.2.1). band is Ss, Se, Al, Ah of the scan's header (B.2.3).
            if band[0] == 0 and band[3] > 0:
                block[0] |= (_peek(bits.words, position) >> 31) << band[2]
                position += 1
            elif band[0] == 0:
                peek = _peek(bits.words, position)
                entry = np.int64(decoders.look[decoders.rows[c, 0], peek >> (32 - WINDOW)])
                if entry == 0:
                    entry = long_code(decoders, decoders.rows[c, 0], peek >> 16)
                if entry == 0 or entry & 255 > 15:
                    return NO_CODE
                last[c] += _extend(peek, entry >> 8, entry & 255)
                position += (entry >> 8) + (entry & 255)
                block[0] = last[c] << band[2]
            row = decoders.rows[c, 1]
            if not progressive:
                position, run_left = _decode_ac(bits.words, position, decoders, row, block, ac, 0)
                # A run of blocks belongs to progressive files alone.
                if run_left > 0:
                    return NO_CODE
            elif band[0] > 0 and band[3] == 0:
                position, run_left = _decode_ac(bits.words, position, decoders, row, block, ac, run_left)
            elif band[0] > 0:
                position, run_left = _refine_ac(bits.words, position, decoders, row, block, ac, run_left)
            if position < 0:
                return position
            if position > end:
                return ENDS_EARLY
    return 0


@kernel
def count_symbols(coefficients, order, per_segment, table, counts):
    """Count the symbols of a baseline scan into ``counts`` int64 (2 * tables, 256); ``table`` of each component."""
    last = np.zeros(4, np.int64)  # the DC prediction of each component
    for mcu in range(order.blocks.shape[0]):
        if mcu % per_segment == 0:
            last[:] = 0
        for i in range(order.component.shape[0]):
            c = order.component[i]
            block = coefficients[order.blocks[mcu, i]]
            size = category(block[0] - last[c])
            if size > 15:
                return NO_CODE
            last[c] = block[0]
            # A row for DC, then one for AC, of each table; symbols are those of T.81, F.1.2.1 and F.1.2.2.
            counts[2 * table[c], size] += 1
            run = 0
            for k in range(1, 64):
                if block[k] == 0:
                    run += 1
                    continue
                counts[2 * table[c] + 1, 0xF0] += run >> 4  # ZRL
                size = category(np.int64(block[k]))
                if size > 15:
                    return NO_CODE
                counts[2 * table[c] + 1, (run & 15) << 4 | size] += 1
                run = 0
            if run:
                counts[2 * table[c] + 1, 0] += 1  # EOB
    return 0


@kernel
def encode(coefficients, order, per_segment, table, codes, out, lengths):
    """Write a baseline scan in segments with ``codes`` int64 (2 * tables, 256, 2), which have all that is needed."""
    last = np.zeros(4, np.int64)
    n, begin, acc, pending = 0, 0, np.uint64(0), 0
    total = order.blocks.shape[0]
    for mcu in range(total):
        if mcu % per_segment == 0:
            last[:] = 0
            begin = n
        for i in range(order.component.shape[0]):
            c = order.component[i]
            block = coefficients[order.blocks[mcu, i]]
            ac = codes[2 * table[c] + 1]  # int64 (256, 2): code and length
            n, acc, pending = put_dc(out, n, acc, pending, block[0] - last[c], codes[2 * table[c]])
            last[c] = block[0]
            run = 0
            for k in range(1, 64):
                value = np.int64(block[k])
                if value == 0:
                    run += 1
                    continue
                while run > 15:
                    n, acc, pending = put(out, n, acc, pending, np.uint64(ac[0xF0, 0]), ac[0xF0, 1])  # ZRL
                    run -= 16
                size = category(value)
                symbol = run << 4 | size
                # The low bits of a negative value less 1 (F.1.2.2). Code and value have 31 bits at most.
                if value < 0:
                    value += (1 << size) - 1
                bits = np.uint64(ac[symbol, 0]) << np.uint64(size) | np.uint64(value)
                n, acc, pending = put(out, n, acc, pending, bits, ac[symbol, 1] + size)
                run = 0
            if run:
                n, acc, pending = put(out, n, acc, pending, np.uint64(ac[0, 0]), ac[0, 1])  # EOB
        if mcu + 1 == total or (mcu + 1) % per_segment == 0:
            n = end_segment(out, n, acc, pending, mcu // per_segment, mcu + 1 == total)
            pending = 0
            lengths[mcu // per_segment] = n - 2 - begin
    return n
