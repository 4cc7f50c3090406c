"""Draws which operations change an image, as a program: RandAugment, 3-Augment, jitter, colour distortion."""

import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from vitcomposer.data.augment import programs as ops
from vitcomposer.data.augment.programs import Program, Step
from vitcomposer.errors import require
from vitcomposer.schema import Augment

# timm skips or defaults over sections it cannot read, so a typing error would train another recipe in silence.
_SECTION = r"m\d+|mmax\d+|mstd\d+(\.\d+)?|inc[01]|n[1-9]|p(0(\.\d+)?|1(\.0+)?)|t(weights|3a|3aw)"
_RAND_AUGMENT = re.compile(rf"rand(-({_SECTION}))+")
_DRAWS = 1000  # programs that show which operations there are
_LARGEST = 10.0  # magnitude without mmax, and what timm divides every magnitude by


class Draw(Protocol):
    """Draws at most ``length`` steps for an image from its sample's generator."""

    length: int

    def draw(self, rng: random.Random) -> list[Step]: ...


class Policies:
    """What is applied to a crop, in order: the flip first, then what each of ``draws`` gives.

    Args:
        fill: Colour (3,) of what rotation, shear and translation uncover.
    """

    def __init__(self, flip_prob: float, draws: Sequence[Draw], fill: NDArray[np.uint8]) -> None:
        self.flip_prob = flip_prob
        self.draws = tuple(draws)
        self.fill = fill
        self.length = 1 + sum(draw.length for draw in draws)

    def draw(self, rng: random.Random) -> Program:
        steps = [(ops.FLIP, 0.0)] if rng.random() < self.flip_prob else []
        for draw in self.draws:
            steps += draw.draw(rng)
        return ops.encode(steps, self.length)

    def warm_up(self) -> None:
        """Compile or load the kernels of what is drawn, as far as many draws show it."""
        rng = random.Random(0)
        ops.warm_up(sorted({int(code) for _ in range(_DRAWS) for code in self.draw(rng)[0]}))


def build_policies(augment: Augment, image_size: int, strength: float = 1.0) -> Policies:
    """The flip and what is applied to the flipped crop, in this order.

    timm switches colour jitter off when RandAugment is on; here ``augment.color_jitter`` alone decides.

    Args:
        strength: Factor on RandAugment's magnitude.

    Raises:
        ConfigError: ``augment.rand_augment`` is not one that timm reads completely.
    """
    draws: list[Draw] = []
    if augment.rand_augment is not None:
        interpolation = augment.interpolation
        name = augment.rand_augment
        draws.append(RandAugment(name, image_size=image_size, interpolation=interpolation, strength=strength))
    if augment.three_augment:
        draws.append(ThreeAugment())
    if augment.color_jitter > 0:
        draws.append(ColorJitter(augment.color_jitter, augment.color_jitter, augment.color_jitter))
    return Policies(augment.flip_prob, draws, fill_colour(augment.mean))


def fill_colour(mean: tuple[float, float, float]) -> NDArray[np.uint8]:
    """The mean of the normalisation as timm fills with it."""
    return np.array([min(255, round(255 * channel)) for channel in mean], np.uint8)


