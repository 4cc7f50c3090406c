"""The header of a JPEG, and that nonsense is a ValueError."""

import io
import random

import pytest
from PIL import Image

from tests.conftest import read_photo
from vitcomposer.data.jpeg.markers import EOI, SOS, parse_markers, parse_scans, read_index
from vitcomposer.data.jpeg.seekable import make_seekable


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return read_photo("china").resize((101, 67))


@pytest.mark.parametrize(
    ("subsampling", "sampling", "grid"),
    [("4:4:4", (1, 1), (9, 13)), ("4:2:2", (2, 1), (9, 7)), ("4:2:0", (2, 2), (5, 7))],
)
def test_frame_is_what_was_encoded(
    photo: Image.Image, subsampling: str, sampling: tuple[int, int], grid: tuple[int, int]
) -> None:
    jpeg = encoded(photo, subsampling=subsampling, restart_marker_blocks=3)
    markers = parse_markers(jpeg)
    assert (markers.height, markers.width, markers.precision, markers.progressive) == (67, 101, 8, False)
    assert [component[1:3] for component in markers.components] == [sampling, (1, 1), (1, 1)]
    assert markers.mcu_grid == grid and markers.scan.restart_interval == 3
    assert markers.scan.components == ((0, 0, 0), (1, 1, 1), (2, 1, 1))
    assert (markers.adobe_transform, markers.orientation, markers.index) == (None, 1, None)
    assert jpeg[markers.scan.start - 3 : markers.scan.start] == b"\x00\x3f\x00"
    with Image.open(io.BytesIO(jpeg)) as image:
        assert {number: sorted(table) for number, table in markers.quantisation.items()} == {
            number: sorted(table) for number, table in image.quantization.items()
        }


def test_gray_has_blocks_as_mcus_whatever_its_sampling(photo: Image.Image) -> None:
    jpeg = bytearray(encoded(photo.convert("L")))
    sof = next(s for s in parse_markers(bytes(jpeg)).segments if s.marker == 0xC0)
    jpeg[sof.start + 11] = 0x22
    markers = parse_markers(bytes(jpeg))
    assert markers.components[0][1:3] == (2, 2) and markers.mcu_grid == (9, 13)


def test_scans_of_a_progressive_file_are_all_found(photo: Image.Image) -> None:
    jpeg = encoded(photo, progressive=True)
    markers, scans, between = parse_scans(jpeg)
    assert markers.progressive and len(scans) == jpeg.count(b"\xff\xda") == 10 and between == []
    assert (scans[0].first, scans[0].last, scans[0].high, scans[0].low) == (0, 0, 0, 1)
    assert len(scans[0].components) == 3 and len(scans[-1].components) == 1
    assert scans[-1].last == 63 and scans[-1].low == 0


def test_tables_in_force_are_those_of_the_scan(photo: Image.Image) -> None:
    _, scans, _ = parse_scans(encoded(photo, progressive=True))
    tables = [scan.huffman.get((1, scan.components[0][2])) for scan in scans if scan.first > 0]
    assert None not in tables and len(set(tables)) > 3


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_and_adobe_transform_are_read(photo: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F] = "camera"
    exif[0x0112] = orientation
    assert parse_markers(encoded(photo, exif=exif)).orientation == orientation
    assert parse_markers(encoded(photo, exif=exif, keep_rgb=True)).adobe_transform == 0
    assert parse_markers(encoded(photo.convert("CMYK"))).adobe_transform is not None


@pytest.mark.parametrize(
    "tiff",
    [
        b"",
        b"II",
        b"XX*\0\x08\0\0\0",
        b"II*\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0\xff\xff",
        b"MM\0*\0\0\0\x08\0\x01" + bytes(12),
    ],
)
def test_odd_exif_counts_as_upright(photo: Image.Image, tiff: bytes) -> None:
    jpeg = encoded(photo)
    payload = b"Exif\0\0" + tiff
    app1 = b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload
    assert parse_markers(jpeg[:2] + app1 + jpeg[2:]).orientation == 1


