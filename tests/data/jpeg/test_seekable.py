"""Seekable JPEG: same coefficients, same pixels, an index that is right, and damaged files that never crash."""

import io
import random
from collections import Counter

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms

from tests.conftest import read_photo
from vitcomposer.data.jpeg import seekable
from vitcomposer.data.jpeg.coefficient_kernels import Order, encode
from vitcomposer.data.jpeg.markers import DQT, SOF0, SOS, parse_markers, parse_scans
from vitcomposer.data.jpeg.seekable import make_seekable, verify

SIZES = [(1, 1), (7, 5), (8, 8), (17, 31), (16 * 7, 16 * 5), (16 * 13 - 3, 16 * 11 - 9), (97, 200)]
KINDS = {
    "plain": {},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "restart blocks": {"restart_marker_blocks": 3},
    "restart rows": {"restart_marker_rows": 2},
    "progressive restarts": {"progressive": True, "restart_marker_blocks": 5},
}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [read_photo(name) for name in ("china", "flower", "chelsea", "coffee", "rocket")]


def encoded(image: Image.Image, quality: int = 90, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def pillow_pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def coefficients(jpeg: bytes) -> np.ndarray:
    markers, scans, _ = parse_scans(jpeg)
    across = markers.components[0].horizontal if len(markers.components) > 1 else 1
    down = markers.components[0].vertical if len(markers.components) > 1 else 1
    blocks = int(np.prod(markers.mcu_grid)) * (across * down + len(markers.components) - 1)
    return seekable._read_coefficients(jpeg, markers, scans, blocks)


def check_index(jpeg: bytes) -> None:
    markers = parse_markers(jpeg)
    index = markers.index
    assert index is not None
    assert index.scan == markers.scan.start and index.mcus_per_segment == markers.scan.restart_interval
    assert (index.rows, index.segments_per_row * index.mcus_per_segment) == markers.mcu_grid
    position = index.scan
    for number, length in enumerate(index.lengths):
        segment = jpeg[position : position + length]
        assert b"\xff" not in segment.replace(b"\xff\x00", b"")
        last = number + 1 == len(index.lengths)
        assert jpeg[position + length : position + length + 2] == bytes([0xFF, 0xD9 if last else 0xD0 + number % 8])
        position += length + 2
    assert position == len(jpeg)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subsampling", ["gray", "4:4:4", "4:2:2", "4:2:0"])
def test_rewritten_file_holds_the_same_image(photos: list[Image.Image], kind: str, subsampling: str) -> None:
    rng = random.Random(f"{kind}{subsampling}")
    made = Counter()
    for size in SIZES:
        for quality in (30, 75, rng.randint(76, 100)):
            photo = rng.choice(photos)
            left, top = rng.randrange(photo.width - 210), rng.randrange(photo.height - 210)
            image = photo.crop((left, top, left + size[0], top + size[1]))
            options = {} if subsampling == "gray" else {"subsampling": subsampling}
            original = encoded(
                image.convert("L" if subsampling == "gray" else "RGB"), quality, **options, **KINDS[kind]
            )
            result = make_seekable(original)
            assert result.how in ("copied", "recoded") and verify(pillow_pixels(original), result.data)
            assert np.array_equal(pillow_pixels(original), pillow_pixels(result.data))
            assert np.array_equal(coefficients(original), coefficients(result.data))
            check_index(result.data)
            made[result.how] += 1
    assert set(made) == ({"recoded"} if "progressive" in KINDS[kind] else made.keys() & {"copied", "recoded"})
    assert kind != "plain" or set(made) == {"copied"}


def test_tables_without_a_needed_code_lead_to_new_tables(photos: list[Image.Image]) -> None:
    made = Counter(
        make_seekable(encoded(photo.resize((64, 48)), quality, optimize=True)).how
        for photo in photos
        for quality in range(40, 100, 5)
    )
    assert made["recoded"] > 0 and made["copied"] > 0 and made.total() == made["recoded"] + made["copied"]


@pytest.mark.parametrize(("subsampling", "margin"), [("gray", 0), ("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 1)])
def test_segments_of_a_rectangle_are_a_jpeg_of_it(photos: list[Image.Image], subsampling: str, margin: int) -> None:
    options = {} if subsampling == "gray" else {"subsampling": subsampling}
    photo = photos[0].resize((500, 375)).convert("L" if subsampling == "gray" else "RGB")
    jpeg = make_seekable(encoded(photo, 92, **options)).data
    whole, markers = simplejpeg.decode_jpeg(jpeg), parse_markers(jpeg)
    index = markers.index
    assert index is not None
    high, wide = (
        (8 if subsampling in ("gray", "4:4:4", "4:2:2") else 16),
        (8 if subsampling in ("gray", "4:4:4") else 16),
    )
    wide *= index.mcus_per_segment
    starts = index.scan + np.cumsum([0, *index.lengths[:-1]]) + 2 * np.arange(len(index.lengths))
    sof = next(segment for segment in markers.segments if segment.marker == markers.sof)
    rng = random.Random(0)
    for _ in range(25):
        top, bottom = sorted(rng.sample(range(index.rows + 1), 2))
        left, right = sorted(rng.sample(range(index.segments_per_row + 1), 2))
        y, x = top * high, left * wide
        height, width = min(bottom * high, 375) - y, min(right * wide, 500) - x
        header = bytearray(jpeg[: index.scan])
        header[sof.start + 5 : sof.start + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        numbers = [row * index.segments_per_row + column for row in range(top, bottom) for column in range(left, right)]
        pieces = [
            jpeg[starts[n] : starts[n] + index.lengths[n]] + bytes([0xFF, 0xD0 + i % 8]) for i, n in enumerate(numbers)
        ]
        part = simplejpeg.decode_jpeg(bytes(header) + b"".join(pieces)[:-2] + b"\xff\xd9")
        assert part.shape[:2] == (height, width)
        inner = (slice(margin * (y > 0), height - margin), slice(margin * (x > 0), width - margin))
        assert np.array_equal(part[inner], whole[y : y + height, x : x + width][inner])


def test_photos_grow_by_a_few_per_cent(photos: list[Image.Image]) -> None:
    shares = []
    for photo in photos:
        for size, options in (
            ((500, 375), {"quality": 95}),
            ((340, 256), {"quality": 90}),
            ((375, 500), {"quality": 85}),
        ):
            for more in ({}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}):
                original = encoded(photo.resize(size), **options, **more)
                shares.append(len(make_seekable(original).data) / len(original) - 1)
    assert max(shares) <= 0.065 and np.mean(shares) <= 0.045


def test_markers_stay_but_for_restart_intervals(photos: list[Image.Image]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind, options in KINDS.items():
        original = encoded(photos[0].resize((90, 60)), exif=exif, icc_profile=profile, comment=b"hello", **options)
        result = make_seekable(original).data
        before, after = Image.open(io.BytesIO(original)), Image.open(io.BytesIO(result))
        assert after.getexif()[0x0112] == 6 == parse_markers(result).orientation
        assert after.info["icc_profile"] == profile and after.info["comment"] == b"hello"
        assert after.quantization == before.quantization and after.size == before.size, kind


def test_rgb_is_left_alone_as_the_region_decoder_refuses_it(photos: list[Image.Image]) -> None:
    for options in ({}, {"progressive": True}):
        original = encoded(photos[0].resize((50, 40)), keep_rgb=True, **options)
        assert parse_markers(original).adobe_transform == 0
        assert make_seekable(original) == (original, "unchanged", "RGB")


def test_grey_with_the_marker_of_adobe_is_read_in_regions(photos: list[Image.Image]) -> None:
    """Of one component its transform says nothing, and Photoshop writes 0."""
    grey = encoded(photos[0].convert("L").resize((50, 40)))
    adobe = grey[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00" + grey[2:]
    made = make_seekable(adobe)
    assert parse_markers(adobe).adobe_transform == 0 and made.how == "copied"
    assert verify(pillow_pixels(adobe), made.data) and verify(pillow_pixels(adobe)[:, :, 0], made.data)


def with_16_bit_tables(jpeg: bytes) -> bytes:
    """The same file with wide quantisation tables, which baseline does not have and SOF1 does."""
    markers = parse_markers(jpeg)
    out = b"\xff\xd8"
    for number, table in markers.quantisation.items():
        wide = b"".join(bytes([value // 255, value]) for value in [*table[:-1], 255])  # 511 for the highest frequency
        out += b"\xff\xdb\x00\x83" + bytes([0x10 | number]) + wide
    for segment in markers.segments:
        if segment.marker != DQT:
            sof = b"\xff\xc1" if segment.marker == SOF0 else jpeg[segment.start : segment.start + 2]
            out += sof + jpeg[segment.start + 2 : segment.stop]
    return out + jpeg[markers.scan.start :]


@pytest.mark.parametrize("kind", ["plain", "progressive"])
def test_16_bit_quantisation_tables_stay(photos: list[Image.Image], kind: str) -> None:
    original = with_16_bit_tables(encoded(photos[0].resize((50, 40)), **KINDS[kind]))
    result = make_seekable(original)
    after = parse_markers(result.data)
    assert verify(pillow_pixels(original), result.data) and after.sof == 0xC1
    assert after.quantisation == parse_markers(original).quantisation and len(after.quantisation[0]) == 128


def test_seekable_file_is_returned_as_it_is(photos: list[Image.Image]) -> None:
    once = make_seekable(encoded(photos[1].resize((120, 90)))).data
    again = make_seekable(once)
    assert again.how == "already" and again.data is once


def test_index_that_another_program_left_behind_is_made_anew(photos: list[Image.Image]) -> None:
    once = make_seekable(encoded(photos[1].resize((120, 90)))).data
    other = make_seekable(encoded(photos[2].resize((120, 90)))).data
    length = 4 + int.from_bytes(once[4:6], "big") - 2
    mixed = once[: 2 + length] + other[2 + length :]
    result = make_seekable(mixed)
    assert result.how == "copied" and verify(pillow_pixels(other), result.data) and result.data.count(b"vitseek1") == 1
    check_index(result.data)


def test_fill_bytes_and_a_last_restart_marker_are_read_over(photos: list[Image.Image]) -> None:
    original = encoded(photos[1].resize((100, 70)), restart_marker_blocks=4)
    filled, start = b"\xff\xd8", 2
    for segment in parse_markers(original).segments:
        filled += b"\xff\xff\xff" + original[segment.start : segment.stop]
        start = segment.stop
    rest = original[start:]
    for number in range(8):
        rest = rest.replace(bytes([0xFF, 0xD0 + number]), bytes([0xFF, 0xFF, 0xFF, 0xD0 + number]))
    markers = rest.count(b"\xff\xff\xff")
    filled += rest[:-2] + bytes([0xFF, 0xD0 + markers % 8]) + b"\xff\xff\xd9"
    result = make_seekable(filled)
    assert result.how == "copied"
    assert np.array_equal(simplejpeg.decode_jpeg(result.data), simplejpeg.decode_jpeg(original))
    check_index(result.data)


def test_bytes_after_the_image_are_left_out(photos: list[Image.Image]) -> None:
    original = encoded(photos[1].resize((100, 70)))
    result = make_seekable(original + b"a preview of the camera")
    assert result.data == make_seekable(original).data


def one_scan_per_component(jpeg: bytes) -> bytes:
    """The same image as a baseline JPEG with a scan for each component, as cameras and ImageMagick never write it."""
    markers, values = parse_markers(jpeg), coefficients(jpeg)
    out = b"".join([b"\xff\xd8", *(jpeg[s.start : s.stop] for s in markers.segments if s.marker != SOS)])
    codes = np.stack([seekable._codes(markers.scan.huffman[kind, number]) for number in (0, 1) for kind in (0, 1)])
    for i, component in enumerate(markers.components):
        alone = markers.scan.__class__(((i, 0, 0),), 0, 63, 0, 0, 0, {}, 0)
        order = seekable._order(markers, alone)
        assert isinstance(order, Order)
        buffer, lengths = np.empty(len(jpeg) + 1000, np.uint8), np.empty(1, np.int64)
        count = encode(values, order, len(order.blocks), np.array([min(i, 1)]), codes, buffer, lengths)
        selector = bytes([component.id, 0x11 * min(i, 1)])
        out += b"\xff\xda\x00\x08\x01" + selector + b"\x00\x3f\x00" + buffer[: count - 2].tobytes()
    return out + b"\xff\xd9"


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_scans_of_single_components_become_one(photos: list[Image.Image], subsampling: str) -> None:
    for size in ((100, 70), (33, 17), (5, 3)):
        original = encoded(photos[3].resize(size), subsampling=subsampling)
        several = one_scan_per_component(original)
        assert np.array_equal(simplejpeg.decode_jpeg(several), simplejpeg.decode_jpeg(original))
        result = make_seekable(several)
        assert result.how == "recoded" and verify(pillow_pixels(several), result.data)
        check_index(result.data)


def patched(jpeg: bytes, offset: int, value: int) -> bytes:
    """A byte of the frame header changed; offset 0 is the marker, 1 to 2 the length, 3 the precision."""
    markers = parse_markers(jpeg)
    sof = next(segment for segment in markers.segments if segment.marker == markers.sof)
    changed = bytearray(jpeg)
    changed[sof.start + 1 + offset] = value
    return bytes(changed)


def test_other_kinds_are_left_alone_with_the_reason(photos: list[Image.Image]) -> None:
    image = photos[0].resize((60, 40))
    colour = encoded(image)
    cases = {
        "CMYK": encoded(image.convert("CMYK")),
        "12-bit": patched(colour, 3, 12),
        "arithmetic": patched(colour, 0, 0xC9),
        "lossless": patched(colour, 0, 0xC3),
        "odd chroma sampling": patched(colour, 10, 0x41),
        "too large": patched(patched(colour, 4, 0xFF), 6, 0xFF),
    }
    for reason, jpeg in cases.items():
        result = make_seekable(jpeg)
        assert result == (jpeg, "unchanged", reason)


def test_file_that_no_index_can_hold_is_left_alone() -> None:
    # more segments of one MCU than an index holds, and rows (311 is prime) of more than 64 KB
    noise = np.random.default_rng(0).integers(0, 256, (106 * 8, 311 * 8, 3), dtype=np.uint8)
    jpeg = simplejpeg.encode_jpeg(noise, quality=100, colorsubsampling="444")
    assert make_seekable(jpeg)[1:] == ("unchanged", "too many bytes for one index")


@pytest.mark.parametrize(
    ("columns", "rows", "coded_bytes", "mcus"),
    [
        (32, 24, 110_000, 2),
        (31, 24, 110_000, 1),  # 31 and 1 divide a row: 1 is nearer to 2
        (31, 24, 30_000, 31),
        (21, 24, 30_000, 3),
        (32, 24, 20_000, 4),
        (3, 1, 10_000, 1),  # a tie between 1 and 3
        (375, 250, 6_000_000, 3),  # 93,750 segments of one MCU are too many
        (1, 1, 5, 1),
    ],
)
def test_segment_size_is_near_two_mcus_and_not_too_short(columns: int, rows: int, coded_bytes: int, mcus: int) -> None:
    assert seekable._segment_sizes(columns, rows, coded_bytes)[0] == mcus


def test_optimal_table_is_a_short_prefix_code() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 40:
        fibonacci.append(sum(fibonacci[-2:]))
    rng = np.random.default_rng(0)
    for counts in (np.array(fibonacci), rng.integers(0, 1000, 256), np.array([5]), np.ones(256, np.int64)):
        padded = np.zeros(256, np.int64)
        padded[: len(counts)] = counts
        table = seekable._optimal_table(padded)
        assert set(table.symbols) == set(np.flatnonzero(padded).tolist()) and sum(table.counts) == len(table.symbols)
        assert sum(count / 2**length for length, count in enumerate(table.counts, 1)) < 1  # the code of ones is free
        lengths = [length for length, count in enumerate(table.counts, 1) for _ in range(count)]
        by_symbol = dict(zip(table.symbols, lengths, strict=True))
        assert all(by_symbol[a] <= by_symbol[b] for a in by_symbol for b in by_symbol if padded[a] > padded[b])
    skewed = seekable._optimal_table(np.r_[np.full(2, 2**20), np.zeros(254, np.int64)])
    assert list(skewed.counts[:2]) == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read_alike(photos: list[Image.Image], kind: str) -> None:
    rng = random.Random(kind)
    bases = [encoded(photos[i].resize((90, 60)), quality, **KINDS[kind]) for i, quality in enumerate((50, 80, 97))]
    outcomes = Counter()
    for _ in range(300):
        damaged = bytearray(rng.choice(bases))
        for _ in range(rng.choice((1, 1, 3, 20))):
            place = rng.randrange(len(damaged))
            change = rng.choice(("bit", "bit", "byte", "cut", "insert"))
            if change == "bit":
                damaged[place] ^= 1 << rng.randrange(8)
            elif change == "byte":
                damaged[place] = rng.choice((0, 0xFF, 0xC4, 0xD0, 0xD9, 0xDA))
            elif change == "cut" and rng.random() < 0.3:
                del damaged[max(place, 1) :]
            else:
                damaged[place:place] = bytes([rng.choice((0, 0xFF))] * rng.randint(1, 3))
        try:
            result = make_seekable(bytes(damaged))
        except ValueError:
            outcomes["refused"] += 1
            continue
        if result.how == "unchanged":
            outcomes["unchanged"] += 1
            continue
        try:
            pixels = pillow_pixels(bytes(damaged))
        except OSError:
            outcomes["left out by the converter"] += 1
            continue
        outcomes["same pixels" if verify(pixels, result.data) else "kept by the converter"] += 1
    assert outcomes["refused"] > 60 and outcomes["same pixels"] > 20 and outcomes["kept by the converter"] < 30, (
        outcomes
    )


def test_every_truncation_is_refused(photos: list[Image.Image]) -> None:
    for options in KINDS.values():
        jpeg = encoded(photos[0].resize((48, 32)), **options)
        for length in range(0, len(jpeg) - 1, 7):
            with pytest.raises(ValueError):
                make_seekable(jpeg[:length])
