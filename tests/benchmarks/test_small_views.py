"""Small views against those of the whole image, on made photographs."""

import io

import numpy as np
from PIL import Image

from benchmarks.input.small_views import CROPS, measure


def photo(seed: int, width: int, height: int) -> bytes:
    """Smooth colours: what a smaller image keeps."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=97)
    return buffer.getvalue()


def test_small_views_are_the_same_region_of_the_whole_image() -> None:
    found = measure([photo(0, 500, 375), photo(1, 375, 500), photo(2, 150, 150)], 96)
    assert (found["side"], found["photos"], found["crops"]) == (160, 2, 2 * CROPS)  # the third is not larger than 160
    rows = found["rows"]
    # A box that is one pixel of the smaller image away would differ by ten times as much.
    assert rows["image_small"]["mean_absolute_difference"] < 1 < rows["image_small"]["largest_difference"] < 30
    assert rows["image_small"]["psnr_mean"] > rows["image_small, JPEG of quality 90"]["psnr_mean"] > 30
    assert found["enlarged"]["image"] == 0 <= found["enlarged"]["image_small"] < 0.8
