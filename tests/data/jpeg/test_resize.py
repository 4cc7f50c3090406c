"""The resize against that of Pillow 13, bit for bit."""

import ctypes
import mmap
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vitcomposer.data.jpeg.resize import resize_rgb

FILTERS = {True: Image.Resampling.BICUBIC, False: Image.Resampling.BILINEAR}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Half of it black and white, which overshoots most."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    extreme = rng.integers(0, 2, (height, width, 1), dtype=np.uint8)
    return np.where(extreme == 1, pixels // 128 * 255, pixels).astype(np.uint8)


def check(pixels: np.ndarray, rows: int, columns: int, bicubic: bool) -> None:
    out = np.full((rows, columns, 3), 99, np.uint8)
    resize_rgb(pixels, out, bicubic)
    reference = Image.fromarray(np.ascontiguousarray(pixels)).resize((columns, rows), FILTERS[bicubic])
    np.testing.assert_array_equal(out, np.asarray(reference), str((pixels.shape, rows, columns, bicubic)))


@pytest.mark.parametrize("bicubic", [True, False])
@pytest.mark.parametrize("target", [224, 160, 128, 96, 32])
def test_resize_equals_pillow_at_the_sizes_of_training(target: int, bicubic: bool) -> None:
    draw = random.Random(target)
    for seed in range(12):
        check(noise(draw.randint(40, 520), draw.randint(40, 520), seed), target, target, bicubic)


@pytest.mark.parametrize("bicubic", [True, False])
def test_resize_equals_pillow_at_any_size(bicubic: bool) -> None:
    draw = random.Random(7)
    for seed in range(150):
        height, width, rows, columns = (draw.choice([draw.randint(1, 9), draw.randint(1, 150)]) for _ in range(4))
        check(noise(height, width, seed), rows, columns, bicubic)


@pytest.mark.parametrize("bicubic", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (1, 1, 224, 224),
        (1, 500, 16, 224),
        (500, 1, 224, 3),
        (64, 64, 64, 64),
        (64, 90, 64, 33),
        (90, 64, 33, 64),
        (17, 5, 100, 101),
        (1000, 41, 8, 8),  # many weights; more rows than a tile has
        (130, 4000, 24, 24),  # tiles of 64 rows
        (385, 520, 224, 1),
    ],
)
def test_resize_equals_pillow_at_the_edges(height: int, width: int, rows: int, columns: int, bicubic: bool) -> None:
    check(noise(height, width), rows, columns, bicubic)


@pytest.mark.parametrize("bicubic", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        # The height loses twice what the width loses, then a row more: from there on Pillow begins with the rows.
        (160, 130, 100, 100),
        (161, 130, 100, 100),
        # The width stays or grows: from the first row less on.
        (100, 90, 100, 100),
        (101, 90, 100, 100),
        (101, 100, 100, 100),
        (700, 100, 8, 101),  # many weights
        (1200, 3, 5, 1),
        (2, 1, 1, 5),
    ],
)
def test_rows_come_first_where_pillow_begins_with_them(
    height: int, width: int, rows: int, columns: int, bicubic: bool
) -> None:
    check(noise(height, width), rows, columns, bicubic)


def test_no_byte_behind_the_image_is_read() -> None:
    """Rows that come first are read where they lie: here before a page that may not be read, which ends the process."""
    page = mmap.PAGESIZE
    for height, width, rows in [(400, 60, 224), (64, 30, 40), (1500, 21, 9), (3, 2, 1), (2, 1, 1)]:
        pixels = noise(height, width)
        size = -(-pixels.nbytes // page) * page
        memory = mmap.mmap(-1, size + page)
        whole = np.frombuffer(memory, np.uint8)
        whole[size - pixels.nbytes : size] = pixels.reshape(-1)
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.ctypes.data + size), page, 0) == 0
        check(whole[size - pixels.nbytes : size].reshape(pixels.shape), rows, width, True)


def test_one_level_everywhere_stays_that_level() -> None:
    for level in (0, 1, 127, 254, 255):
        check(np.full((173, 211, 3), level, np.uint8), 96, 160, True)


def test_slices_and_read_only_memory_are_read_where_they_lie() -> None:
    whole = noise(190, 230)
    whole.setflags(write=False)
    for pixels in (whole, whole[10:150, 20:130], whole[5:6, 3:200], whole[:, 7:8], whole[189:, 229:]):
        check(pixels, 64, 48, True)
    check(whole[::-1, ::2], 64, 48, True)
    check(whole[:, :, ::-1], 64, 48, False)


def test_a_small_image_after_a_large_one_is_not_disturbed_by_what_was_there() -> None:
    for height, width in [(400, 500), (3, 2), (1, 1), (20, 300)]:
        check(noise(height, width), 50, 51, True)


def test_threads_do_not_share_scratch_memory() -> None:
    images = [noise(100 + 7 * i, 260 - 9 * i, i) for i in range(16)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda pixels: check(pixels, 112, 96, True), images * 3))
