"""Decoding and resizing against torchvision's loader and Pillow's resize."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from vitcomposer.data.conversion.encode import StoreOptions, store_image
from vitcomposer.data.jpeg import decode as jpeg


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((251, 187))


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def with_alpha(photo: Image.Image, mode: str) -> Image.Image:
    image = photo.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(photo.size))
    return image


def sixteen_bit(photo: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 251)


def turned(photo: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    return encode(photo, "JPEG", quality=90, exif=exif)


def with_flipped_bits(photo: Image.Image) -> bytes:
    encoded = bytearray(encode(photo, "JPEG", quality=90))
    encoded[len(encoded) // 2] ^= 0x55
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(bytes(encoded))
    return bytes(encoded)


def with_stray_bytes(photo: Image.Image) -> bytes:
    encoded = encode(photo, "JPEG", quality=90)
    marker = encoded.index(b"\xff\xdb")
    stray = encoded[:marker] + b"\x11\x22\x33" + encoded[marker:]
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(stray)
    return stray


FILES = {
    "jpeg 4:2:0": lambda p: encode(p, "JPEG", quality=90, subsampling=2),
    "jpeg 4:4:4": lambda p: encode(p, "JPEG", quality=100, subsampling=0),
    "jpeg progressive": lambda p: encode(p, "JPEG", quality=80, progressive=True),
    "jpeg grey": lambda p: encode(p.convert("L"), "JPEG", quality=90),
    "jpeg cmyk": lambda p: encode(p.convert("CMYK"), "JPEG", quality=90),
    "jpeg with EXIF orientation": turned,
    "jpeg with stray bytes": with_stray_bytes,
    "jpeg with flipped bits": with_flipped_bits,
    "png": lambda p: encode(p, "PNG"),
    "png grey": lambda p: encode(p.convert("L"), "PNG"),
    "png 16 bit": lambda p: encode(sixteen_bit(p), "PNG"),
    "png one bit": lambda p: encode(p.convert("1"), "PNG"),
    "png palette": lambda p: encode(p.convert("P"), "PNG"),
    "png palette, transparent": lambda p: encode(p.convert("P"), "PNG", transparency=3),
    "png alpha": lambda p: encode(with_alpha(p, "RGB"), "PNG"),
    "png grey alpha": lambda p: encode(with_alpha(p, "L"), "PNG"),
    "webp": lambda p: encode(p, "WEBP", lossless=True),
    "bmp": lambda p: encode(p, "BMP"),
}


@pytest.mark.parametrize("kind", FILES)
def test_decode_equals_torchvision_loader(kind: str, photo: Image.Image, tmp_path: Path) -> None:
    encoded = FILES[kind](photo)
    (tmp_path / "image").write_bytes(encoded)
    reference = np.asarray(pil_loader(tmp_path / "image"))
    if kind == "png 16 bit":  # which Pillow cuts off at 255
        grey = np.asarray(sixteen_bit(photo)).astype(int)
        reference = np.repeat(((grey + 128) // 257)[..., None], 3, axis=2)
    assert jpeg.read_size(encoded) == reference.shape[:2]
    np.testing.assert_array_equal(jpeg.decode_rgb(encoded), reference)


@pytest.mark.parametrize("kind", ["jpeg 4:2:0", "jpeg cmyk", "png palette, transparent"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("box", [(0, 0, 187, 251), (13, 31, 111, 97), (90, 200, 40, 37), (5, 7, 1, 1)])
def test_crop_equals_torchvision_on_pillow(
    kind: str, interpolation: str, box: tuple[int, int, int, int], photo: Image.Image, tmp_path: Path
) -> None:
    encoded = FILES[kind](photo)
    (tmp_path / "image").write_bytes(encoded)
    crop = jpeg.decode_crop(encoded, box, 64, interpolation)
    reference = resized_crop(pil_loader(tmp_path / "image"), *box, [64, 64], InterpolationMode(interpolation))
    assert crop.dtype == torch.uint8 and crop.shape == (3, 64, 64) and crop.is_contiguous()
    np.testing.assert_array_equal(crop.permute(1, 2, 0).numpy(), np.asarray(reference))


def test_resize_writes_its_slot_of_the_batch_and_no_other(photo: Image.Image) -> None:
    encoded = FILES["jpeg 4:2:0"](photo)
    batch = torch.full((3, 32, 32, 3), 7, dtype=torch.uint8).permute(0, 3, 1, 2)
    jpeg.decode_crop_into(encoded, (2, 3, 90, 80), batch[1], "bicubic")
    assert torch.equal(batch[1], jpeg.decode_crop(encoded, (2, 3, 90, 80), 32))
    assert (batch[0] == 7).all() and (batch[2] == 7).all()


def test_resize_into_memory_of_any_order_gives_the_same_pixels(photo: Image.Image) -> None:
    pixels = np.asarray(photo)
    last, first = torch.empty((40, 48, 3), dtype=torch.uint8).permute(2, 0, 1), torch.empty((3, 40, 48)).byte()
    for out in (last, first):
        jpeg.resize_into(pixels, out, "bilinear")
    assert torch.equal(last, first)
    reference = photo.resize((48, 40), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(first.permute(1, 2, 0).numpy(), np.asarray(reference))


def test_resize_to_the_same_size_keeps_every_pixel(photo: Image.Image) -> None:
    encoded = FILES["png"](photo)
    crop = jpeg.decode_crop(encoded, (10, 20, 60, 60), 60)
    np.testing.assert_array_equal(crop.permute(1, 2, 0).numpy(), np.asarray(photo)[10:70, 20:80])


@pytest.mark.parametrize(
    ("kind", "keep", "message"),
    [
        ("jpeg 4:2:0", 0.6, "truncated"),
        ("jpeg progressive", 0.3, "truncated"),
        ("png", 0.5, "truncated|broken"),
        ("webp", 0.5, "."),
    ],
)
def test_truncated_image_raises_the_cause(kind: str, keep: float, message: str, photo: Image.Image) -> None:
    encoded = FILES[kind](photo)
    with pytest.raises(ValueError, match=message):
        jpeg.decode_rgb(encoded[: int(len(encoded) * keep)])


@pytest.mark.parametrize("encoded", [b"", b"not an image", b"\xff\xd8", b"\xff\xd8\xff\xe0" + bytes(40)])
def test_bytes_of_no_image_raise(encoded: bytes) -> None:
    with pytest.raises(ValueError, match="no image format that Pillow knows"):
        jpeg.read_size(encoded)
    with pytest.raises(ValueError, match="no image format that Pillow knows"):
        jpeg.decode_rgb(encoded)


@pytest.mark.parametrize("box", [(0, 0, 188, 10), (180, 0, 8, 10), (-1, 0, 5, 5), (0, 250, 2, 2), (0, 0, 0, 5)])
def test_box_outside_the_image_raises(box: tuple[int, int, int, int], photo: Image.Image) -> None:
    with pytest.raises(ValueError, match="inside the 187x251 image"):
        jpeg.decode_crop(FILES["jpeg 4:2:0"](photo), box, 16)


@pytest.mark.parametrize("kind", FILES)
def test_region_equals_the_slice_of_the_whole(kind: str, photo: Image.Image) -> None:
    encoded = FILES[kind](photo)
    full = jpeg.decode_rgb(encoded)
    for top, left, height, width in [
        (0, 0, 187, 251),
        (0, 0, 1, 1),
        (13, 31, 50, 97),
        (60, 200, 127, 51),
        (186, 250, 1, 1),
    ]:
        region = jpeg.decode_region(encoded, (top, left, height, width))
        np.testing.assert_array_equal(region, full[top : top + height, left : left + width])
        np.testing.assert_array_equal(jpeg.decode_region(memoryview(encoded), (top, left, height, width)), region)


@pytest.mark.parametrize("kind", ["jpeg 4:2:0", "jpeg progressive"])
def test_truncated_file_raises_even_if_the_box_was_complete(kind: str, photo: Image.Image) -> None:
    encoded = FILES[kind](photo)
    with pytest.raises(ValueError, match="truncated"):
        jpeg.decode_region(encoded[: len(encoded) // 2], (0, 0, 20, 20))


def raw(pixels: np.ndarray) -> bytes:
    return struct.pack("<4sIII", b"\x00RAW", *pixels.shape[:2], 0) + pixels.tobytes()


def test_raw_sample_gives_its_own_pixels_without_a_copy(photo: Image.Image) -> None:
    pixels = np.asarray(photo)
    sample = bytearray(b"before" + raw(pixels))
    encoded = memoryview(sample)[6:]
    assert jpeg.read_size(encoded) == (187, 251)
    np.testing.assert_array_equal(jpeg.decode_rgb(encoded), pixels)
    region = jpeg.decode_region(encoded, (10, 20, 30, 40))
    np.testing.assert_array_equal(region, pixels[10:40, 20:60])
    assert np.shares_memory(region, np.frombuffer(sample, np.uint8))
    crop = jpeg.decode_crop(bytes(encoded), (10, 20, 30, 40), 16)
    np.testing.assert_array_equal(crop, jpeg.decode_crop(FILES["png"](photo), (10, 20, 30, 40), 16))


@pytest.mark.parametrize(
    "sample",
    [
        b"\x00RAW",
        struct.pack("<4sIII", b"\x00RAW", 4, 4, 0) + bytes(47),
        struct.pack("<4sIII", b"\x00RAW", 4, 4, 0) + bytes(49),
        struct.pack("<4sIII", b"\x00RAW", 4, 4, 1) + bytes(48),
        struct.pack("<4sIII", b"\x00RAW", 0, 4, 0),
    ],
)
def test_raw_sample_whose_head_disagrees_with_its_length_raises(sample: bytes) -> None:
    for read in (jpeg.read_size, jpeg.decode_rgb, lambda s: jpeg.decode_region(s, (0, 0, 1, 1))):
        with pytest.raises(ValueError, match="raw sample"):
            read(sample)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


@pytest.mark.parametrize(("size", "least"), [(60, 34), (40, 32)])
def test_reduced_decode_is_close_and_only_on_request(size: int, least: float, photo: Image.Image) -> None:
    encoded, box = FILES["jpeg 4:2:0"](photo), (3, 9, 181, 237)
    exact, reduced = (torch.empty((size, size, 3), dtype=torch.uint8).permute(2, 0, 1) for _ in range(2))
    jpeg.decode_crop_into(encoded, box, exact, "bicubic")
    jpeg.decode_crop_into(encoded, box, reduced, "bicubic", "dct")
    assert not torch.equal(exact, reduced)
    assert psnr(exact, reduced) > least
    whole = torch.empty_like(exact)
    jpeg.decode_crop_into(encoded, (0, 0, 2 * size - 1, 2 * size - 1), exact, "bicubic")
    jpeg.decode_crop_into(encoded, (0, 0, 2 * size - 1, 2 * size - 1), whole, "bicubic", "dct")
    assert torch.equal(exact, whole)
    with pytest.raises(ValueError, match="inside the 187x251 image"):
        jpeg.decode_crop_into(encoded, (10, 0, 181, 251), exact, "bicubic", "dct")


def with_sampling(encoded: bytes, factors: tuple[int, ...]) -> bytes:
    """The file with other sampling factors in its frame header, one byte for each component."""
    at = encoded.index(b"\xff\xc0")
    changed = bytearray(encoded)
    changed[at + 11 : at + 11 + 3 * len(factors) : 3] = bytes(factors)
    return bytes(changed)


SAMPLINGS = [
    (16 * across + down, chroma, chroma) for across in range(1, 5) for down in range(1, 5) for chroma in (17, 34)
]
ODD_SAMPLINGS = [
    *SAMPLINGS,
    (0x22, 0x21, 0x12),
    (0x11, 0x11, 0x21),
    (0x41, 0x12, 0x12),
    (0x00, 0x11, 0x11),
    (0x51, 0x11, 0x11),
]


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
def test_every_sampling_gives_the_pixels_of_pillow_or_is_refused(subsampling: str, photo: Image.Image) -> None:
    """Of 4:2:0 with 1 x 4 and 4 x 1 the scan stays sound: an MCU has four blocks of luma and two of chroma again."""
    sound = encode(photo.resize((160, 128)), "JPEG", quality=90, subsampling=subsampling)
    decoded = 0
    for factors in ODD_SAMPLINGS:
        encoded = with_sampling(sound, factors)
        try:
            expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        except Exception:  # Pillow raises almost anything on damaged data, and each is a refusal
            with pytest.raises(ValueError):
                jpeg.decode_rgb(encoded)
            continue
        decoded += 1
        assert jpeg.read_size(encoded) == (128, 160)
        np.testing.assert_array_equal(jpeg.decode_rgb(encoded), expected, err_msg=str(factors))
        np.testing.assert_array_equal(jpeg.decode_region(encoded, (3, 5, 60, 90)), expected[3:63, 5:95], str(factors))
        jpeg.decode_crop_into(encoded, (0, 0, 128, 160), torch.empty((3, 32, 40), dtype=torch.uint8), "bicubic", "dct")
    assert decoded >= 14


@pytest.mark.parametrize(("offset", "value"), [(4, 12), (4, 16), (9, 2), (9, 4)])
def test_odd_precision_or_number_of_components_is_refused_as_pillow_does(
    offset: int, value: int, photo: Image.Image
) -> None:
    encoded = bytearray(encode(photo, "JPEG", quality=90))
    encoded[encoded.index(b"\xff\xc0") + offset] = value
    with pytest.raises((OSError, SyntaxError)):
        Image.open(io.BytesIO(encoded)).load()
    for read in (jpeg.decode_rgb, lambda data: jpeg.decode_region(data, (0, 0, 8, 8))):
        with pytest.raises(ValueError):
            read(bytes(encoded))


def flat_arithmetic(side: int, marker: int = 0xC9) -> bytes:
    """A grey JPEG of some 100 bytes whatever its size: arithmetic coding writes nothing where nothing is unexpected."""

    def segment(marker: int, payload: bytes) -> bytes:
        return bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2, "big") + payload

    quantisation, frame = segment(0xDB, bytes([0] + [16] * 64)), struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0)
    scan = segment(0xDA, bytes((1, 1, 0, 0, 63, 0)))
    return b"\xff\xd8" + quantisation + segment(marker, frame) + scan + b"\xff\xd9"


def test_bound_on_pixels_for_each_byte_is_that_of_huffman_codes_alone() -> None:
    encoded = flat_arithmetic(600)
    assert jpeg.read_size(encoded) == (600, 600)
    np.testing.assert_array_equal(jpeg.decode_rgb(encoded), np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")))
    assert store_image(encoded, StoreOptions(seekable=True)).outcome == "kept: arithmetic"
    with pytest.raises(ValueError, match="65,500 x 65,500 pixels, and at most 134,217,728 are read"):
        jpeg.read_size(flat_arithmetic(65500))
    with pytest.raises(ValueError, match="pixels, which .* bytes do not hold"):
        jpeg.read_size(flat_arithmetic(600, marker=0xC0))
