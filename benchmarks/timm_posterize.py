"""Lets timm's RandAugment run on Pillow 13, which refuses the 0 bits that it draws: black, as Pillow made it before."""

from typing import Any

from PIL import Image
from timm.data import auto_augment


def posterize_to_no_bits() -> None:
    """For the transforms that timm builds from here on, in this process."""
    for name, function in auto_augment.NAME_TO_OP.items():
        if function is auto_augment.posterize:
            auto_augment.NAME_TO_OP[name] = posterize


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, at any number of bits."""
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
