"""Makes JPEGs seekable: the same coefficients in short restart segments, with an index of their lengths in front.

The file stays an ordinary baseline JPEG that every decoder turns into the same pixels. What it gains is that a reader
finds the segments that a box touches without decoding those before it. It is written losslessly: the bits of the
coefficients are copied and only the DC differences at the begin of segments change; where the file's Huffman tables
lack a code for one of these, or the file is progressive or has several scans, all coefficients are decoded and coded
again with tables of their own statistics.
"""

import heapq
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg

from vitcomposer.data.jpeg.coefficient_kernels import Order, count_symbols, decode, encode
from vitcomposer.data.jpeg.huffman_kernels import (
    ENDS_EARLY,
    NO_CODE,
    PADDING,
    TOO_FAR,
    WINDOW,
    Bits,
    Decoders,
    fill_decoder,
    splice,
    unstuff,
    walk,
)
from vitcomposer.data.jpeg.markers import (
    APP11,
    DHT,
    DQT,
    DRI,
    EOI,
    INDEX_HEAD,
    INDEX_MAGIC,
    NO_INDEX,
    SOF0,
    SOF1,
    SOF2,
    SOS,
    Component,
    HuffmanTable,
    Markers,
    Scan,
    Segment,
    parse_markers,
    parse_scans,
    read_index,
    scan_end,
)
from vitcomposer.data.jpeg.region import decodes_to

_MAX_SEGMENTS = (65533 - 2 - INDEX_HEAD.size) // 2
_MAX_PIXELS = 1 << 27  # the coefficients of a progressive file of that size take 800 MB
_MIN_SEGMENT = 96  # bytes on average: a segment costs about 5 bytes, and the file must not grow by more than 6 %
_LUMA_SAMPLING = ((1, 1), (2, 1), (1, 2), (2, 2))
_DAMAGE = {
    NO_CODE: "the entropy-coded data holds a code without meaning",
    ENDS_EARLY: "the entropy-coded data ends early",
    TOO_FAR: "a block holds more than 64 coefficients",
}


_NO_TABLE = HuffmanTable(bytes(16), b"")


class Seekable(NamedTuple):
    """A file and how it was made: ``data`` is the input itself where nothing was done.

    ``how`` is "copied" (coefficient bits as they were), "recoded" (coded again with other Huffman tables), "already"
    or "unchanged"; then ``reason`` says in a few words why the file cannot be seekable.
    """

    data: bytes
    how: Literal["copied", "recoded", "already", "unchanged"]
    reason: str = ""


def make_seekable(jpeg: bytes) -> Seekable:
    """Rewrite a JPEG so that it can be decoded in parts. Markers stay, except restart intervals; EXIF too.

    Raises:
        ValueError: The file is damaged, or no JPEG.
    """
    markers = parse_markers(jpeg)
    if markers.index is not None and _index_holds(jpeg):
        return Seekable(jpeg, "already")
    reason = unsupported(markers)
    if reason:
        return Seekable(jpeg, "unchanged", reason)
    if markers.height * markers.width > _MAX_PIXELS:
        return Seekable(jpeg, "unchanged", "too large")
    whole = markers.sof != SOF2 and len(markers.scan.components) == len(markers.components)
    made = _copy(jpeg, markers) if whole else _recode(jpeg)
    return made or Seekable(jpeg, "unchanged", "too many bytes for one index")


def verify(pixels: np.ndarray, rewritten: bytes) -> bool:
    """Whether a seekable file gives these pixels in libjpeg-turbo, without a complaint, and in the region decoder.

    Args:
        pixels: Pillow's of the file that was rewritten, uint8 (height, width, 3), or (height, width) of a grey one.
    """
    try:
        whole = simplejpeg.decode_jpeg(rewritten, colorspace="RGB" if pixels.ndim == 3 else "GRAY")
    except ValueError:
        return False
    return np.array_equal(whole.reshape(pixels.shape), pixels) and decodes_to(rewritten, pixels)


