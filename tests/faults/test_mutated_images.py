"""Mutated images through conversion: what Pillow refuses is stored in no way, what is stored is read as Pillow does.

A fresh ``Image.open(...).load()`` is the verdict, with LOAD_TRUNCATED_IMAGES off, for both splits and every option.
"""

import io
import random
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFile

from benchmarks.faults.mutations import MUTATIONS, mutated_image, originals
from tests.faults.conftest import Tell
from vitcomposer.data.conversion.encode import StoreOptions, store_image
from vitcomposer.data.conversion.inspect import _decoding_fault
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.jpeg.markers import read_index
from vitcomposer.data.jpeg.pixels import image_formats
from vitcomposer.data.jpeg.region import decodes_to
from vitcomposer.data.jpeg.seekable import make_seekable

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged EXIF and TIFF tags

OPTIONS = {
    "train": StoreOptions(seekable=True),
    "val, or --no-seekable": StoreOptions(seekable=False),
    "--raw-below": StoreOptions(seekable=True, raw_below=24),
    "--short-side --quality": StoreOptions(seekable=True, short_side=40, quality=90),
    "--reencode": StoreOptions(seekable=True, reencode=90),
    "--no-seekable --reencode --raw-below": StoreOptions(seekable=False, reencode=90, raw_below=24),
    "--raw-fraction": StoreOptions(raw_fraction=1.0),
}
BOUNDS = ("bytes do not hold", "--max-pixels")  # more pixels than bytes can hold, or than are read: refusals of ours


def pillow_pixels(data: bytes) -> np.ndarray | None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with Image.open(io.BytesIO(data), formats=image_formats()) as image:
            image.load()
            return np.asarray(image.convert("RGB"))
    except Exception:  # Pillow raises almost anything on damaged data, and each is a refusal
        return None


def check_read(stored: bytes, pixels: np.ndarray, rng: random.Random) -> None:
    """A box, as training reads it, and the whole, as evaluation does, are Pillow's of the file before conversion."""
    height, width = pixels.shape[:2]
    top, left = rng.randrange(height), rng.randrange(width)
    box = top, left, rng.randint(1, height - top), rng.randint(1, width - left)
    assert np.array_equal(jpeg.decode_region(stored, box), pixels[top : top + box[2], left : left + box[3]])
    assert np.array_equal(jpeg.decode_rgb(stored), pixels)


