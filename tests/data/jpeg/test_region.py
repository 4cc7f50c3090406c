"""The region decode against full decode and slice, on every kind of JPEG, and on damaged ones."""

import io
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_image

from vitcomposer.data.boxes import Box
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.jpeg.region import decode_seekable

SAMPLINGS = {"4:4:4": "4:4:4", "4:2:2": "4:2:2", "4:2:0": "4:2:0", "4:4:0": "4:4:0", "gray": None}
UNITS = {"4:4:4": (8, 8), "4:2:2": (16, 8), "4:2:0": (16, 16), "4:4:0": (8, 16), "gray": (8, 8)}
SIZES = [(1, 1), (5, 7), (31, 17), (3, 200), (64, 2), (16, 16), (97, 131), (130, 66), (40, 333)]  # height, width


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    china = load_sample_image("china.jpg")
    rng = np.random.default_rng(seed)
    top, left = int(rng.integers(428 - height)), int(rng.integers(641 - width))
    grain = rng.normal(0, 6, (height, width, 3))
    return (china[top : top + height, left : left + width] + grain).clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, sampling: str, per_segment: int | None = None, **options: object) -> bytes:
    """Baseline JPEG, with restart markers every per_segment MCUs; Pillow has no 4:4:0, simplejpeg no markers."""
    restart = {} if per_segment is None else {"restart_marker_blocks": per_segment}
    image = Image.fromarray(pixels).convert("L") if sampling == "gray" else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, "subsampling": SAMPLINGS[sampling] or -1, **restart, **options})
    return buffer.getvalue()


