"""Reads the marker segments of a JPEG file (ITU-T T.81, Annex B) without decoding anything.

Only the index of a seekable JPEG is ours: an APP11 segment right after SOI that lists the bytes of every restart
segment (vitcomposer.data.jpeg.seekable writes it).
"""

import re
import struct
from dataclasses import dataclass
from typing import NamedTuple

INDEX_MAGIC, NO_INDEX = b"vitseek1", b"no index"
INDEX_HEAD = struct.Struct("<8s4HI")  # magic, MCUs a segment, segments a row, rows, zero, offset of the first segment
SOF0, SOF1, SOF2 = 0xC0, 0xC1, 0xC2
ARITHMETIC = range(0xC9, 0xD0)  # the frames whose coding has no least number of bits for a block (0xCC is no frame)
DHT, DQT, DRI, SOS, SOI, EOI = 0xC4, 0xDB, 0xDD, 0xDA, 0xD8, 0xD9
APP1, APP11, APP14 = 0xE1, 0xEB, 0xEE

_NOT_SOF = (0xC4, 0xC8, 0xCC)  # DHT, reserved and DAC lie among the sixteen frame markers
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class Segment(NamedTuple):
    """One marker segment: bytes ``start`` (the 0xFF of its marker) to ``stop``."""

    marker: int
    start: int
    stop: int


class Component(NamedTuple):
    """One colour component of the frame with its sampling factors."""

    id: int
    horizontal: int
    vertical: int
    quantisation: int


class HuffmanTable(NamedTuple):
    """Number of codes of each length 1 to 16, and the symbols in the order of their codes."""

    counts: bytes
    symbols: bytes


class Scan(NamedTuple):
    """A scan header with the tables that are in force for it.

    ``components`` holds (index in the frame, DC table, AC table); ``start`` is the first entropy-coded byte; ``first``
    to ``last`` are the coefficients, ``high`` and ``low`` the bit positions of successive approximation.
    """

    components: tuple[tuple[int, int, int], ...]
    first: int
    last: int
    high: int
    low: int
    start: int
    huffman: dict[tuple[int, int], HuffmanTable]  # by (0 for DC or 1 for AC, number)
    restart_interval: int


