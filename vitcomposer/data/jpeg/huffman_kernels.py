"""The entropy coding of JPEG (ITU-T T.81, Annexes F and G) as compiled loops over bits.

Coefficients are quantised and in zigzag order throughout. Input bytes may be anything: a kernel that meets a code or a
length that cannot be returns a negative number, and reads at most PADDING bytes past the data, which the caller adds.
"""

from typing import NamedTuple

import numpy as np

from vitcomposer.data.jpeg.kernel import kernel, part

WINDOW = 12  # bits that one look-up sees; longer codes take a slow path
PADDING = 512  # bytes: the most that one block can take, 64 x 31 bits, and two words
NO_CODE, ENDS_EARLY, TOO_FAR = -1, -2, -3  # a bit pattern without meaning; no bits left; a coefficient beyond the 63rd

_SHIFT = np.uint64(64 - WINDOW)
_ONE = np.uint64(1)


class Bits(NamedTuple):
    """Entropy-coded data without stuffing: big-endian words, and where in them each restart segment lies."""

    words: np.ndarray  # uint32
    starts: np.ndarray  # int64, bits, multiples of 32
    ends: np.ndarray  # int64, bits
    interval: int  # MCUs a restart segment


class Decoders(NamedTuple):
    """Tables of Huffman decoding, one row a table, and the row of each component's DC and AC table."""

    look: np.ndarray  # uint16 (tables, 2**WINDOW): length << 8 | symbol, 0 where the code is longer
    limit: np.ndarray  # int32 (tables, 17): the first 16-bit pattern above all codes of this length
    delta: np.ndarray  # int32 (tables, 17): from a code of this length to its place among the symbols
    symbols: np.ndarray  # uint8 (tables, 256)
    skip: np.ndarray  # uint16 (tables, 2**WINDOW): steps << 6 | end of block << 5 | bits, of all codes in the window
    rows: np.ndarray  # int64 (components, 2)


@kernel
def fill_decoder(counts, symbols, look, limit, delta, skip):
    """Fill one row of Decoders. The caller has checked that the codes fit into their lengths."""
    code, place = 0, 0
    for length in range(1, 17):
        # T.81, C.2: codes of one length follow each other, and the next length goes on at twice the next code.
        code <<= 1
        delta[length] = place - code
        for _ in range(counts[length - 1]):
            if length <= WINDOW:
                first = code << (WINDOW - length)
                for i in range(first, first + (1 << (WINDOW - length))):
                    look[i] = length << 8 | symbols[place]
            code += 1
            place += 1
        limit[length] = code << (16 - length)
    for i in range(1 << WINDOW):
        # Whole codes with their values, as many as the window holds: walk needs none of the values of AC coefficients.
        bits, steps, end = 0, 0, 0
        while bits < WINDOW:
            entry = np.int64(look[(i << bits) & ((1 << WINDOW) - 1)])
            length, run, size = entry >> 8, (entry >> 4) & 15, entry & 15
            if entry == 0 or bits + length > WINDOW or steps + run + 1 > 63:
                break
            bits += length
            if size == 0 and run != 15:
                steps += 1  # so that "steps fit into the block" also says that an end of block may stand here
                end = 32
                break
            bits += size
            steps += run + 1
        skip[i] = steps << 6 | end | bits


@kernel
def unstuff(data, start, out, starts, ends):
    """Take the stuffing out of entropy-coded data from byte ``start`` on.

    Returns the number of restart segments (-1: their markers are out of turn or too many) and the byte of the marker
    that ends the data (the length of the data if there is none).
    """
    size, n, segments, i = data.shape[0], 0, 0, start
    starts[0] = 0
    while i < size:
        byte = data[i]
        # T.81, B.1.1.5 and B.1.1.2: 0xFF is data if a zero follows, else a marker, perhaps after fill bytes.
        if byte != 255:
            out[n] = byte
            n += 1
            i += 1
            continue
        marker = i
        while i < size and data[i] == 255:
            i += 1
        if i == size:
            break
        code = data[i]
        if code == 0:
            out[n] = 255
            n += 1
            i += 1
        elif 208 <= code <= 215:  # RST0 to RST7
            if code - 208 != segments & 7 or segments + 1 == starts.shape[0]:
                return -1, marker
            ends[segments] = 8 * n
            n = (n + 3) & ~3  # segments begin at a word
            segments += 1
            starts[segments] = 8 * n
            i += 1
        else:
            ends[segments] = 8 * n
            return segments + 1, marker
    ends[segments] = 8 * n
    return segments + 1, size


