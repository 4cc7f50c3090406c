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

from vitcomposer.data import jpeg


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
    with pytest.raises(ValueError, match="no known image format"):
        jpeg.read_size(encoded)
    with pytest.raises(ValueError, match="no known image format"):
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