def test_index_is_read_and_a_wrong_one_is_not(photo: Image.Image) -> None:
    jpeg = make_seekable(encoded(photo)).data
    index = read_index(jpeg)
    assert index is not None and (index.rows, index.segments_per_row * index.mcus_per_segment) == (5, 7)
    assert len(index.lengths) == index.rows * index.segments_per_row and parse_markers(jpeg).index == index
    assert read_index(jpeg[:-1]) is None and read_index(jpeg + b"x") is None and read_index(jpeg[:20]) is None
    for place in (14, 16, 18, 20, 22, 26):
        changed = bytearray(jpeg)
        changed[place] ^= 1
        assert read_index(bytes(changed)) is None or place == 14  # what a segment holds is not in the lengths
    assert read_index(encoded(photo)) is None and read_index(b"") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda jpeg: b"", "no JPEG"),
        (lambda jpeg: b"\x89PNG" + jpeg, "no JPEG"),
        (lambda jpeg: jpeg[:2], "byte 2 must begin a marker"),
        (lambda jpeg: jpeg[:2] + b"\xff\xd9", "holds no scan"),
        (lambda jpeg: jpeg[:2] + b"\xff" * 50, "ends inside its header"),
        (lambda jpeg: jpeg[:2] + b"\xff\xe0\x00\x01" + jpeg[2:], "a length that cannot be"),
        (lambda jpeg: jpeg[:2] + b"\xff\xd3" + jpeg[2:], "must not stand"),
        (lambda jpeg: jpeg[:2] + b"\xff\xc4\x00\x13\x00\x03" + bytes(15) + jpeg[2:], "more codes than there can be"),
        (lambda jpeg: jpeg[:2] + b"\xff\xc4\x00\x13\x77" + bytes(16) + jpeg[2:], "Huffman table is damaged"),
        (lambda jpeg: jpeg[:2] + b"\xff\xdb\x00\x05\x00\x01\x01" + jpeg[2:], "quantisation table is damaged"),
        (lambda jpeg: jpeg[:2] + b"\xff\xdd\x00\x03\x00" + jpeg[2:], "DRI must hold 2 bytes"),
        (lambda jpeg: jpeg[:2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + jpeg[2:], "before its frame"),
    ],
)
def test_nonsense_is_one_error(photo: Image.Image, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_markers(change(encoded(photo)))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (2, 18, "wrong length"),
        (4, 0, "height and width must be 1 or more"),
        (8, 4, "wrong length"),
        (9, 2, "same number"),
        (10, 0x05, "cannot be"),
    ],
)
def test_broken_frame_header_is_one_error(photo: Image.Image, offset: int, value: int, message: str) -> None:
    jpeg = bytearray(encoded(photo))
    sof = next(s for s in parse_markers(bytes(jpeg)).segments if s.marker == 0xC0).start
    jpeg[sof + 1 + offset] = value
    if offset == 4:
        jpeg[sof + 6] = 0
    with pytest.raises(ValueError, match=message):
        parse_markers(bytes(jpeg))


@pytest.mark.parametrize(
    ("offset", "value", "message"), [(3, 2, "wrong length"), (4, 9, "component or table"), (6, 1, "twice")]
)
def test_broken_scan_header_is_one_error(photo: Image.Image, offset: int, value: int, message: str) -> None:
    jpeg = bytearray(encoded(photo))
    sos = parse_markers(bytes(jpeg)).segments[-1]
    assert sos.marker == SOS
    jpeg[sos.start + 1 + offset] = value
    with pytest.raises(ValueError, match=message):
        parse_markers(bytes(jpeg))


def test_mutated_headers_never_do_anything_else(photo: Image.Image) -> None:
    rng = random.Random(0)
    bases = [encoded(photo), encoded(photo, progressive=True), make_seekable(encoded(photo)).data]
    refused = 0
    for _ in range(3000):
        damaged = bytearray(rng.choice(bases))
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(700)] = rng.choice((0, 1, 0xFF, rng.randrange(256), EOI, SOS))
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        try:
            parse_markers(bytes(damaged))
            parse_scans(bytes(damaged))
        except ValueError:
            refused += 1
    assert 600 < refused < 3000
