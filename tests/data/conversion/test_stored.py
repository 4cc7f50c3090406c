"""What is stored for one image, by its kind and by the options."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests.conftest import read_photo
from vitcomposer.data.conversion.encode import StoreOptions, store_image
from vitcomposer.data.jpeg.markers import parse_markers, read_index
from vitcomposer.data.jpeg.raw import read_raw_size

SEEKABLE = StoreOptions(seekable=True)
OFF = StoreOptions(seekable=False)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return read_photo("china").resize((160, 120))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def raw_pixels(data: bytes) -> np.ndarray:
    magic, height, width, zero = struct.unpack("<4s3I", data[:16])
    assert magic == b"\x00RAW" and zero == 0
    return np.frombuffer(data[16:], np.uint8).reshape(height, width, 3)


def with_orientation(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, exif=exif)


def test_every_kind_takes_its_path(photo: Image.Image) -> None:
    plain = encoded(photo)
    sof = parse_markers(plain).segments
    start = next(s.start for s in sof if s.marker == 0xC0)
    odd = bytearray(plain)
    odd[start + 11] = 0x41
    extraneous = plain[:-2] + b"\x12\x34\x56" + b"\xff\xd9"
    cases = {
        "seekable": plain,
        "seekable from progressive": encoded(photo, progressive=True),
        "seekable, EXIF rotation kept": with_orientation(photo),
        "kept: CMYK": encoded(photo.convert("CMYK")),
        "kept: PNG": encoded(photo, "PNG"),
        "kept: WEBP": encoded(photo, "WEBP"),
    }
    for outcome, data in cases.items():
        stored = store_image(data, SEEKABLE)
        assert stored.outcome == outcome and (stored.width, stored.height) == (160, 120)
        assert np.array_equal(rgb(stored.columns[0]), rgb(data))
        assert (read_index(stored.columns[0]) is not None) == outcome.startswith("seekable")
        assert outcome.startswith("seekable") or stored.columns == (data,)
        assert store_image(data, OFF)[:2] == ((data,), "kept")
    assert store_image(store_image(plain, SEEKABLE).columns[0], SEEKABLE).outcome == "seekable"
    assert store_image(encoded(photo.convert("L")), SEEKABLE).outcome == "seekable"
    assert store_image(bytes(odd), SEEKABLE)[:2] == ((bytes(odd),), "kept: odd chroma sampling")
    assert np.array_equal(rgb(store_image(extraneous, SEEKABLE).columns[0]), rgb(plain))


def test_damaged_file_that_pillow_reads_is_kept(photo: Image.Image) -> None:
    jpeg = encoded(photo)
    damaged = jpeg[:20] + b"\x00" + jpeg[20:]  # a stray byte before a marker
    assert np.array_equal(rgb(damaged), rgb(jpeg))
    stored = store_image(damaged, SEEKABLE)
    assert stored.columns == (damaged,) and stored.outcome == "kept: damaged"


@pytest.mark.parametrize("options", [OFF, SEEKABLE, StoreOptions(seekable=True, raw_fraction=1.0)])
def test_unreadable_file_is_refused(photo: Image.Image, options: StoreOptions) -> None:
    for kind in ("JPEG", "PNG"):
        data = encoded(photo, kind)
        with pytest.raises(ValueError, match="truncated"):
            store_image(data[: len(data) // 2], options)
    with pytest.raises(ValueError, match="no image format"):
        store_image(b"<html>", options)
    with pytest.raises(ValueError, match="the file is empty"):
        store_image(b"", options)


def test_larger_images_are_resized_and_others_left_alone(photo: Image.Image) -> None:
    data = encoded(photo, quality=95)
    stored = store_image(data, StoreOptions(seekable=True, short_side=60, quality=90))
    assert stored.outcome == "resized" and (stored.width, stored.height) == (160, 120)
    image = Image.open(io.BytesIO(stored.columns[0]))
    assert image.size == (80, 60) and read_index(stored.columns[0]) is not None
    expected = encoded(Image.fromarray(rgb(data)).resize((80, 60), Image.Resampling.BICUBIC), quality=90)
    assert np.array_equal(rgb(stored.columns[0]), rgb(expected))
    assert parse_markers(stored.columns[0]).components[0][1:3] == (2, 2)
    plain = store_image(data, StoreOptions(seekable=False, short_side=60, quality=90))
    assert plain.columns == (expected,)
    for side in (120, 500):
        assert store_image(data, StoreOptions(seekable=False, short_side=side)).columns == (data,)
    assert store_image(data, StoreOptions(seekable=True, short_side=120)).outcome == "seekable"


def test_resized_size_is_that_of_torchvision() -> None:
    from torchvision.transforms.functional import resize

    for width, height, side in ((500, 375, 256), (333, 500, 224), (101, 67, 33), (1000, 3, 2)):
        image = Image.new("RGB", (width, height))
        stored = store_image(encoded(image, "PNG"), StoreOptions(short_side=side, raw_fraction=1))
        expected = resize(image, side)
        assert read_raw_size(stored.columns[0]) == (expected.height, expected.width)


def test_gray_stays_gray_when_resized(photo: Image.Image) -> None:
    stored = store_image(encoded(photo.convert("L")), StoreOptions(short_side=50))
    assert Image.open(io.BytesIO(stored.columns[0])).mode == "L"


def test_raw_image_holds_the_pixels(photo: Image.Image) -> None:
    for data in (
        encoded(photo),
        with_orientation(photo),
        encoded(photo.convert("L")),
        encoded(photo.convert("P"), "PNG"),
    ):
        stored = store_image(data, StoreOptions(seekable=True, raw_fraction=1.0))
        assert stored.outcome == "raw" and np.array_equal(raw_pixels(stored.columns[0]), rgb(data))
    jpeg = encoded(photo)
    assert np.array_equal(
        raw_pixels(store_image(jpeg, StoreOptions(raw_fraction=1)).columns[0]), simplejpeg.decode_jpeg(jpeg)
    )
    resized = store_image(jpeg, StoreOptions(raw_fraction=1, short_side=60)).columns[0]
    expected = np.asarray(Image.fromarray(rgb(jpeg)).resize((80, 60), Image.Resampling.BICUBIC))
    assert np.array_equal(raw_pixels(resized), expected)


def test_raw_share_is_drawn_from_seed_and_name(photo: Image.Image) -> None:
    data = encoded(photo.resize((8, 8)))
    names = [f"train/{i}.jpg" for i in range(400)]

    def drawn(fraction: float, seed: int) -> set[str]:
        options = StoreOptions(raw_fraction=fraction, seed=seed)
        return {name for name in names if store_image(data, options, name).outcome == "raw"}

    half = drawn(0.5, 0)
    assert 160 < len(half) < 240 and half == drawn(0.5, 0) and half != drawn(0.5, 1)
    assert drawn(0.2, 0) < half  # a larger share adds images, it does not choose others


def test_small_column_holds_the_shrunk_original(photo: Image.Image) -> None:
    data = encoded(photo)
    options = StoreOptions(seekable=True, raw_below=48, short_side=100)
    stored = store_image(data, options)
    assert options.columns == ("image", "image_small") and len(stored.columns) == 2 and stored.outcome == "resized"
    expected = np.asarray(Image.fromarray(rgb(data)).resize((64, 48), Image.Resampling.BICUBIC))
    assert np.array_equal(raw_pixels(stored.columns[1]), expected)
    enlarged = store_image(data, StoreOptions(raw_below=500)).columns[1]
    assert np.array_equal(raw_pixels(enlarged), rgb(data))
    gray = store_image(encoded(photo.convert("L")), StoreOptions(raw_below=48)).columns[1]
    assert raw_pixels(gray).shape == (48, 64, 3)


def test_other_formats_are_reencoded_on_request(photo: Image.Image) -> None:
    options = StoreOptions(seekable=True, reencode=90)
    for reason, data in {"PNG": encoded(photo, "PNG"), "CMYK": encoded(photo.convert("CMYK"))}.items():
        stored = store_image(data, options)
        assert stored.outcome == f"re-encoded: {reason}" and read_index(stored.columns[0]) is not None
        expected = encoded(Image.fromarray(rgb(data)), quality=90, subsampling="4:2:0")
        assert np.array_equal(rgb(stored.columns[0]), rgb(expected))
        plain = store_image(data, StoreOptions(seekable=False, reencode=90))
        assert plain.columns == (expected,)
    jpeg = encoded(photo)
    assert store_image(jpeg, StoreOptions(seekable=False, reencode=90))[:2] == ((jpeg,), "kept")
    assert store_image(jpeg, options).outcome == "seekable"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_side": 0}, "--short-side must be 1 pixel or more, got 0"),
        ({"raw_below": -3}, "--raw-below must be 1 pixel or more, got -3"),
        ({"quality": 101}, "--quality must be a JPEG quality from 1 to 100, got 101"),
        ({"reencode": 0}, "--reencode must be a JPEG quality"),
        ({"raw_fraction": 1.5}, r"--raw-fraction must be in \[0, 1\], got 1.5"),
    ],
)
def test_number_out_of_range_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoreOptions(**options)


def test_raw_size_is_read_only_from_whole_raw_samples() -> None:
    raw = struct.pack("<4s3I", b"\x00RAW", 2, 3, 0) + bytes(18)
    assert read_raw_size(raw) == (2, 3)
    for data in (raw[:-1], raw + b"x", raw[:10], b"", b"\x01RAW" + raw[4:], raw[:12] + b"\x01" + raw[13:]):
        assert read_raw_size(data) is None