@part
def long_code(decoders, row, peek):
    """Length << 8 | symbol of the code at the top of 16 bits, 0 if there is none."""
    for length in range(1, 17):
        if peek < decoders.limit[row, length]:
            place = (peek >> (16 - length)) + decoders.delta[row, length]
            return length << 8 | np.int64(decoders.symbols[row, place & 255])
    return 0


@kernel
def walk(bits, decoders, component, marks):
    """Go through a baseline scan and note where every MCU can be cut.

    ``marks`` int32 (MCUs, 4 * components + 1) takes, of the first block of each component, begin and end of the DC
    difference in bits and the DC value, then the DC value of the component's last block; and the end of the MCU.
    """
    words = bits.words
    count = decoders.rows.shape[0]
    last = np.zeros(4, np.int64)  # predictor
    # The next ``have`` bits are at the top of acc; the bit that is read next is 32 * word - have.
    acc, have, word, end = np.uint64(0), 0, 0, np.int64(0)
    left, segment = 0, -1
    for mcu in range(marks.shape[0]):
        if left == 0:
            left = bits.interval
            segment += 1
            last[:] = 0
            word = bits.starts[segment] >> 5
            end = bits.ends[segment]
            acc, have = np.uint64(0), 0
        left -= 1
        seen = 0
        for i in range(component.shape[0]):
            c = component[i]
            if have < 32:
                acc |= np.uint64(words[word]) << np.uint64(32 - have)
                word += 1
                have += 32
            entry = np.int64(decoders.look[decoders.rows[c, 0], np.int64(acc >> _SHIFT)])
            if entry == 0:
                entry = long_code(decoders, decoders.rows[c, 0], np.int64(acc >> np.uint64(48)))
            length, size = entry >> 8, entry & 255
            if entry == 0 or size > 15:
                return NO_CODE
            if size:
                # RECEIVE and EXTEND (T.81, F.2.2.1 and figure F.12).
                value = np.int64((acc << np.uint64(length)) >> np.uint64(64 - size))
                last[c] += value if value >> (size - 1) else value - (1 << size) + 1
            if not (seen >> c) & 1:
                seen |= 1 << c
                marks[mcu, 4 * c] = 32 * word - have
                marks[mcu, 4 * c + 1] = 32 * word - have + length + size
                marks[mcu, 4 * c + 2] = last[c]
            marks[mcu, 4 * c + 3] = last[c]
            acc <<= np.uint64(length + size)
            have -= length + size
            row = decoders.rows[c, 1]
            k = 1
            # AC coefficients: only where they end matters.
            while k < 64:
                if have < 32:
                    acc |= np.uint64(words[word]) << np.uint64(32 - have)
                    word += 1
                    have += 32
                entry = np.int64(decoders.skip[row, np.int64(acc >> _SHIFT)])
                # At least one whole code is in the window, and all of them fit into the block.
                if entry > 63 and k + (entry >> 6) <= 64:
                    acc <<= np.uint64(entry & 31)
                    have -= entry & 31
                    k += entry >> 6
                    if entry & 32:
                        break
                    continue
                entry = np.int64(decoders.look[row, np.int64(acc >> _SHIFT)])
                if entry == 0:
                    entry = long_code(decoders, row, np.int64(acc >> np.uint64(48)))
                    if entry == 0:
                        return NO_CODE
                length, size = (entry >> 8) + (entry & 15), entry & 15
                acc <<= np.uint64(length)
                have -= length
                if size == 0 and (entry >> 4) & 15 != 15:
                    break
                k += ((entry >> 4) & 15) + 1
            if k > 64:
                return TOO_FAR
            if 32 * word - have > end:
                return ENDS_EARLY
        marks[mcu, 4 * count] = 32 * word - have
    return 0


@part
def put_word(out, n, word):
    """Append 32 bits with 0x00 stuffed after every 0xFF. Returns the new length."""
    inverse = word ^ np.uint64(0xFFFFFFFF)
    # Is one of the four bytes 0xFF? The search for a zero byte (Warren, Hacker's Delight, 6-1), in the complement.
    if (inverse - np.uint64(0x01010101)) & word & np.uint64(0x80808080):
        for shift in range(24, -8, -8):
            byte = np.uint8(word >> np.uint64(shift))
            out[n] = byte
            n += 1
            if byte == 255:
                out[n] = 0
                n += 1
        return n
    out[n] = np.uint8(word >> np.uint64(24))
    out[n + 1] = np.uint8(word >> np.uint64(16))
    out[n + 2] = np.uint8(word >> np.uint64(8))
    out[n + 3] = np.uint8(word)
    return n + 4


