"""Decodes images to pixels, whole or only the part that a crop needs, resizes them, and makes JPEGs seekable.

How images are read holds for the whole process: how many pixels an image may have, and which values of more than 8 bits
are black and white. As with Pillow's own limit it is no argument, since an image is decoded far below of what knows the
options. Loader workers are forked and have what their parent has. Of the rest of the project only errors is imported.
docs/jpeg.md says how all of this works.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vitcomposer.errors import require

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

RESIZE = "Pillow 13"  # whose pixels the resize has; a run notes it down, and a resume with another one says so

MAX_PIXELS = 1 << 27  # 134,217,728, such as 16,384 x 8,192; one takes 1 to 2 GB while it is decoded


@dataclass(frozen=True)
class Reading:
    """Limits and scales of reading.

    Args:
        max_pixels: Of an image, by its header; one that has more is refused before it is decoded.
        value_range: Values that become 0 and 255 in images of one channel with more than 8 bits; those beyond are cut
            off. None is the whole range of 16-bit images and refuses 32-bit integers and floats, which have no range.

    Raises:
        ConfigError: A value out of its range, by the name it has on the command line.
    """

    max_pixels: int = MAX_PIXELS
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require(self.max_pixels >= 1, "--max-pixels", "1 or more", self.max_pixels, f"{MAX_PIXELS} is the default.")
        if self.value_range is not None:
            low, high = self.value_range
            fits = math.isfinite(low) and math.isfinite(high) and low < high
            require(fits, "--range", "two numbers, the lower first", (low, high), "--range 0 4095 is that of 12 bits.")

    @property
    def max_bytes(self) -> int:
        """Of a file: those of as many pixels in four channels of 16 bits."""
        return 8 * self.max_pixels


_current = Reading()


def current_reading() -> Reading:
    """What holds now."""
    return _current


def set_reading(reading: Reading) -> None:
    """Have all images of this process read in this way."""
    global _current
    _current = reading


@contextmanager
def reading(chosen: Reading) -> Iterator[None]:
    """Read in this way inside of the block."""
    before = current_reading()
    set_reading(chosen)
    try:
        yield
    finally:
        set_reading(before)
