"""Draws boxes: which pixels of an image are used, erased or replaced. All are (top, left, height, width)."""

import math
import random

import torch
from torch import Tensor

from vitcomposer.data.jpeg import Box

NO_BOX: Box = (0, 0, 0, 0)


def random_resized_box(
    rng: random.Random, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """The box of RandomResizedCrop: ten tries, then the centre (Szegedy et al., arXiv:1409.4842).

    Args:
        scale: Range of the box's share of the image's area, drawn uniformly.
        ratio: Range of width / height, drawn uniformly in its logarithm.
    """
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        box_area = rng.uniform(*scale) * area
        aspect = math.exp(rng.uniform(low, high))
        box_width = round(math.sqrt(box_area * aspect))
        box_height = round(math.sqrt(box_area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = rng.randint(0, height - box_height)
            left = rng.randint(0, width - box_width)
            return top, left, box_height, box_width
    return _centre_within_ratio(height, width, ratio)


def enlarged_share(
    size: int, shorter_side: int, scale: tuple[float, float], ratio: tuple[float, float], draws: int = 2000
) -> float:
    """Share of drawn boxes with fewer pixels than a view of ``size`` pixels a side, of a photograph of 4:3."""
    rng = random.Random(0)
    boxes = [random_resized_box(rng, shorter_side, shorter_side * 4 // 3, scale, ratio) for _ in range(draws)]
    return sum(height * width < size**2 for _, _, height, width in boxes) / draws


def _centre_within_ratio(height: int, width: int, ratio: tuple[float, float]) -> Box:
    """The largest centred box whose aspect is in ``ratio``; a strip of one pixel keeps at least one."""
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def shape_with_shorter_side(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Height and width after scaling the shorter side to ``shorter``, rounded down as torchvision's Resize does."""
    if width <= height:
        return int(shorter * height / width), shorter
    return shorter, int(shorter * width / height)


def centre_box(height: int, width: int, size: int) -> Box:
    """The box of torchvision's CenterCrop in an image that is at least ``size`` on both sides."""
    assert height >= size and width >= size
    return round((height - size) / 2.0), round((width - size) / 2.0), size, size


def random_erasing_box(rng: random.Random, size: int, prob: float) -> Box:
    """The box of timm's RandomErasing (arXiv:1708.04896) in a square image, or NO_BOX.

    2 to 33.3 % of the area, height / width from 0.3 to 1 / 0.3 uniformly in its logarithm, up to ten tries.
    """
    if rng.random() > prob:
        return NO_BOX
    low, high = math.log(0.3), math.log(1 / 0.3)
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * size * size
        aspect = math.exp(rng.uniform(low, high))
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        if height < size and width < size:
            top = rng.randint(0, size - height)
            left = rng.randint(0, size - width)
            return top, left, height, width
    return NO_BOX


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """True inside each of the boxes (B, 4), as (B, 1, height, width)."""
    top, left, box_height, box_width = boxes.unbind(1)
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    in_rows = (rows >= top[:, None]) & (rows < (top + box_height)[:, None])  # (B, height)
    in_columns = (columns >= left[:, None]) & (columns < (left + box_width)[:, None])  # (B, width)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]
