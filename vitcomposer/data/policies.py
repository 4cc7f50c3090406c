"""Colour and geometry of one training image in the loader worker: RandAugment, 3-Augment and colour jitter."""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data.auto_augment import rand_augment_transform

from vitcomposer.schema import Augment, require

Policy = Callable[[Image.Image, random.Random], Image.Image]

# timm skips or defaults over sections it cannot read, so a typing error would train another recipe in silence.
_SECTION = r"m\d+|mmax\d+|mstd\d+(\.\d+)?|inc[01]|n[1-9]|p(0(\.\d+)?|1(\.0+)?)|t(weights|3a|3aw)"
_RAND_AUGMENT = re.compile(rf"rand(-({_SECTION}))+")


def build_policies(augment: Augment, image_size: int) -> list[Policy]:
    """What is applied to the flipped crop, in this order.

    timm switches colour jitter off when RandAugment is on; here ``augment.color_jitter`` alone decides.
    """
    policies: list[Policy] = []
    if augment.rand_augment is not None:
        policies.append(
            RandAugment(
                augment.rand_augment, image_size=image_size, mean=augment.mean, interpolation=augment.interpolation
            )
        )
    if augment.three_augment:
        policies.append(three_augment)
    if augment.color_jitter > 0:
        policies.append(partial(color_jitter, strength=augment.color_jitter))
    return policies


class RandAugment:
    """timm's RandAugment as its ``create_transform`` builds it, drawn from the sample's generator.

    timm draws from the global generators of Python and numpy, which every call seeds: call it inside
    :func:`global_generators_restored`.

    Args:
        name: timm's configuration string, such as ``rand-m9-mstd0.5-inc1``.
        mean: Of the normalisation; its colour fills what rotation, shear and translation uncover.

    Raises:
        ConfigError: ``name`` is not one that timm reads completely.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int,
        mean: tuple[float, float, float],
        interpolation: Literal["bicubic", "bilinear"],
    ) -> None:
        require(
            _RAND_AUGMENT.fullmatch(name) is not None,
            "augment.rand_augment",
            "a RandAugment string of timm (rand with sections m, n, p, mstd, mmax, inc, t) or null",
            name,
            "Write it like rand-m9-mstd0.5-inc1.",
        )
        self._transform = rand_augment_transform(
            name,
            {
                "translate_const": int(image_size * 0.45),
                "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
                "interpolation": Image.Resampling[interpolation.upper()],
            },
        )

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        random.seed(rng.getrandbits(64))
        np.random.seed(rng.getrandbits(32))
        return self._transform(image)


def three_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """3-Augment of DeiT III (arXiv:2204.07118): grayscale, solarize or Gaussian blur, each with a third."""
    choice = rng.randrange(3)
    if choice == 0:
        return image.convert("L").convert("RGB")
    if choice == 1:
        return ImageOps.solarize(image, threshold=128)
    return image.filter(ImageFilter.GaussianBlur(radius=rng.uniform(0.1, 2.0)))


def color_jitter(image: Image.Image, rng: random.Random, strength: float) -> Image.Image:
    """Brightness, contrast and saturation in random order, each by a factor in [max(0, 1 - strength), 1 + strength].

    The arithmetic is torchvision's ColorJitter on Pillow images; there is no hue.
    """
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    rng.shuffle(enhancers)
    for enhancer in enhancers:
        image = enhancer(image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


@contextmanager
def global_generators_restored() -> Iterator[None]:
    """Leave the global generators of Python and numpy as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
