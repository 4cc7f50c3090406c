"""Pixels of every mode, computed by hand, the same by every way in; images too large to be read are refused unread."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.conversion.conversion import read_shards
from vitcomposer.cli import main
from vitcomposer.data.conversion.encode import StoreOptions, store_image
from vitcomposer.data.conversion.sources import FolderSource
from vitcomposer.data.conversion.write import convert
from vitcomposer.data.files import crop_loader
from vitcomposer.data.jpeg import Reading, reading
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.jpeg.raw import raw_sample
from vitcomposer.data.labeled_sets import open_labelled_images

pytestmark = pytest.mark.timeout(120)

STEPS = np.array([[0, 128, 129, 257, 32768, 65535]])  # of 16 bits
STEPS_AS_8 = [0, 0, 1, 1, 128, 255]  # / 257, rounded: 128 is 0.498 of a step, 129 is 0.502


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(pixels: bytes, width: int, height: int, bits: int, order: str = "<", **tags: int) -> bytes:
    """One strip of one channel as it lies. ``tags`` are t + number."""
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    directory = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(pixels))
    return head + pixels + struct.pack(f"{order}H", len(entries)) + directory + bytes(4)


def grey(values: list[int]) -> list[list[int]]:
    return [[value] * 3 for value in values]


def twelve_bits() -> bytes:
    return tiff(bytes([0x00, 0x08, 0x08, 0xFF, 0xF0, 0x00]), 4, 1, 12)  # 0, 2056, 4095, 0


def palette_with_alpha() -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 0])
    image.putdata([1, 0])
    return saved(image, "PNG", transparency=bytes([0, 128]))


def cmyk(**options: object) -> bytes:
    image = Image.new("CMYK", (8, 8), (10, 20, 30, 40))
    return saved(image, "JPEG", quality=100, subsampling=0, **options)


MODES: dict[str, tuple[Callable[[], bytes], list[list[int]]]] = {
    "I;16, PNG": (lambda: saved(Image.fromarray(STEPS.astype(np.uint16)), "PNG"), grey(STEPS_AS_8)),
    "I;16, TIFF": (lambda: tiff(STEPS.astype("<u2").tobytes(), 6, 1, 16), grey(STEPS_AS_8)),
    "I;16B, TIFF": (lambda: tiff(STEPS.astype(">u2").tobytes(), 6, 1, 16, ">"), grey(STEPS_AS_8)),
    "I;16, white is zero": (
        lambda: tiff(STEPS.astype("<u2").tobytes(), 6, 1, 16, t262=0),
        grey([255 - value for value in STEPS_AS_8]),
    ),
    "I;16 of 12 bits": (twelve_bits, grey([0, 128, 255, 0])),
    "I, PGM of 16 bits": (lambda: b"P5 6 1 65535\n" + STEPS.astype(">u2").tobytes(), grey(STEPS_AS_8)),
    "I, PGM of 12 bits": (lambda: b"P5 3 1 4095\n" + struct.pack(">3H", 0, 2048, 4095), grey([0, 128, 255])),
    "I;16, JPEG 2000": (lambda: saved(Image.fromarray(STEPS.astype(np.uint16)), "JPEG2000"), grey(STEPS_AS_8)),
    "LA": (lambda: saved(Image.frombytes("LA", (2, 1), bytes([10, 0, 200, 99])), "PNG"), grey([10, 200])),
    "P with alpha": (palette_with_alpha, [[200, 100, 0], [10, 20, 30]]),
    # 255 - 40 = 215, of which the inks take 10 / 255, 20 / 255 and 30 / 255: 8, 17 and 25.
    "CMYK as Adobe inverts it": (cmyk, [[207, 198, 190]] * 8),
    "CMYK with a profile": (lambda: cmyk(icc_profile=bytes(400)), [[207, 198, 190]] * 8),
    "1 bit": (
        lambda: saved(Image.frombytes("1", (8, 1), bytes([0b10110001])), "PNG"),
        grey([255, 0, 255, 255, 0, 0, 0, 255]),
    ),
    "1 bit, white is zero": (
        lambda: tiff(bytes([0b10110001]), 8, 1, 1, t262=0),
        grey([0, 255, 0, 0, 255, 255, 255, 0]),
    ),
    "RGBA": (
        lambda: saved(Image.frombytes("RGBA", (2, 1), bytes([1, 2, 3, 0, 4, 5, 6, 99])), "PNG"),
        [[1, 2, 3], [4, 5, 6]],
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_mode_has_its_pixels_in_training_in_conversion_and_beside_it(mode: str, tmp_path: Path) -> None:
    make, expected = MODES[mode]
    encoded = make()
    assert jpeg.decode_rgb(encoded)[0].tolist() == expected
    for options in (StoreOptions(raw_fraction=1.0), StoreOptions(raw_below=1 << 20)):
        stored = store_image(encoded, options).columns[-1]
        assert jpeg.decode_rgb(stored)[0].tolist() == expected
    kept = store_image(encoded, StoreOptions(seekable=True)).columns[0]
    assert jpeg.decode_rgb(kept)[0].tolist() == expected
    height, width = jpeg.read_size(encoded)
    assert jpeg.decode_region(encoded, (0, 0, 1, width))[0].tolist() == expected and height in (1, 8)


UNKNOWN = {
    "I, TIFF": (lambda: saved(Image.fromarray(np.array([[-100, 0, 1000, 2000]], np.int32)), "TIFF"), "32-bit integers"),
    "F, TIFF": (lambda: saved(Image.fromarray(np.array([[-100, 0, 1000, 2000]], np.float32)), "TIFF"), "floats"),
    "F, PFM": (lambda: b"Pf\n4 1\n-1\n" + np.array([-100, 0, 1000, 2000], "<f4").tobytes(), "floats"),
    "I, TIFF of signed 16 bits": (
        lambda: tiff(np.array([-100, 0, 1000, 2000], "<i2").tobytes(), 4, 1, 16, t339=2),
        "32-bit integers",
    ),
}


@pytest.mark.parametrize("mode", UNKNOWN)
def test_values_without_a_known_range_are_refused_and_scaled_by_the_one_given(mode: str) -> None:
    encoded = UNKNOWN[mode][0]()
    for read in (jpeg.read_size, jpeg.decode_rgb, lambda data: store_image(data, StoreOptions())):
        with pytest.raises(ValueError, match=f"{UNKNOWN[mode][1]} have no range that is known.* --range LOW HIGH"):
            read(encoded)
    with reading(Reading(value_range=(0, 1000))):
        assert jpeg.decode_rgb(encoded)[0].tolist() == grey([0, 0, 255, 255])
        stored = store_image(encoded, StoreOptions(reading=Reading(value_range=(0, 1000))))
    assert stored.outcome == f"{UNKNOWN[mode][1]}, 0 to 1000 scaled to 8 bits"
    assert jpeg.decode_rgb(stored.columns[0])[0].tolist() == grey([0, 0, 255, 255])  # and needs no range any more


def test_range_holds_for_16_bits_too_and_odd_floats_are_refused() -> None:
    encoded = saved(Image.fromarray(np.array([[100, 150, 200, 4000]], np.uint16)), "PNG")
    with reading(Reading(value_range=(100, 200))):
        assert jpeg.decode_rgb(encoded)[0].tolist() == grey([0, 128, 255, 255])
        odd = saved(Image.fromarray(np.array([[1, np.nan]], np.float32)), "TIFF")
        with pytest.raises(ValueError, match="infinite or no numbers"):
            jpeg.decode_rgb(odd)
    for low, high in ((1, 1), (2, 1), (0, float("inf"))):
        with pytest.raises(ValueError, match="--range must be two numbers, the lower first"):
            Reading(value_range=(low, high))


def test_pil_columns_of_others_are_scaled_or_refused_alike() -> None:
    def column(values: np.ndarray) -> bytes:
        from streaming.base.format.mds.encodings import mds_encode

        return raw_sample(memoryview(mds_encode("pil", Image.fromarray(values))))

    assert jpeg.decode_rgb(column(STEPS.astype(np.uint16)))[0].tolist() == grey(STEPS_AS_8)
    with pytest.raises(ValueError, match="floats have no range that is known"):
        jpeg.decode_rgb(column(np.ones((2, 2), np.float32)))


def photos(root: Path, dtype: type) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        for label in range(2):
            (root / split / f"{label}").mkdir(parents=True)
            for number in range(count):
                value = 1000 * label + 100 * number + 7 * (split == "val")
                values = np.full((40, 40), value if dtype != np.uint8 else value % 256, dtype)
                (root / split / f"{label}" / f"{number}.tiff").write_bytes(saved(Image.fromarray(values), "TIFF"))
    return root


def evaluated(root: Path) -> list[int]:
    images = open_labelled_images(str(root), split="val", batch_size=4)
    (batch,) = crop_loader(
        images.samples, image_size=32, crop_ratio=1.0, interpolation="bicubic", batch_size=4, workers=0
    )
    assert not batch["broken"]
    return batch["image"][:, 0, 0, 0].tolist()


def test_eval_on_folders_sees_what_convert_stores_and_inspect_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = photos(tmp_path / "photos", np.float32), tmp_path / "out"
    with pytest.raises(ValueError, match="floats have no range that is known"):
        convert(FolderSource(root), tmp_path / "refused", workers=1)
    command = ["convert", "folder", str(root), str(out), "--workers", "1", "--details", "--range", "0", "2000"]
    assert main(command) == 0
    assert "floats, 0 to 2000 scaled to 8 bits: 6 of 6" in capsys.readouterr().out
    stored = [int(jpeg.decode_rgb(data)[0, 0, 0]) for data, _ in read_shards(out, "val")]
    with reading(Reading(value_range=(0, 2000))):
        assert sorted(evaluated(root)) == sorted(stored) == [1, 14, 128, 141]  # 7, 107, 1007, 1107 of 2000
    assert main([*command[:-1], "3000"]) == 2
    assert "--range was [0.0, 2000.0] and is [0.0, 3000.0]" in capsys.readouterr().err
    plain = photos(tmp_path / "16", np.uint16)
    assert main(["convert", "folder", str(plain), f"{out}16", "--workers", "1", "--details"]) == 0
    assert "kept: values of 16 bits, scaled to 8 bits by 255 / 65,535 when read: 6 of 6" in capsys.readouterr().out
    assert main(["inspect", f"{out}16", "--decode"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "6 values of 16 bits, scaled to 8 bits by 255 / 65,535, of 6 samples read" in said