class SeekableIndex(NamedTuple):
    """What the APP11 segment of a seekable JPEG says; ``lengths`` are bytes without the RST markers between them."""

    mcus_per_segment: int
    segments_per_row: int
    rows: int
    scan: int
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Markers:
    """Everything before the entropy-coded data of the first scan."""

    segments: tuple[Segment, ...]  # after SOI, up to and with SOS
    sof: int
    precision: int
    height: int
    width: int
    components: tuple[Component, ...]
    quantisation: dict[int, bytes]  # 64 bytes or, with 16-bit entries, 128
    scan: Scan
    adobe_transform: int | None
    orientation: int  # of EXIF; 1 is upright, or not given
    index: SeekableIndex | None

    @property
    def progressive(self) -> bool:
        return self.sof == SOF2

    @property
    def mcu_grid(self) -> tuple[int, int]:
        """Rows and columns of MCUs of a scan with all components; of one component an MCU is one block."""
        wide, high = 8, 8
        if len(self.components) > 1:
            wide *= max(component.horizontal for component in self.components)
            high *= max(component.vertical for component in self.components)
        return -(-self.height // high), -(-self.width // wide)


def parse_markers(data: bytes) -> Markers:
    """The header of a JPEG file.

    Raises:
        ValueError: It is no JPEG or its header breaks the standard.
    """
    return _parse(data)[0]


def parse_scans(data: bytes) -> tuple[Markers, list[Scan], list[Segment]]:
    """The header, every scan of the file, and the marker segments between the scans (without DHT, DRI and SOS).

    Raises:
        ValueError: As :func:`parse_markers`, or the file ends before its EOI marker.
    """
    markers, state = _parse(data)
    scans, between = [markers.scan], []
    while True:
        segment = _next_segment(data, scan_end(data, scans[-1].start))
        while segment.marker not in (SOS, EOI):
            if segment.marker not in (DHT, DRI):
                between.append(segment)
            state.read(data, segment)
            segment = _next_segment(data, segment.stop)
        if segment.marker == EOI:
            return markers, scans, between
        scans.append(state.read_scan(data, segment))


def frame_marker(data: bytes | memoryview) -> int:
    """The marker of the frame, which names the way of coding; 0 where there is none before the first scan."""
    position = 2
    try:
        while True:
            segment = _next_segment(data, position)
            if _is_frame(segment.marker):
                return segment.marker
            if segment.marker in (SOS, EOI):
                return 0
            position = segment.stop
    except ValueError:
        return 0


def without_index(data: bytes) -> bytes:
    """A seekable JPEG whose index no reader takes for one; everything else stays where it is, be it damaged or not."""
    return data[:6] + NO_INDEX + data[6 + len(NO_INDEX) :]


def _is_frame(marker: int) -> bool:
    return 0xC0 <= marker <= 0xCF and marker not in _NOT_SOF


def scan_end(data: bytes | memoryview, start: int) -> int:
    """Where the marker after the entropy-coded data from ``start`` on begins."""
    match = _SCAN_END.search(data, start)
    if match is None:
        raise ValueError("the file ends inside its entropy-coded data")
    return match.start()


def _parse(data: bytes) -> tuple[Markers, "_State"]:
    if data[:2] != b"\xff\xd8":
        raise ValueError("no JPEG: it does not begin with FF D8")
    state = _State()
    segments: list[Segment] = []
    position = 2
    while True:
        segment = _next_segment(data, position)
        segments.append(segment)
        if segment.marker == SOS:
            break
        if segment.marker == EOI:
            raise ValueError("the file holds no scan")
        state.read(data, segment)
        position = segment.stop
    scan = state.read_scan(data, segment)
    assert state.frame is not None
    sof, precision, height, width, components = state.frame
    return Markers(
        segments=tuple(segments),
        sof=sof,
        precision=precision,
        height=height,
        width=width,
        components=components,
        quantisation=dict(state.quantisation),
        scan=scan,
        adobe_transform=state.adobe_transform,
        orientation=state.orientation,
        index=read_index(data),
    ), state


def _next_segment(data: bytes | memoryview, position: int) -> Segment:
    start = position
    if data[start : start + 1] != b"\xff":
        raise ValueError(f"byte {start} must begin a marker, or the file ends there")
    while data[position : position + 1] == b"\xff":  # any number of them may stand before a marker
        position += 1
    if position >= len(data):
        raise ValueError("the file ends inside its header")
    marker = data[position]
    if marker in (EOI, 0x01):
        return Segment(marker, start, position + 1)
    if marker == 0 or 0xD0 <= marker <= SOI:
        raise ValueError(f"marker FF {marker:02X} must not stand at byte {start}")
    length = int.from_bytes(data[position + 1 : position + 3], "big")
    stop = position + 1 + length
    if length < 2 or stop > len(data):
        raise ValueError(f"marker FF {marker:02X} at byte {start} has a length that cannot be")
    return Segment(marker, start, stop)


class _State:
    """What the marker segments read so far have set."""

    def __init__(self) -> None:
        self.frame: tuple[int, int, int, int, tuple[Component, ...]] | None = None
        self.quantisation: dict[int, bytes] = {}
        self.huffman: dict[tuple[int, int], HuffmanTable] = {}
        self.restart_interval = 0
        self.adobe_transform: int | None = None
        self.orientation = 1

    def read(self, data: bytes, segment: Segment) -> None:
        marker = segment.marker
        if marker == 0x01:  # TEM: no content
            return
        payload = data[_payload_start(data, segment) : segment.stop]
        if _is_frame(marker):
            if self.frame is not None:
                raise ValueError("the file holds more than one frame")
            self.frame = _read_frame(marker, payload)
        elif marker == DHT:
            self._read_huffman(payload)
        elif marker == DQT:
            self._read_quantisation(payload)
        elif marker == DRI:
            if len(payload) != 2:
                raise ValueError("DRI must hold 2 bytes")
            self.restart_interval = int.from_bytes(payload, "big")
        elif marker == APP14 and payload[:5] == b"Adobe" and len(payload) >= 12:
            self.adobe_transform = payload[11]
        elif marker == APP1 and payload[:6] == b"Exif\0\0":
            self.orientation = _read_orientation(payload[6:])

    def read_scan(self, data: bytes, segment: Segment) -> Scan:
        if self.frame is None:
            raise ValueError("a scan must not come before its frame")
        payload = data[_payload_start(data, segment) : segment.stop]
        count = payload[0] if payload else 0
        if not 1 <= count <= 4 or len(payload) != 4 + 2 * count:
            raise ValueError("the scan header has a wrong length")
        numbers = [component.id for component in self.frame[4]]
        components = []
        for i in range(count):
            name, tables = payload[1 + 2 * i], payload[2 + 2 * i]
            if name not in numbers or tables >> 4 > 3 or tables & 15 > 3:
                raise ValueError("the scan names a component or table that cannot be")
            components.append((numbers.index(name), tables >> 4, tables & 15))
        if len({component for component, _, _ in components}) < count:
            raise ValueError("the scan names a component twice")
        first, last, approximation = payload[-3:]
        high, low = approximation >> 4, approximation & 15
        if self.frame[0] == SOF2 and not (first <= last <= 63 and low <= 13 and (high == 0 or high == low + 1)):
            raise ValueError("the scan has coefficients or bit positions that cannot be")
        return Scan(tuple(components), first, last, high, low, segment.stop, dict(self.huffman), self.restart_interval)

    def _read_huffman(self, payload: bytes) -> None:
        while payload:
            kind, number, counts = payload[0] >> 4, payload[0] & 15, payload[1:17]
            total = sum(counts)
            symbols = payload[17 : 17 + total]
            code = 0
            for length, codes in enumerate(counts, 1):
                code = 2 * code + codes
                if code > 1 << length:
                    raise ValueError("a Huffman table holds more codes than there can be")
            if kind > 1 or number > 3 or len(counts) < 16 or total > 256 or len(symbols) < total:
                raise ValueError("a Huffman table is damaged")
            self.huffman[kind, number] = HuffmanTable(counts, symbols)
            payload = payload[17 + total :]

    def _read_quantisation(self, payload: bytes) -> None:
        while payload:
            wide, number = payload[0] >> 4, payload[0] & 15
            size = 128 if wide else 64
            if wide > 1 or number > 3 or len(payload) < 1 + size:
                raise ValueError("a quantisation table is damaged")
            self.quantisation[number] = payload[1 : 1 + size]
            payload = payload[1 + size :]


def _payload_start(data: bytes, segment: Segment) -> int:
    position = segment.start
    while data[position] == 0xFF:
        position += 1
    return position + 3


def _read_frame(marker: int, payload: bytes) -> tuple[int, int, int, int, tuple[Component, ...]]:
    if len(payload) < 6 or len(payload) != 6 + 3 * payload[5] or not payload[5]:
        raise ValueError("the frame header has a wrong length")
    precision, height, width, _ = struct.unpack_from(">BHHB", payload)
    if not height or not width:
        raise ValueError(f"height and width must be 1 or more, they are {height} and {width}")
    components = []
    for i in range(6, len(payload), 3):
        name, sampling, quantisation = payload[i : i + 3]
        if not 1 <= sampling >> 4 <= 4 or not 1 <= sampling & 15 <= 4 or quantisation > 3:
            raise ValueError("a component has sampling factors or a table that cannot be")
        components.append(Component(name, sampling >> 4, sampling & 15, quantisation))
    if len({component.id for component in components}) < len(components):
        raise ValueError("two components have the same number")
    return marker, precision, height, width, tuple(components)


def _read_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory; anything odd counts as upright, as viewers take it."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(f"{order}H", tiff, start)
    for position in range(start + 2, min(start + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, position)
        if tag == 0x0112:
            return value if kind == 3 and count == 1 and 1 <= value <= 8 else 1
    return 1


def read_index(data: bytes) -> SeekableIndex | None:
    """The index of a seekable JPEG, or None where there is none or it does not fit the file's length."""
    if data[2:4] != b"\xff\xeb" or data[6:14] != INDEX_MAGIC:
        return None
    payload = data[6 : 4 + int.from_bytes(data[4:6], "big")]
    if len(payload) < INDEX_HEAD.size:
        return None
    _, mcus, columns, rows, zero, scan = INDEX_HEAD.unpack_from(payload)
    count = columns * rows
    if not mcus or not count or zero or len(payload) != INDEX_HEAD.size + 2 * count:
        return None
    lengths = struct.unpack_from(f"<{count}H", payload, INDEX_HEAD.size)
    if scan + sum(lengths) + 2 * (count - 1) + 2 != len(data):
        return None
    return SeekableIndex(mcus, columns, rows, scan, lengths)
