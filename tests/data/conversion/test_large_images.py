"""Images that are larger than they look: one budget of pixels, by the header, wherever images are read."""

import os
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Tell
from tests.data.conversion.test_pixels import STEPS, photos, saved, tiff
from vitcomposer.cli import main
from vitcomposer.data.conversion.encode import StoreOptions, store_image
from vitcomposer.data.conversion.folders import read_file
from vitcomposer.data.conversion.sources import FolderSource
from vitcomposer.data.conversion.write import convert
from vitcomposer.data.files import crop_loader
from vitcomposer.data.jpeg import Reading, reading
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.labeled_sets import open_labelled_images

pytestmark = pytest.mark.timeout(120)


# Images of a few bytes that say they are large.


def peak(call: Callable[[], object]) -> float:
    """MB above those held before."""

    def held(key: str) -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("this system does not measure a peak anew")
    before = held("VmRSS")
    call()
    return (held("VmHWM") - before) / 1e3


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(height * (width + 1)) if width < 100 else bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def strips_at_one_place(width: int, height: int) -> bytes:
    """A TIFF whose strips of 64 rows are all the same few deflated bytes."""
    data = zlib.compress(bytes(64 * width))
    count, data = -(-height // 64), data + bytes(len(data) % 2)
    at = 8 + len(data) + 2 + 12 * 9 + 4
    values = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 278: 64}
    entries = [(tag, 1, value) for tag, value in values.items()] + [(273, count, at), (279, count, at + 4 * count)]
    directory = b"".join(struct.pack("<HHII", tag, 4, number, value) for tag, number, value in sorted(entries))
    head = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", 9) + directory + bytes(4)
    return head + struct.pack("<I", 8) * count + struct.pack("<I", len(data)) * count


def gif(screen: int, frame: int) -> bytes:
    data = bytearray(saved(Image.new("P", (1, 1)), "GIF"))
    data[6:10] = struct.pack("<HH", screen, screen)
    at = data.rindex(b",", 0, len(data) - 4)
    data[at + 5 : at + 9] = struct.pack("<HH", frame, frame)
    return bytes(data)


def webp(side: int) -> bytes:
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = bytearray(saved(images[0], "WEBP", save_all=True, append_images=images[1:]))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


def jpeg_2000(side: int) -> bytes:
    data = bytearray(saved(Image.new("RGB", (4, 4)), "JPEG2000"))
    at = data.index(b"ihdr") + 4
    data[at : at + 8] = struct.pack(">II", side, side)
    return bytes(data)


