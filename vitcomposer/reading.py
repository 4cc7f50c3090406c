"""Sets how images are read: how many pixels one may have, and which values of more than 8 bits are black and white.

Both hold for the whole process, as Pillow's own limit does, since an image is decoded far below of what knows the
options. Loader workers are forked and have what their parent has.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vitcomposer.errors import require
from vitcomposer.schema import MAX_PIXELS


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


def current() -> Reading:
    """What holds now."""
    return _current


def set_reading(reading: Reading) -> None:
    """Have all images of this process read in this way."""
    global _current
    _current = reading


@contextmanager
def reading(chosen: Reading) -> Iterator[None]:
    """Read in this way inside of the block."""
    before = current()
    set_reading(chosen)
    try:
        yield
    finally:
        set_reading(before)


def add_reading(parser: Any) -> None:
    """Add the options of :class:`Reading` to a command."""
    add_max_pixels(parser)
    help_text = "black and white of images of 16 or 32 bits or floats (default: all of 16 bits, the others are refused)"
    parser.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=help_text)


def add_max_pixels(parser: Any) -> None:
    """Add the limit alone."""
    help_text = "refuse images with more pixels by their headers (default: %(default)s)"
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=help_text)


def given_reading(args: argparse.Namespace) -> Reading:
    """What :func:`add_reading` was given."""
    return Reading(args.max_pixels, tuple(args.range) if args.range else None)