def judge(data: bytes, rng: random.Random) -> str:
    """Whether the image was stored, after a check that every way of storing and reading it judges as Pillow does."""
    pixels = pillow_pixels(data)
    bounded = False
    for name, options in OPTIONS.items():
        try:
            stored = store_image(data, options, "x")
        except ValueError as error:
            bounded = any(bound in str(error) for bound in BOUNDS)
            assert pixels is None or bounded, f"{name}: refused, and Pillow reads it: {error}"
            continue
        assert pixels is not None, f"{name}: stored as {stored.outcome!r}, and Pillow refuses it"
        if options.short_side is None and options.reencode is None:
            check_read(stored.columns[0], pixels, rng)
    fault = _decoding_fault({"image": ("bytes", data)})  # as inspect judges, and as evaluation and predict do
    left_out = fault is not None and "cannot be decoded" in fault
    assert left_out == (pixels is None or bounded)
    if left_out and read_index(data) is None:  # and training, whose region decoder trusts an index that fits
        with pytest.raises(ValueError):
            height, width = jpeg.read_size(data)
            jpeg.decode_region(data, (0, 0, -(-height // 2), -(-width // 2)))
    return "left out" if left_out else "stored"


def judge_all(seed: int, count: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for number in range(count):
        mutation, data, _ = mutated_image(seed, number)
        if data[:4] == b"\x00RAW":  # no file that anybody converts
            continue
        try:
            outcomes[judge(data, random.Random(number))] += 1
        except AssertionError as error:
            raise AssertionError(f"image {number} ({mutation}): {error}") from error
    return outcomes


def test_conversion_stores_no_image_that_pillow_refuses(tell: Tell) -> None:
    began = time.monotonic()
    outcomes = judge_all(5, 150)
    assert outcomes["stored"] > 60 and outcomes["left out"] > 40
    seen = (
        f"{outcomes['left out']} left out in both splits and by every option, as Pillow refuses them, 0 more or fewer"
    )
    tell("150 damaged images through conversion", seen, time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_conversion_stores_none_of_3000_images_that_pillow_refuses() -> None:
    outcomes = judge_all(6, 3000)
    assert outcomes["stored"] > 1200 and outcomes["left out"] > 800


def other_formats() -> list[bytes]:
    """Sound images in every format but JPEG, of several modes each."""
    with Image.open(io.BytesIO(originals()["PNG"])) as file:
        photo = file.convert("RGB")
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    every = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
    kinds = {
        "PNG": every[:6],
        "WEBP": ("RGB", "RGBA"),
        "GIF": ("L", "P"),
        "BMP": ("1", "L", "P", "RGB"),
        "PPM": ("L", "RGB"),
    }
    kinds |= {"TIFF": every, "TGA": ("L", "RGB", "RGBA"), "JPEG2000": ("L", "RGB", "RGBA"), "AVIF": ("RGB",)}
    found = []
    for kind, modes in kinds.items():
        for mode in modes if kind in image_formats() else ():
            buffer = io.BytesIO()
            photo.convert(mode).save(buffer, kind)
            found.append(buffer.getvalue())
    return found


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_conversion_judges_other_formats_as_pillow_does(count: int) -> None:
    files = other_formats()
    names = [name for name in MUTATIONS if "restart" not in name and "random" not in name]
    outcomes: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(number)
        data, mutation = rng.choice(files), rng.choice(names)
        try:
            outcomes[judge(MUTATIONS[mutation](data, rng), rng)] += 1
        except AssertionError as error:
            raise AssertionError(f"image {number} ({mutation} of {data[:12]!r}): {error}") from error
    assert min(outcomes["stored"], outcomes["left out"]) > count // 10, outcomes


def with_coarse_tables(seed: int) -> bytes:
    """A JPEG with quantisation tables of 255 and bits flipped in its scan: coefficients leave 16 bits."""
    pixels = np.random.default_rng(0).integers(0, 2, (30, 40, 3), dtype=np.uint8) * 255
    image = Image.fromarray(pixels).resize((160, 120), Image.Resampling.NEAREST)
    image = image.convert("L") if seed % 3 == 2 else image
    buffer = io.BytesIO()
    tables = [[255] * 64] * (1 if image.mode == "L" else 2)
    image.save(buffer, "JPEG", qtables=tables, subsampling=(0, 2, -1)[seed % 3])
    encoded, rng = bytearray(buffer.getvalue()), random.Random(seed)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        encoded[rng.randrange(encoded.index(b"\xff\xda") + 14, len(encoded) - 2)] ^= 1 << rng.randrange(8)
    return bytes(encoded)


def test_file_whose_region_decode_would_differ_is_kept_as_it_came() -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(150):
        data = with_coarse_tables(seed)
        pixels = pillow_pixels(data)
        if pixels is None:
            continue
        stored = store_image(data, OPTIONS["train"])
        check_read(stored.columns[0], pixels, random.Random(seed))
        outcomes[stored.outcome] += 1
        if stored.outcome == "kept: pixels would differ":
            assert stored.columns == (data,)
            seekable = make_seekable(data).data  # of somebody who does not look
            assert read_index(seekable) is not None and not decodes_to(seekable, pixels)
            for options in OPTIONS.values():
                if options.short_side is None:
                    check_read(store_image(seekable, options).columns[0], pixels, random.Random(seed))
    assert outcomes["kept: pixels would differ"] >= 5 and outcomes["seekable"] >= 50, outcomes


def test_index_of_somebody_else_that_leads_astray_is_not_followed() -> None:
    """Two segments of one length change places: the file is sound to its hashes and libjpeg, the index too."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    sound = make_seekable(buffer.getvalue()).data
    index = read_index(sound)
    assert index is not None
    wrong = bytearray(sound)
    at = 6 + 24  # the first two lengths change places
    wrong[at : at + 4] = wrong[at + 2 : at + 4] + wrong[at : at + 2]
    assert index.lengths[0] != index.lengths[1]
    pixels = pillow_pixels(bytes(wrong))
    assert pixels is not None and not decodes_to(bytes(wrong), pixels)
    assert "an index that does not lead to its pixels" in (_decoding_fault({"image": ("bytes", bytes(wrong))}) or "")
    assert _decoding_fault({"image": ("bytes", sound)}) is None
    kept = store_image(bytes(wrong), OPTIONS["val, or --no-seekable"])
    assert kept.outcome == "kept" and read_index(kept.columns[0]) is None and len(kept.columns[0]) == len(wrong)
    assert np.array_equal(jpeg.decode_rgb(kept.columns[0]), pixels)
    made = store_image(bytes(wrong), OPTIONS["train"])
    assert made.outcome == "seekable" and made.columns[0] == sound
    assert store_image(sound, OPTIONS["val, or --no-seekable"]).columns == (sound,)