class RandAugment:
    """timm's RandAugment as its ``create_transform`` builds it.

    Args:
        name: timm's configuration string, such as ``rand-m9-mstd0.5-inc1``.
        image_size: Pixels; a translation is a share of it.
        strength: Factor on the magnitude, before its spread (mstd) and the bounds.

    Raises:
        ConfigError: ``name`` is not one that timm reads completely, or its magnitude is above the largest (10 or mmax).
    """

    def __init__(
        self, name: str, *, image_size: int, interpolation: Literal["bicubic", "bilinear"], strength: float = 1.0
    ) -> None:
        require(
            _RAND_AUGMENT.fullmatch(name) is not None,
            "augment.rand_augment",
            "a RandAugment string of timm (rand with sections m, n, p, mstd, mmax, inc, t) or null",
            name,
            "Write it like rand-m9-mstd0.5-inc1.",
        )
        sections = _read_sections(name)
        increasing = sections.get("inc", "0") == "1"
        magnitude = float(sections.get("m", _LARGEST))
        self._largest = float(sections.get("mmax", 0)) or _LARGEST
        rule = f"a magnitude of at most {self._largest:g}, to which timm cuts it without a word"
        remedy = f"Write m{magnitude:g}-mmax{max(30.0, magnitude):g} there, or m{self._largest:g}."
        require(magnitude <= self._largest, "augment.rand_augment", rule, name, remedy)
        self._magnitude = strength * magnitude
        self._std = float(sections.get("mstd", 0))
        self._prob = float(sections.get("p", 0.5))
        self.length = int(sections.get("n", 2))
        weights = _CHOICES.get(sections.get("t", ""))
        # Only choices with weights are drawn without replacement.
        self._weights = None if weights is None or sections["t"] == "3a" else list(weights.values())
        self._names = list(weights or (_INCREASING if increasing else _PLAIN))
        self._image_size = image_size
        self._interpolation = 0 if interpolation == "bicubic" else ops.BILINEAR

    def draw(self, rng: random.Random) -> list[Step]:
        names = self._choose(rng)
        return [self._draw_step(name, rng) for name in names if self._prob >= 1 or rng.random() <= self._prob]

    def _choose(self, rng: random.Random) -> list[str]:
        if self._weights is None:
            return rng.choices(self._names, k=self.length)
        # Independent exponential arrivals come in the order of drawing without replacement.
        arrivals = [-math.log(1.0 - rng.random()) / weight for weight in self._weights]
        order = sorted(range(len(arrivals)), key=arrivals.__getitem__)
        return [self._names[i] for i in order[: self.length]]

    def _draw_step(self, name: str, rng: random.Random) -> Step:
        code, level = _LEVELS[name]
        value = level(self._draw_magnitude(rng), rng)
        if code in (ops.TRANSLATE_X, ops.TRANSLATE_Y):
            value *= self._image_size
        return (code + self._interpolation if code >= ops.ROTATE else code), value

    def _draw_magnitude(self, rng: random.Random) -> float:
        magnitude = self._magnitude
        if self._std > 100:
            magnitude = rng.uniform(0, magnitude)
        elif self._std > 0:
            magnitude = rng.gauss(magnitude, self._std)
        return max(0.0, min(magnitude, self._largest))


class ThreeAugment:
    """3-Augment of DeiT III (arXiv:2204.07118): grayscale, solarize or Gaussian blur, each with a third."""

    length = 1

    def draw(self, rng: random.Random) -> list[Step]:
        choice = rng.randrange(3)
        if choice == 0:
            return [(ops.GRAYSCALE, 0.0)]
        if choice == 1:
            return [(ops.SOLARIZE, 128.0)]
        return [(ops.GAUSSIAN_BLUR, rng.uniform(0.1, 2.0))]