@part
def put(out, n, acc, pending, value, count):
    """Append ``count`` <= 32 bits; whole words go out."""
    acc = acc << np.uint64(count) | value  # the last ``pending`` bits of it are not written yet
    pending += count
    if pending >= 32:
        pending -= 32
        n = put_word(out, n, (acc >> np.uint64(pending)) & np.uint64(0xFFFFFFFF))
    return n, acc, pending


@part
def end_segment(out, n, acc, pending, number, final):
    """Fill the last byte with 1-bits and append RSTn or, after the last segment, EOI. Returns the new length."""
    while pending > 0:
        if pending < 8:
            acc = acc << np.uint64(8 - pending) | ((_ONE << np.uint64(8 - pending)) - _ONE)
            pending = 8
        byte = (acc >> np.uint64(pending - 8)) & np.uint64(255)
        pending -= 8
        out[n] = byte
        n += 1
        if byte == np.uint64(255):
            out[n] = 0
            n += 1
    out[n] = 255
    out[n + 1] = 217 if final else 208 + (number & 7)
    return n + 2


@part
def category(value):
    """Bits of the magnitude: SSSS of T.81, Tables F.1 and F.2."""
    value = abs(value)
    size = 0
    while value:
        value >>= 1
        size += 1
    return size


@part
def put_dc(out, n, acc, pending, difference, codes):
    """Append a DC difference; ``codes`` int64 (256, 2) holds code and length. ``n`` is -1 if there is no code."""
    size = category(difference)
    if size > 15 or codes[size, 1] == 0:
        return -1, acc, pending
    n, acc, pending = put(out, n, acc, pending, np.uint64(codes[size, 0]), codes[size, 1])
    value = difference if difference >= 0 else difference + (1 << size) - 1
    return put(out, n, acc, pending, np.uint64(value), size)


@kernel
def splice(bits, marks, per_segment, codes, out, lengths):
    """Cut a walked scan into segments of ``per_segment`` MCUs: new DC differences where the predictor is reset.

    ``codes`` int64 (components, 256, 2) are those of the DC tables. Returns the bytes written to ``out``, or NO_CODE
    where a table lacks the code of a new difference.
    """
    words = bits.words
    count = codes.shape[0]
    n, begin, acc, pending = 0, 0, np.uint64(0), 0
    total = marks.shape[0]
    for mcu in range(total):
        opens = mcu % per_segment == 0
        if opens:
            begin = n
        changed = opens or mcu % bits.interval == 0
        # Where the prediction stays, the MCU is copied in one piece; else each component's first DC difference is
        # replaced and what lies between those differences is copied.
        for c in range(count if changed else 1):
            position = np.int64(marks[mcu, 4 * c])
            if changed:
                before = np.int64(0) if opens else np.int64(marks[mcu - 1, 4 * c + 3])
                difference = marks[mcu, 4 * c + 2] - before
                n, acc, pending = put_dc(out, n, acc, pending, difference, codes[c])
                if n < 0:
                    return NO_CODE
                position = np.int64(marks[mcu, 4 * c + 1])
            stop = np.int64(marks[mcu, 4 * (c + 1)] if changed else marks[mcu, 4 * count])
            shift = np.uint64(position & 31)
            i = position >> 5
            for _ in range((stop - position) >> 5):
                # 32 bits that begin anywhere lie in two words.
                pair = np.uint64(words[i]) << np.uint64(32) | np.uint64(words[i + 1])
                acc = acc << np.uint64(32) | (pair << shift) >> np.uint64(32)
                n = put_word(out, n, (acc >> np.uint64(pending)) & np.uint64(0xFFFFFFFF))
                i += 1
            size = (stop - position) & 31
            if size:
                pair = np.uint64(words[i]) << np.uint64(32) | np.uint64(words[i + 1])
                n, acc, pending = put(out, n, acc, pending, (pair << shift) >> np.uint64(64 - size), size)
        if mcu + 1 == total or (mcu + 1) % per_segment == 0:
            n = end_segment(out, n, acc, pending, mcu // per_segment, mcu + 1 == total)
            pending = 0
            lengths[mcu // per_segment] = n - 2 - begin
    return n
