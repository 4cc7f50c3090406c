"""Cuts several views out of one decode of an image, each resized into its place in the batch."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from vitcomposer.data.boxes import Box
from vitcomposer.data.jpeg.decode import Interpolation, decode_crop_into, decode_region, resize_into

DecodeScale = Literal["exact", "dct"]


def decode_views(
    encoded: bytes | memoryview,
    boxes: Sequence[Box],
    outs: Sequence[Tensor],
    interpolation: Interpolation,
    scale: DecodeScale = "exact",
) -> None:
    """Cut each box out and resize it into its ``out``, uint8 (3, height, width); what they span is decoded once.

    Raises:
        ValueError: The image is damaged or a box leaves it.
    """
    if len(boxes) == 1:
        decode_crop_into(encoded, boxes[0], outs[0], interpolation, scale)
        return
    top, left, height, width = span = _span(boxes)
    assert height > 0 and width > 0
    pixels = decode_region(encoded, span)
    for (y, x, h, w), out in zip(boxes, outs, strict=True):
        resize_into(pixels[y - top : y - top + h, x - left : x - left + w], out, interpolation)


def _span(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of them."""
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    bottom, right = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return top, left, bottom - top, right - left