class ColorJitter:
    """torchvision's ColorJitter: what has a strength, in random order.

    Factors are in [max(0, 1 - strength), 1 + strength], the hue in [-hue, hue], of which 0.5 is half the circle.
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, hue: float = 0.0) -> None:
        codes = {ops.BRIGHTNESS: brightness, ops.CONTRAST: contrast, ops.SATURATION: saturation}
        ranges = {code: (max(0.0, 1 - strength), 1 + strength) for code, strength in codes.items() if strength > 0}
        if hue > 0:
            ranges[ops.HUE] = (-hue, hue)
        self._ranges = list(ranges.items())
        self.length = len(ranges)

    def draw(self, rng: random.Random) -> list[Step]:
        ranges = self._ranges.copy()
        rng.shuffle(ranges)
        return [(code, rng.uniform(*bounds)) for code, bounds in ranges]


class ColorDistortion:
    """The colours of a view in self-supervised training: jitter, grayscale, blur and solarize, each with its chance.

    SimCLR (arXiv:2002.05709, Appendix A) and SwAV jitter with probability 0.8 and make a fifth gray; blur has a radius
    in [0.1, 2.0] (SwAV, arXiv:2006.09882), solarize the threshold 128 (BYOL, arXiv:2006.07733).

    Args:
        jitter: Brightness, contrast, saturation and hue of :class:`ColorJitter`; one number s is SimCLR's strength,
            (0.8 s, 0.8 s, 0.8 s, 0.2 s).
    """

    def __init__(
        self,
        jitter: float | tuple[float, float, float, float],
        *,
        jitter_prob: float = 0.8,
        gray_prob: float = 0.2,
        blur_prob: float = 0.5,
        solarize_prob: float = 0.0,
    ) -> None:
        single = isinstance(jitter, float | int)
        self._jitter = ColorJitter(*((0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter) if single else jitter))
        self._probs = (jitter_prob, gray_prob, blur_prob, solarize_prob)
        self.length = self._jitter.length + 3

    def draw(self, rng: random.Random) -> list[Step]:
        jitter, gray, blur, solarize = (rng.random() < prob for prob in self._probs)
        steps = self._jitter.draw(rng) if jitter else []
        if gray:
            steps.append((ops.GRAYSCALE, 0.0))
        if blur:
            steps.append((ops.GAUSSIAN_BLUR, rng.uniform(0.1, 2.0)))
        if solarize:
            steps.append((ops.SOLARIZE, 128.0))
        return steps


_PLAIN = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
_WITH_DIRECTION = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
_INCREASING = tuple(f"{name}Increasing" if name in _WITH_DIRECTION else name for name in _PLAIN)
_CHOICES: dict[str, dict[str, float]] = {
    "3a": {"SolarizeIncreasing": 1, "Desaturate": 1, "GaussianBlur": 1},
    "3aw": {
        **dict.fromkeys(("SolarizeIncreasing", "Desaturate", "GaussianBlur"), 6.0),
        **{"Rotate": 3, "ShearX": 2, "ShearY": 2},
        **dict.fromkeys(("PosterizeIncreasing", "AutoContrast", "ColorIncreasing", "SharpnessIncreasing"), 1.0),
        **dict.fromkeys(("ContrastIncreasing", "BrightnessIncreasing", "Equalize", "Invert"), 1.0),
    },
    "weights": {
        **{"Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1},
        **dict.fromkeys(("ColorIncreasing", "SharpnessIncreasing", "AutoContrast"), 0.25),
        **dict.fromkeys(("SolarizeIncreasing", "SolarizeAdd", "ContrastIncreasing", "BrightnessIncreasing"), 0.05),
        **dict.fromkeys(("Equalize", "PosterizeIncreasing", "Invert"), 0.05),
    },
}


def _read_sections(name: str) -> dict[str, str]:
    """Of a section that is given twice timm takes the first of mstd, mmax and t, and the last of the others."""
    sections: dict[str, str] = {}
    for section in name.split("-")[1:]:
        key, value = ("t", section[1:]) if section[0] == "t" else re.split(r"(?=\d)", section, maxsplit=1)
        if key not in ("mstd", "mmax", "t") or key not in sections:
            sections[key] = value
    return sections


def _signed(rng: random.Random, value: float) -> float:
    return -value if rng.random() > 0.5 else value


def _enhance(level: float, rng: random.Random) -> float:
    return level / 10 * 1.8 + 0.1


def _enhance_increasing(level: float, rng: random.Random) -> float:
    return max(0.1, 1.0 + _signed(rng, level / 10 * 0.9))


def _shear(level: float, rng: random.Random) -> float:
    return _signed(rng, level / 10 * 0.3)


def _translate(level: float, rng: random.Random) -> float:
    return _signed(rng, level / 10 * 0.45)


# timm's names with the code and how a magnitude of 0 to 10 (more with mmax) becomes the value; that of a translation is
# still a share of the image's side.
_LEVELS: dict[str, tuple[int, Callable[[float, random.Random], float]]] = {
    "AutoContrast": (ops.AUTO_CONTRAST, lambda level, rng: 0.0),
    "Equalize": (ops.EQUALIZE, lambda level, rng: 0.0),
    "Invert": (ops.INVERT, lambda level, rng: 0.0),
    "Rotate": (ops.ROTATE, lambda level, rng: _signed(rng, level / 10 * 30.0)),
    "Posterize": (ops.POSTERIZE, lambda level, rng: int(level / 10 * 4)),
    "PosterizeIncreasing": (ops.POSTERIZE, lambda level, rng: 4 - int(level / 10 * 4)),
    "Solarize": (ops.SOLARIZE, lambda level, rng: min(256, int(level / 10 * 256))),
    "SolarizeIncreasing": (ops.SOLARIZE, lambda level, rng: 256 - min(256, int(level / 10 * 256))),
    "SolarizeAdd": (ops.SOLARIZE_ADD, lambda level, rng: min(128, int(level / 10 * 110))),
    "Color": (ops.SATURATION, _enhance),
    "ColorIncreasing": (ops.SATURATION, _enhance_increasing),
    "Contrast": (ops.CONTRAST, _enhance),
    "ContrastIncreasing": (ops.CONTRAST, _enhance_increasing),
    "Brightness": (ops.BRIGHTNESS, _enhance),
    "BrightnessIncreasing": (ops.BRIGHTNESS, _enhance_increasing),
    "Sharpness": (ops.SHARPNESS, _enhance),
    "SharpnessIncreasing": (ops.SHARPNESS, _enhance_increasing),
    "ShearX": (ops.SHEAR_X, _shear),
    "ShearY": (ops.SHEAR_Y, _shear),
    "TranslateXRel": (ops.TRANSLATE_X, _translate),
    "TranslateYRel": (ops.TRANSLATE_Y, _translate),
    "Desaturate": (ops.SATURATION, lambda level, rng: 1.0 - min(1.0, 0.5 + 0.5 * (level / 10))),
    "GaussianBlur": (ops.GAUSSIAN_BLUR, lambda level, rng: min(2.0, 0.1 + 1.9 * (level / 10))),
}
