"""Opens pictures with Pillow and brings them to 8 bits: one rule for convert, training, predict, eval and attention.

=====================================  ====================================================================
one channel of 16 bits                 value / 257, rounded (12 bits in TIFF: value * 255 / 4095); ``--range``
integers of 32 bits, signed, floats    refused, as their range is not known; ``--range LOW HIGH``
RGB of 16 bits                         the upper byte, as Pillow reads it
grey, palette, RGB with transparency   its colours; transparency is ignored, as torchvision's ``pil_loader`` does
CMYK                                   Pillow's plain conversion; colour profiles are ignored
1 bit                                  0 and 255
=====================================  ====================================================================
"""

import re
import warnings
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vitcomposer.data.jpeg import MAX_PIXELS, current_reading

_FORMATS = {"JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA"}
UNKNOWN_FORMAT = "no image format that Pillow knows"
_BAND = 1 << 22  # pixels that are scaled at once
_TIFF_BITS, _TIFF_WHITE_IS_ZERO, _TIFF_TILE = 258, 262, (322, 323)


@cache
def image_formats() -> tuple[str, ...]:
    """What is read, of the formats that this Pillow knows. EPS is not: its plug-in starts Ghostscript."""
    Image.init()
    return tuple(sorted(_FORMATS & Image.OPEN.keys()))


def check_pixels(width: int, height: int) -> None:
    """Refuse an image by its size.

    Raises:
        ValueError: More pixels than ``Reading.max_pixels``.
    """
    if width * height > current_reading().max_pixels:
        raise ValueError(f"its header says {width:,} x {height:,} pixels, {_above()}")


def _above() -> str:
    return (
        f"and at most {current_reading().max_pixels:,} are read. If it is sound, raise --max-pixels (in training "
        "data.max_pixels)"
    )


def open_image(data: bytes | memoryview) -> Image.Image:
    """An image of which the header alone has been read; decoding gives its first frame.

    Raises:
        ValueError: No image, more pixels than may be read, or values whose range is not known.
    """
    check_pixels(*_webp_canvas(data))
    # Pillow warns of more than this, and refuses twice as many before it gives us the size.
    Image.MAX_IMAGE_PIXELS = max(current_reading().max_pixels, MAX_PIXELS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large image (too large is an error), odd EXIF blocks and palettes
            image = Image.open(BytesIO(data), formats=image_formats())
    except UnidentifiedImageError as error:
        # Pillow names the BytesIO object, which tells nobody anything.
        raise ValueError(UNKNOWN_FORMAT) from error
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise ValueError(f"its header says {int(pixels[0]) if pixels else 0:,} pixels, {_above()}") from error
    except Exception as error:  # plug-ins raise OSError, SyntaxError, EOFError, struct.error, ... on damaged input
        raise ValueError(str(error) or type(error).__name__) from error
    check_pixels(*image.size)
    if image.format == "TIFF":  # a tile is decoded whole, however little of it the image needs
        width, height = (max(_tiff_numbers(image, tag), default=0) for tag in _TIFF_TILE)
        check_pixels(width, height)
    scaling(image)
    return image


def _webp_canvas(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height of a WebP, for which Pillow takes memory as it opens it; (0, 0) of other formats."""
    head = bytes(data[:30])
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def scaling(image: Image.Image) -> str | None:
    """How values of more than 8 bits become 8, in words; None for an image that has none.

    Raises:
        ValueError: Their range is not known.
    """
    if not is_deep(image):
        return None
    if current_reading().value_range is not None:
        low, high = current_reading().value_range or (0, 0)
        return f"{_depth(image)}, {low:g} to {high:g} scaled to 8 bits"
    white = _white(image)
    if white is None:
        raise ValueError(
            f"{_depth(image)} have no range that is known: give the values that are black and white, --range LOW HIGH"
        )
    return f"{_depth(image)}, scaled to 8 bits by 255 / {white:,}"


def is_deep(image: Image.Image) -> bool:
    """Whether an image has one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def eight_bits(image: Image.Image) -> Image.Image:
    """The image as RGB, or as grey (L) where it is grey; see the table above.

    Raises:
        ValueError: A range that is not known, or values that are no numbers.
    """
    if not is_deep(image):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transparency, which is ignored
            return image if image.mode in ("L", "RGB") else image.convert("RGB")
    scaling(image)
    low, high = current_reading().value_range or (0, _white(image) or 0)
    values = np.asarray(image)
    grey = np.empty(values.shape, np.uint8)
    rows = max(_BAND // max(values.shape[1], 1), 1)
    for top in range(0, len(values), rows):
        band = values[top : top + rows].astype(np.float64)
        if not np.isfinite(band).all():
            raise ValueError("some of its values are infinite or no numbers")
        grey[top : top + rows] = np.rint((band - low).clip(0, high - low) * 255 / (high - low))
    if _tiff_numbers(image, _TIFF_WHITE_IS_ZERO) == [0]:  # which Pillow heeds at 8 bits alone
        grey = 255 - grey
    return Image.fromarray(grey)


def _white(image: Image.Image) -> int | None:
    """The largest value that an image may have, where its format says it."""
    if image.mode.startswith("I;16"):
        return 4095 if _tiff_numbers(image, _TIFF_BITS) == [12] else 65535
    return 65535 if image.mode == "I" and image.format == "PPM" else None  # which Pillow scales to 16 bits


def _depth(image: Image.Image) -> str:
    return "floats" if image.mode == "F" else "32-bit integers" if _white(image) is None else "values of 16 bits"


def _tiff_numbers(image: Image.Image, tag: int) -> list[int]:
    """The whole numbers of a tag of a TIFF; none in other formats, or where there is no such tag."""
    if image.format != "TIFF":
        return []
    try:
        value: Any = getattr(image, "tag_v2", {}).get(tag)
    except Exception as error:  # as above
        raise ValueError(f"its TIFF tag {tag} cannot be read") from error
    return [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, int)]