def compile_kernels() -> None:
    """Compile all that :func:`make_seekable` and :func:`verify` may need: processes started later find it on disk."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    jpeg = simplejpeg.encode_jpeg(pixels)
    verify(pixels, make_seekable(jpeg).data)
    _recode(jpeg)


def unsupported(markers: Markers) -> str:
    """The kind of JPEG in a few words if it is one that cannot be seekable, else ""."""
    components = markers.components
    if markers.sof not in (SOF0, SOF1, SOF2):
        return {0xC3: "lossless", 0xC9: "arithmetic", 0xCA: "arithmetic"}.get(markers.sof, "hierarchical or lossless")
    if markers.precision != 8:
        return f"{markers.precision}-bit"
    if len(components) == 4:
        return "CMYK"
    if len(components) not in (1, 3):
        return f"{len(components)} components"
    if len(components) == 3 and (markers.adobe_transform not in (None, 1) or _named_rgb(components)):
        return "RGB"
    sampling = [component[1:3] for component in components]
    if len(components) == 3 and (sampling[0] not in _LUMA_SAMPLING or sampling[1:] != [(1, 1), (1, 1)]):
        return "odd chroma sampling"
    return ""


def _named_rgb(components: tuple[Component, ...]) -> bool:
    return bytes(component.id for component in components) == b"RGB"


def _index_holds(data: bytes) -> bool:
    """Whether an index fits the markers in the file: another program may have kept it and changed the rest."""
    index, markers = read_index(data), parse_markers(data)
    if index is None or (index.rows, index.segments_per_row * index.mcus_per_segment) != markers.mcu_grid:
        return False
    if index.scan != markers.scan.start or index.mcus_per_segment != markers.scan.restart_interval:
        return False
    ends = np.cumsum(np.array(index.lengths) + 2) + index.scan - 2  # (segments,): where each one's marker must stand
    found = np.frombuffer(data, np.uint8)
    expected = 0xD0 + np.arange(len(ends)) % 8
    expected[-1] = 0xD9
    return bool((found[ends] == 0xFF).all() and (found[ends + 1] == expected).all())


def _segment_sizes(columns: int, rows: int, coded_bytes: int) -> list[int]:
    """MCUs a segment, the wanted number first: divisors of a row, short but not so short that the file swells."""
    divisors = [n for n in range(1, columns + 1) if columns % n == 0]
    start = min(divisors, key=lambda n: (abs(n - 2), n))
    fitting = [n for n in divisors if n >= start and rows * columns // n <= _MAX_SEGMENTS]
    roomy = [n for n in fitting if coded_bytes * n >= _MIN_SEGMENT * rows * columns]
    return roomy or fitting[-1:]


def _copy(jpeg: bytes, markers: Markers) -> Seekable | None:
    """The fast way: copy the bits of a baseline scan. None if no number of MCUs gives segments below 64 KB."""
    rows, columns = markers.mcu_grid
    scan = markers.scan
    order = _order(markers, scan)
    if order.blocks.size > 4 * len(jpeg):  # a block takes two bits or more
        raise ValueError(_DAMAGE[ENDS_EARLY])
    bits, end = _read_bits(jpeg, scan, rows * columns)
    if _marker_at(jpeg, end) != EOI:
        return Seekable(jpeg, "unchanged", "markers after the image")
    marks = np.empty((rows * columns, 4 * len(scan.components) + 1), np.int32)  # see walk
    _check(walk(bits, _decoders(scan), order.component, marks))
    # int64 (components, 256, 2): code and length of each DC symbol.
    codes = np.stack([_codes(scan.huffman.get((0, dc), _NO_TABLE)) for _, dc, _ in scan.components])
    for size in _segment_sizes(columns, rows, end - scan.start):
        lengths = np.empty(rows * columns // size, np.int64)  # bytes of each segment
        differences = len(scan.components) * (len(lengths) + len(bits.starts))  # each may take 31 bits more than it did
        out = np.empty(2 * (end - scan.start + 4 * differences + 2 * len(lengths)) + PADDING, np.uint8)
        written = splice(bits, marks, size, codes, out, lengths)
        if written == NO_CODE:  # the tables were made for this image alone
            return _recode(jpeg)
        if lengths.max() < 65536:
            kept = [_piece(jpeg, segment) for segment in markers.segments if not _replaced(jpeg, segment, {DRI})]
            header = b"".join([*kept[:-1], _segment(DRI, size.to_bytes(2, "big")), kept[-1]])
            return Seekable(_assemble(header, out[:written], lengths, size, columns // size), "copied")
    return None


def _recode(jpeg: bytes) -> Seekable | None:
    """The general way: decode the coefficients of all scans, and code them with tables of their own statistics."""
    markers, scans, between = parse_scans(jpeg)
    rows, columns = markers.mcu_grid
    tables: dict[int, bytes] = {}
    for segment in (*markers.segments, *between):
        if segment.marker == DQT and not _merge(tables, _piece(jpeg, segment)[4:]):
            return Seekable(jpeg, "unchanged", "quantisation tables change between scans")
    every = Scan(tuple((i, min(i, 1), min(i, 1)) for i in range(len(markers.components))), 0, 63, 0, 0, 0, {}, 0)
    order = _order(markers, every)
    coefficients = _read_coefficients(jpeg, markers, scans, order.blocks.size)  # int16 (blocks, 64)
    choice = np.array([dc for _, dc, _ in every.components])  # (components,): 0 for luma's tables, 1 for chroma's
    coded = sum(scan_end(jpeg, scan.start) - scan.start for scan in scans)
    for size in _segment_sizes(columns, rows, coded):
        counts = np.zeros((2 * (choice.max() + 1), 256), np.int64)  # DC, AC of each choice
        _check(count_symbols(coefficients, order, size, choice, counts))
        huffman = [_optimal_table(row) for row in counts]
        codes = np.stack([_codes(table) for table in huffman])  # int64 (2 or 4, 256, 2)
        bits = int((counts * (codes[:, :, 1] + np.arange(256) % 16)).sum())
        lengths = np.empty(rows * columns // size, np.int64)
        out = np.empty(bits // 4 + 4 * len(lengths) + PADDING, np.uint8)
        written = encode(coefficients, order, size, choice, codes, out, lengths)
        if lengths.max() < 65536:
            kept = [_piece(jpeg, s) for s in (*markers.segments, *between) if not _replaced(jpeg, s, {DHT, DRI, SOS})]
            header = _baseline_header(kept, markers, huffman, size)
            return Seekable(_assemble(header, out[:written], lengths, size, columns // size), "recoded")
    return None


def _merge(tables: dict[int, bytes], payload: bytes) -> bool:
    """Add the quantisation tables of a segment; False if one changes."""
    while payload:
        size, number = 129 if payload[0] >> 4 else 65, payload[0] & 15
        if tables.setdefault(number, payload[:size]) != payload[:size]:
            return False
        payload = payload[size:]
    return True


def _baseline_header(kept: list[bytes], markers: Markers, huffman: list[HuffmanTable], size: int) -> bytes:
    sof = markers.sof
    if sof == SOF2:  # baseline has quantisation tables of 8 bits only
        sof = SOF1 if any(len(table) > 64 for table in markers.quantisation.values()) else SOF0
    kept = [bytes([0xFF, sof]) + piece[2:] if piece[1] == markers.sof else piece for piece in kept]
    names = [component.id for component in markers.components]
    selectors = b"".join(bytes([name, 0x11 * min(i, 1)]) for i, name in enumerate(names))
    return b"".join(
        [
            *kept,
            *(_segment(DHT, bytes([i % 2 << 4 | i // 2]) + t.counts + t.symbols) for i, t in enumerate(huffman)),
            _segment(DRI, size.to_bytes(2, "big")),
            _segment(SOS, bytes([len(names)]) + selectors + b"\x00\x3f\x00"),
        ]
    )


def _assemble(header: bytes, coded: np.ndarray, lengths: np.ndarray, size: int, columns: int) -> bytes:
    index_bytes = 4 + INDEX_HEAD.size + 2 * len(lengths)
    scan = 2 + index_bytes + len(header)
    head = INDEX_HEAD.pack(INDEX_MAGIC, size, columns, len(lengths) // columns, 0, scan)
    return b"".join([b"\xff\xd8", _segment(APP11, head + lengths.astype("<u2").tobytes()), header, coded.tobytes()])


def _segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def _piece(jpeg: bytes, segment: Segment) -> bytes:
    """The bytes of a marker segment without the fill bytes that may stand before a marker."""
    return b"\xff" + jpeg[segment.start : segment.stop].lstrip(b"\xff")


def _marker_at(jpeg: bytes, position: int) -> int:
    while position < len(jpeg) and jpeg[position] == 0xFF:
        position += 1
    if position == len(jpeg):
        raise ValueError("the file ends inside its entropy-coded data")
    return jpeg[position]


def _replaced(jpeg: bytes, segment: Segment, markers: set[int]) -> bool:
    old_index = segment.marker == APP11 and _piece(jpeg, segment)[4:].startswith((INDEX_MAGIC, NO_INDEX))
    return old_index or segment.marker in markers


def _check(result: Any) -> None:
    if result < 0:
        raise ValueError(_DAMAGE[result])


def _read_bits(jpeg: bytes, scan: Scan, mcus: int) -> tuple[Bits, int]:
    """The data of a scan of so many MCUs, and the byte after it."""
    interval = scan.restart_interval or mcus
    segments = -(-mcus // interval)
    data = np.frombuffer(jpeg, np.uint8)
    # one more segment: some encoders end the scan with a restart marker
    starts, ends = np.zeros(segments + 1, np.int64), np.zeros(segments + 1, np.int64)
    room = len(jpeg) - scan.start + segments + 1 + PADDING
    plain = np.zeros(-(-room // 4) * 4, np.uint8)  # without stuffing, a whole number of words
    found, end = unstuff(data, scan.start, plain, starts, ends)
    if found < segments:
        raise ValueError("the restart markers are not those that the header announces")
    return Bits(plain.view(">u4").astype(np.uint32), starts, ends, interval), end


def _read_coefficients(jpeg: bytes, markers: Markers, scans: list[Scan], blocks: int) -> np.ndarray:
    coefficients = np.zeros((blocks, 64), np.int16)  # zigzag order
    for scan in scans:
        progressive = markers.sof == SOF2
        if progressive and (scan.last > 0 if scan.first == 0 else len(scan.components) > 1):
            raise ValueError("a scan mixes what a progressive file must keep apart")
        order = _order(markers, scan)
        bits, _ = _read_bits(jpeg, scan, len(order.blocks))
        band = (scan.first, scan.last, scan.low, scan.high) if progressive else (0, 63, 0, 0)
        _check(decode(bits, _decoders(scan), order, band, progressive, coefficients))
    return coefficients


def _order(markers: Markers, scan: Scan) -> Order:
    """Blocks are numbered component by component, row by row, with those that fill up the last MCUs."""
    rows, columns = markers.mcu_grid
    frame = markers.components
    first, planes = 0, []
    for component in frame:
        across, down = (component.horizontal, component.vertical) if len(frame) > 1 else (1, 1)
        planes.append(first + np.arange(rows * down * columns * across, dtype=np.int32).reshape(rows * down, -1))
        first += planes[-1].size
    if len(scan.components) == 1 and len(frame) > 1:  # one component alone: no filling up, block by block
        component = frame[scan.components[0][0]]
        most_across, most_down = max(c.horizontal for c in frame), max(c.vertical for c in frame)
        height, width = (
            -(-markers.height * component.vertical // most_down),
            -(-markers.width * component.horizontal // most_across),
        )
        plane = planes[scan.components[0][0]][: -(-height // 8), : -(-width // 8)]
        return Order(plane.reshape(-1, 1).copy(), np.zeros(1, np.int64))
    blocks = [
        planes[i].reshape(rows, planes[i].shape[0] // rows, columns, -1).swapaxes(1, 2) for i, _, _ in scan.components
    ]
    blocks = [plane.reshape(rows * columns, -1) for plane in blocks]  # (MCUs, blocks of this component in an MCU)
    component = np.repeat(np.arange(len(blocks)), [plane.shape[1] for plane in blocks])
    return Order(np.ascontiguousarray(np.concatenate(blocks, 1)), component)


def _decoders(scan: Scan) -> Decoders:
    pairs = [
        (scan.huffman.get((0, dc), _NO_TABLE), scan.huffman.get((1, ac), _NO_TABLE)) for _, dc, ac in scan.components
    ]
    tables = list(dict.fromkeys(table for pair in pairs for table in pair))
    rows = np.array([[tables.index(table) for table in pair] for pair in pairs])  # (components, 2): DC and AC
    look, limit, delta, symbols, skip = map(np.stack, zip(*map(_decoder, tables), strict=True))
    return Decoders(look, limit, delta, symbols, skip, rows)


@lru_cache(maxsize=64)
def _decoder(table: HuffmanTable) -> tuple[np.ndarray, ...]:
    look, skip = np.zeros(1 << WINDOW, np.uint16), np.zeros(1 << WINDOW, np.uint16)
    limit, delta, symbols = np.zeros(17, np.int32), np.zeros(17, np.int32), np.zeros(256, np.uint8)
    symbols[: len(table.symbols)] = np.frombuffer(table.symbols, np.uint8)
    fill_decoder(np.frombuffer(table.counts, np.uint8), symbols, look, limit, delta, skip)
    return look, limit, delta, symbols, skip


@lru_cache(maxsize=64)
def _codes(table: HuffmanTable) -> np.ndarray:
    """Code and length of every symbol, int64 (256, 2); length 0 where there is none."""
    codes = np.zeros((256, 2), np.int64)
    code, place = 0, 0
    for length, count in enumerate(table.counts, 1):
        code <<= 1
        for symbol in table.symbols[place : place + count]:
            codes[symbol] = code, length
            code += 1
        place += count
    return codes


def _optimal_table(counts: np.ndarray) -> HuffmanTable:
    """Huffman's code for these symbols, no longer than 16 bits and without a code of ones alone (T.81, K.2)."""
    used = np.flatnonzero(counts).tolist()
    # a symbol of its own takes the code of ones; the order of equal counts decides nothing but which code is longer
    heap = [(1, -1, [-1]), *((int(counts[symbol]), symbol, [symbol]) for symbol in used)]
    heapq.heapify(heap)
    sizes = dict.fromkeys([-1, *used], 0)
    while len(heap) > 1:
        (a, tie, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in left + right:
            sizes[symbol] += 1
        heapq.heappush(heap, (a + b, tie + 256, left + right))
    lengths = [0] * (max(sizes.values()) + 17)
    for size in sizes.values():
        lengths[size] += 1
    for long in range(len(lengths) - 1, 16, -1):  # Figure K.3
        while lengths[long]:
            short = max(n for n in range(1, long - 1) if lengths[n])
            lengths[long] -= 2
            lengths[long - 1] += 1
            lengths[short + 1] += 2
            lengths[short] -= 1
    lengths[max(n for n in range(17) if lengths[n])] -= 1
    return HuffmanTable(bytes(lengths[1:17]), bytes(sorted(used, key=lambda symbol: (-counts[symbol], symbol))))