def large_jpeg() -> bytes:
    data = bytearray(saved(Image.new("RGB", (64, 64)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    "TIFF, strips at one place": lambda: strips_at_one_place(12000, 12000),
    "TIFF, one tile": lambda: tiff(bytes(64), 16, 16, 8, t322=30000, t323=30000, t324=8, t325=64),
    "PNG": lambda: png(12000, 12000),
    "PNG above Pillow's limit": lambda: png(1 << 30, 1 << 30),
    "GIF": lambda: gif(65535, 1),
    "GIF, larger frame": lambda: gif(1, 65535),
    "WebP": lambda: webp(16383),
    "JPEG": large_jpeg,
    "JPEG 2000": lambda: jpeg_2000(12000),
    "BMP": lambda: (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 154, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100)
    ),
    "PPM": lambda: b"P5 60000 60000 255\n" + bytes(100),
    "TGA": lambda: struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 65535, 65535, 24, 0) + bytes(100),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bomb_is_refused_by_its_header_everywhere(kind: str, tell: Tell) -> None:
    bomb = BOMBS[kind]()
    assert len(bomb) < 10_000

    def refused() -> None:
        for read in (
            jpeg.read_size,
            jpeg.decode_rgb,
            lambda data: jpeg.decode_region(data, (0, 0, 1, 1)),
            lambda data: store_image(data, StoreOptions(seekable=True)),
            lambda data: store_image(data, StoreOptions(raw_fraction=1.0)),
        ):
            with pytest.raises(
                ValueError, match=r"its header says .* pixels, .* are read.*--max-pixels .*data.max_pixels"
            ):
                read(bomb)

    began = time.monotonic()
    megabytes, seconds = peak(refused), time.monotonic() - began
    assert megabytes < 60 and seconds < 5
    tell(
        f"a {kind} of {len(bomb):,} bytes that would be gigabytes",
        f"refused by its header, {megabytes:.0f} MB",
        seconds,
    )


def test_canvas_of_every_kind_of_webp_is_that_of_pillow() -> None:
    image = Image.effect_noise((37, 53), 50)
    kinds: list[dict[str, object]] = [
        {},
        {"lossless": True},
        {"save_all": True, "append_images": [image.convert("RGB")]},
    ]
    for options in kinds:
        encoded = saved(image.convert("RGB"), "WEBP", **options)
        with reading(Reading(max_pixels=37 * 53 - 1)), pytest.raises(ValueError, match="says 37 x 53 pixels"):
            jpeg.read_size(encoded)
        assert jpeg.read_size(encoded) == (53, 37)


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_texts_and_profiles_of_a_png_cannot_fill_the_memory(kind: bytes) -> None:
    heads = {b"iCCP": b"x\0\0", b"zTXt": b"x\0\0", b"iTXt": b"x\0\1\0\0\0"}
    bomb = png(4, 4, chunk(kind, heads[kind] + zlib.compress(bytes(200 << 20))))

    def refused() -> None:
        with pytest.raises(ValueError, match="Decompressed data too large"):
            jpeg.decode_rgb(bomb)

    assert peak(refused) < 60


def test_of_many_frames_the_first_alone_is_decoded(tmp_path: Path) -> None:
    frames = [Image.new("L", (500, 500), value) for value in range(200)]
    for kind in ("GIF", "TIFF"):
        encoded = saved(frames[7], kind, save_all=True, append_images=frames)
        assert peak(lambda: jpeg.decode_rgb(encoded)) < 20  # noqa: B023
        assert jpeg.decode_rgb(encoded)[0, 0].tolist() == [7, 7, 7]


def test_limit_can_be_raised_and_lowered_for_conversion_eval_inspect_and_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = photos(tmp_path / "photos", np.uint8), str(tmp_path / "out")
    command = ["convert", "folder", str(root), out, "--workers", "1"]
    assert main([*command[:-3], f"{out}1", *command[-2:], "--max-pixels", "1599"]) == 2
    assert "40 x 40 pixels, and at most 1,599 are read" in capsys.readouterr().err
    assert main([*command, "--max-pixels", "1600"]) == 0
    assert main(["inspect", out, "--decode", "--max-pixels", "1599"]) == 1
    said = capsys.readouterr().err
    assert said.count("40 x 40 pixels, and at most 1,599 are read") == 10
    assert main(["inspect", out, "--decode"]) == 0  # what a command sets ends with it
    with reading(Reading(max_pixels=1599)):
        images = open_labelled_images(str(root), split="val", batch_size=4)
        options = {"image_size": 32, "crop_ratio": 1.0, "interpolation": "bicubic", "batch_size": 4, "workers": 0}
        (batch,) = crop_loader(images.samples, **options)
        assert len(batch["broken"]) == 4
        large = png(1600, 1)
        with pytest.raises(ValueError, match="1,600 x 1 pixels"):
            jpeg.read_size(large)
    with reading(Reading(max_pixels=1 << 40)), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jpeg.read_size(png(100_000, 100_000)) == (100_000, 100_000)


def test_training_takes_its_limit_from_the_configuration(tmp_path: Path) -> None:
    from vitcomposer.data.loader import open_dataset
    from vitcomposer.schema import Data

    convert(FolderSource(photos(tmp_path / "photos", np.uint8)), tmp_path / "out", workers=1)
    with reading(Reading()):
        data = Data(local=str(tmp_path / "out"), max_pixels=1599)
        dataset = open_dataset(data, "val", num_classes=2, batch_size=1, seed=0)
        with pytest.raises(ValueError, match="at most 1,599 are read"):
            jpeg.read_size(dataset[0]["image"])
    with pytest.raises(ValueError, match="data.max_pixels must be 1 or more, got 0"):
        Data(local="x", max_pixels=0)


def test_file_of_more_bytes_than_an_image_has_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").touch()
    os.truncate(tmp_path / "x.jpg", 1 << 40)
    with pytest.raises(ValueError, match="1,099,511,627,776 bytes, more than the largest image"):
        read_file(tmp_path / "x.jpg")


@pytest.mark.parametrize("field", [2, 3])
def test_tiff_with_damaged_tags_is_refused_with_a_reason(field: int) -> None:
    """Every tag with other types and counts: an image, or a ValueError."""
    sound = tiff(STEPS.astype("<u2").tobytes(), 6, 1, 16, t322=16, t323=16)
    at = struct.unpack_from("<I", sound, 4)[0] + 2
    for tag in range(11):
        for value in range(14):
            damaged = bytearray(sound)
            if field == 2:
                struct.pack_into("<H", damaged, at + 12 * tag + 2, value)
            else:
                struct.pack_into("<I", damaged, at + 12 * tag + 4, value)
            try:
                jpeg.read_size(bytes(damaged))
                jpeg.decode_rgb(bytes(damaged))
            except ValueError as error:
                assert str(error)