def with_index(file: bytes) -> bytes:
    """A file with restart markers, made seekable after the format's description, not with the package's writer."""
    at = 2
    across = down = 8
    interval = height = width = 0
    while True:
        marker, size = file[at + 1], int.from_bytes(file[at + 2 : at + 4], "big")
        if marker in (0xC0, 0xC1):
            height, width = struct.unpack_from(">HH", file, at + 5)
            if file[at + 9] == 3:
                across, down = 8 * (file[at + 11] >> 4), 8 * (file[at + 11] & 15)
        elif marker == 0xDD:
            interval = int.from_bytes(file[at + 4 : at + 6], "big")
        at += 2 + size
        if marker == 0xDA:
            break
    lengths, start, end = [], at, at
    while True:
        end = file.index(b"\xff", end)
        if file[end + 1] == 0:
            end += 2
            continue
        lengths.append(end - start)
        if file[end + 1] == 0xD9:
            break
        start = end = end + 2
    columns, rows = -(-width // across), -(-height // down)
    assert columns % interval == 0 and len(lengths) == columns // interval * rows
    size = 22 + 2 * len(lengths)
    head = struct.pack("<8sHHHHI", b"vitseek1", interval, columns // interval, rows, 0, at + size + 2)
    return (
        file[:2] + b"\xff\xeb" + struct.pack(">H", size) + head + struct.pack(f"<{len(lengths)}H", *lengths) + file[2:]
    )


def seekable(pixels: np.ndarray, sampling: str, per_segment: int, **options: object) -> bytes:
    return with_index(encode(pixels, sampling, per_segment, **options))


def draw_box(rng: random.Random, height: int, width: int) -> Box:
    box_height, box_width = rng.randint(1, height), rng.randint(1, width)
    if rng.random() < 0.3:
        box_height, box_width = min(box_height, 3), min(box_width, 3)
    return rng.randint(0, height - box_height), rng.randint(0, width - box_width), box_height, box_width


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def assert_region_is_the_slice(file: bytes, full: np.ndarray, box: Box) -> None:
    top, left, height, width = box
    region = decode_seekable(file, box)
    assert region is not None, "the kernel refused a file it should read"
    np.testing.assert_array_equal(region, full[top : top + height, left : left + width], err_msg=str(box))


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0", "gray"])
@pytest.mark.parametrize("size", SIZES)
def test_region_equals_full_decode_and_slice(sampling: str, size: tuple[int, int]) -> None:
    rng = random.Random(f"{sampling}{size}")
    height, width = size
    columns = -(-width // UNITS[sampling][0])
    for trial in range(8):
        options = {"quality": rng.choice([5, 30, 75, 90, 95, 100]), "optimize": rng.random() < 0.5}
        file = seekable(photo(height, width, trial), sampling, rng.choice(divisors(columns)), **options)
        full = jpeg.decode_rgb(file)
        np.testing.assert_array_equal(full, np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))
        for _ in range(16):
            assert_region_is_the_slice(file, full, draw_box(rng, height, width))
        assert_region_is_the_slice(file, full, (0, 0, height, width))


def transposed_sampling(file: bytes) -> bytes:
    """Bytes of a 4:2:2 file whose header says 4:4:0: another image, but a valid one of as many MCUs if it is square."""
    changed = bytearray(file)
    at = file.index(b"\xff\xc0") + 11
    assert changed[at] == 0x21
    changed[at] = 0x12
    return bytes(changed)


@pytest.mark.parametrize("units", [(1, 2), (2, 4), (8, 16), (5, 10)])
def test_vertical_chroma_sampling_equals_full_decode(units: tuple[int, int]) -> None:
    # Nobody here writes 4:4:0, so its stream is that of a 4:2:2 file with as many MCUs in the other arrangement.
    rows, columns = units
    rng = random.Random(rows)
    square = photo(8 * columns, 16 * rows * 2, rows)[: 8 * columns, : 8 * columns]
    plain = transposed_sampling(encode(square, "4:2:2", 1))
    for trim in (0, 3, 8):
        file = bytearray(plain)
        at = plain.index(b"\xff\xc0") + 5
        struct.pack_into(">HH", file, at, 16 * (columns // 2) - trim, 8 * columns - min(trim, 7))
        file = with_index(bytes(file))
        full = jpeg.decode_rgb(file)
        for _ in range(40):
            assert_region_is_the_slice(file, full, draw_box(rng, *full.shape[:2]))


@pytest.mark.parametrize("sampling", ["4:2:0", "4:4:4"])
def test_region_of_a_photo_equals_full_decode_and_slice(sampling: str) -> None:
    rng = random.Random(5)
    file = seekable(photo(375, 500), sampling, 2 if sampling == "4:2:0" else 3, quality=95)
    full = jpeg.decode_rgb(file)
    for box in [(0, 0, 375, 500), *(draw_box(rng, 375, 500) for _ in range(120))]:
        assert_region_is_the_slice(file, full, box)
        assert_region_is_the_slice(memoryview(bytearray(file)), full, box)  # pyright: ignore[reportArgumentType]


def test_tables_of_one_file_do_not_serve_another() -> None:
    files = [seekable(photo(64, 96, n), "4:2:0", 2, quality=20 + 20 * n, optimize=n % 2 == 0) for n in range(4)]
    full = [jpeg.decode_rgb(file) for file in files]
    for n in (0, 1, 2, 3, 0, 2, 1, 3, 0):
        assert_region_is_the_slice(files[n], full[n], (5, 9, 50, 70))
    without = files[1].replace(b"\xff\xc4", b"\xff\xe4")  # its tables have become unknown segments
    assert decode_seekable(without, (0, 0, 8, 8)) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: encode(photo(48, 64), "4:2:0"), "no index"),
        (lambda f: encode(photo(48, 64), "4:2:0", progressive=True), "progressive"),
        (lambda f: f[:18] + b"\x05\x00" + f[20:], "rows disagree with the header"),
        (lambda f: f[:14] + b"\x01\x00" + f[16:], "interval disagrees with DRI"),
        (lambda f: f[:22] + b"\x00\x01" + f[24:], "scan offset disagrees with SOS"),
        (lambda f: f[:26] + struct.pack("<H", struct.unpack_from("<H", f, 26)[0] - 1) + f[28:], "length off by one"),
        (lambda f: f[:-40], "truncated"),
        (lambda f: b"", "empty"),
        (lambda f: f[:30], "cut in the index"),
    ],
)
def test_what_is_not_a_sound_seekable_file_is_refused(change, why: str) -> None:  # noqa: ANN001
    file = seekable(photo(48, 64), "4:2:0", 2)
    assert decode_seekable(file, (0, 0, 48, 64)) is not None
    assert decode_seekable(change(file), (0, 0, 48, 64)) is None, why


@pytest.mark.parametrize("box", [(0, 0, 49, 10), (40, 0, 9, 10), (-1, 0, 5, 5), (0, 60, 5, 5), (0, 0, 0, 5)])
def test_box_outside_a_seekable_image_raises(box: Box) -> None:
    with pytest.raises(ValueError, match="inside the 48x64 image"):
        jpeg.decode_region(seekable(photo(48, 64), "4:2:0", 2), box)


def test_damage_outside_the_box_is_not_read_and_inside_gives_the_pixels_of_the_whole_decode() -> None:
    file = bytearray(seekable(photo(128, 128), "4:2:0", 2))
    full = jpeg.decode_rgb(bytes(file))
    lengths = struct.unpack_from("<32H", file, 26)
    scan = struct.unpack_from("<I", file, 22)[0]
    last = scan + sum(lengths[:31]) + 2 * 31
    file[last + 4 : last + 12] = bytes(8)
    assert_region_is_the_slice(bytes(file), full, (0, 0, 100, 90))
    damaged = jpeg.decode_region(bytes(file), (100, 90, 28, 38))
    np.testing.assert_array_equal(damaged, jpeg.decode_rgb(bytes(file))[100:128, 90:128])


def mutations(file: bytes, count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        changed = bytearray(file)
        kind = rng.random()
        limit = 700 if kind < 0.5 else len(changed)  # half of them in the index and the headers
        for _ in range(rng.choice([1, 1, 2, 8])):
            changed[rng.randrange(limit)] = rng.choice([0, 255, rng.randrange(256)])
        result.append(bytes(changed[: rng.randrange(len(changed))] if rng.random() < 0.15 else changed))
    return result


def check_mutations(count: int) -> int:
    """Every mutated file gives pixels of the right shape or ValueError; the number of files that gave pixels."""
    rng, decoded = random.Random(1), 0
    for sampling, per_segment in (("4:2:0", 2), ("4:4:4", 4), ("gray", 1), ("4:2:2", 1)):
        file = seekable(photo(48, 64), sampling, per_segment)
        for changed in mutations(file, count // 4, per_segment):
            box = draw_box(rng, 48, 64)
            region = decode_seekable(changed, box)
            assert region is None or region.shape == (*box[2:], 3)
            try:
                assert jpeg.decode_region(changed, box).shape == (*box[2:], 3)
                decoded += 1
            except ValueError:
                pass
    return decoded


def test_mutated_files_give_the_right_shape_or_raise() -> None:
    # In a process of its own: a read out of bounds would end that process, not this one.
    code = "from tests.data.jpeg.test_region import check_mutations; print('decoded', check_mutations(4000))"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) > 400


def test_header_that_claims_a_huge_image_is_refused_at_once() -> None:
    file = bytearray(seekable(photo(16, 16), "gray", 2))
    at = bytes(file).index(b"\xff\xc0") + 5
    struct.pack_into(">HH", file, at, 65535, 65535)
    assert decode_seekable(bytes(file), (0, 0, 65535, 65535)) is None
    with pytest.raises(ValueError):
        jpeg.decode_region(bytes(file), (0, 0, 65535, 65535))


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0", "gray"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}, {"restart_marker_blocks": 3}])
def test_files_without_an_index_equal_full_decode_and_slice(sampling: str, options: dict) -> None:
    rng = random.Random(3)
    for size in [(1, 1), (31, 17), (97, 131)]:
        file = encode(photo(*size), sampling, **options)
        full = simplejpeg.decode_jpeg(file, colorspace="RGB")
        for _ in range(25):
            top, left, height, width = draw_box(rng, *size)
            region = jpeg.decode_region(file, (top, left, height, width))
            np.testing.assert_array_equal(region, full[top : top + height, left : left + width])
