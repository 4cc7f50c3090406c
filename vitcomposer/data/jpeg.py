"""Encoded image bytes to RGB pixels, and one antialiased resize of a box of them.

libjpeg-turbo decodes JPEG; Pillow decodes everything else and has the last word on what counts as broken, so the
pixels are those of torchvision's ``pil_loader``. EXIF orientation is ignored, as torchvision and timm ignore it: a
model trained on ImageNet has seen those photographs unturned.
"""

import io
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from vitcomposer.data.crops import Box

Interpolation = Literal["bicubic", "bilinear"]

_SAME_AS_PILLOW = ("YCbCr", "RGB", "Gray")  # libjpeg-turbo turns CMYK into other colours than Pillow does

# F.interpolate has no out=; writing straight into a batch's slot saves an allocation and a copy of the result.
_ATEN: Any = torch.ops.aten
_RESIZE = {"bicubic": _ATEN._upsample_bicubic2d_aa.out, "bilinear": _ATEN._upsample_bilinear2d_aa.out}


def read_size(encoded: bytes) -> tuple[int, int]:
    """Height and width in pixels, read from the header alone.

    Raises:
        ValueError: The header belongs to no image format that Pillow knows.
    """
    if _is_jpeg(encoded):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
            return int(height), int(width)
        except ValueError:
            pass  # Pillow decides below whether it is broken
    with _open(encoded) as image:
        return image.height, image.width


def decode_rgb(encoded: bytes) -> np.ndarray:
    """All pixels as uint8 (height, width, 3), equal to ``PIL.Image.open(...).convert("RGB")``.

    Raises:
        ValueError: The image is truncated or damaged; the message is the decoder's.
    """
    if _is_jpeg(encoded):
        try:
            _, _, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
            if colorspace in _SAME_AS_PILLOW:
                return simplejpeg.decode_jpeg(encoded, colorspace="RGB")
        except ValueError:
            pass  # harmless damage, such as stray bytes before a marker, which Pillow reads over, or a broken image
    with _open(encoded) as image:
        try:
            return np.array(image.convert("RGB"))
        except Exception as error:  # the plug-ins of Pillow raise OSError, SyntaxError, EOFError, struct.error, ...
            raise ValueError(_reason(error)) from error


def decode_crop_into(encoded: bytes, box: Box, out: Tensor, interpolation: Interpolation) -> None:
    """Decode, cut ``box`` out and resize it once into ``out``, uint8 (3, height, width).

    The fastest ``out`` is the channels-first view of channels-last memory.

    Raises:
        ValueError: The image is damaged or the box leaves it.
    """
    pixels = decode_rgb(encoded)
    top, left, height, width = box
    inside = top >= 0 and left >= 0 and top + height <= pixels.shape[0] and left + width <= pixels.shape[1]
    if not inside or height < 1 or width < 1:
        raise ValueError(
            f"box must be (top, left, height, width) inside the {pixels.shape[0]}x{pixels.shape[1]} image, got {box}. "
            "Draw it from vitcomposer.data.jpeg.read_size of the same bytes."
        )
    resize_into(pixels[top : top + height, left : left + width], out, interpolation)


def decode_crop(encoded: bytes, box: Box, size: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """The pixels of ``box`` as uint8 (3, size, size), within one level of Pillow's resize.

    Args:
        box: (top, left, height, width) in pixels of the image.

    Raises:
        ValueError: The image is damaged or the box leaves it.
    """
    out = torch.empty((size, size, 3), dtype=torch.uint8).permute(2, 0, 1)
    decode_crop_into(encoded, box, out, interpolation)
    return out.contiguous()


def resize_into(pixels: np.ndarray, out: Tensor, interpolation: Interpolation) -> None:
    """Resize uint8 (h, w, 3) with antialiasing, as Pillow does, into uint8 ``out`` (3, height, width)."""
    source = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).unsqueeze(0)
    _RESIZE[interpolation](source, list(out.shape[-2:]), False, None, None, out=out.unsqueeze(0))


def _is_jpeg(encoded: bytes) -> bool:
    return bytes(encoded[:2]) == b"\xff\xd8"


def _open(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded))
    except Exception as error:  # as above; also DecompressionBombError, which is no OSError
        raise ValueError(_reason(error)) from error


def _reason(error: Exception) -> str:
    # Pillow names the BytesIO object, which tells nobody anything.
    return "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error) or repr(error)
