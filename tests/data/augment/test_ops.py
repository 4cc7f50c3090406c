"""Every operation of a program against Pillow, timm and torchvision on Pillow images, pixel by pixel."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image
from timm.data import auto_augment as timm
from torchvision.transforms import functional as tv

from benchmarks.timm_posterize import posterize  # black at 0 bits, which timm draws and Pillow 13 refuses
from vitcomposer.data.augment import programs as ops
from vitcomposer.data.augment.programs import apply_program, encode

FILL = np.array([124, 116, 104], np.uint8)
OPTIONS = {"fillcolor": tuple(FILL.tolist())}
SIZES = [(56, 72), (33, 17), (64, 64), (3, 3), (2, 5), (7, 1), (1, 1)]
Pixels = NDArray[np.uint8]


def pillow(image: Image.Image, code: int, value: float) -> Image.Image:
    """The reference of one step."""
    resample = Image.Resampling.BILINEAR if code >= ops.BILINEAR else Image.Resampling.BICUBIC
    options = {**OPTIONS, "resample": resample}
    size = image.size
    references: dict[int, Callable[[], Image.Image]] = {
        ops.IDENTITY: image.copy,
        ops.FLIP: lambda: ImageOps.mirror(image),
        ops.GRAYSCALE: lambda: image.convert("L").convert("RGB"),
        ops.INVERT: lambda: timm.invert(image),
        ops.POSTERIZE: lambda: posterize(image, int(value)),
        ops.SOLARIZE: lambda: timm.solarize(image, value),
        ops.SOLARIZE_ADD: lambda: timm.solarize_add(image, int(value)),
        ops.BRIGHTNESS: lambda: tv.adjust_brightness(image, value),
        ops.AUTO_CONTRAST: lambda: timm.auto_contrast(image),
        ops.EQUALIZE: lambda: timm.equalize(image),
        ops.CONTRAST: lambda: tv.adjust_contrast(image, value),
        ops.SATURATION: lambda: ImageEnhance.Color(image).enhance(value),
        ops.SHARPNESS: lambda: timm.sharpness(image, value),
        ops.HUE: lambda: tv.adjust_hue(image, value),
        ops.GAUSSIAN_BLUR: lambda: image.filter(ImageFilter.GaussianBlur(value)),
        ops.ROTATE: lambda: timm.rotate(image, value, **options),
        ops.SHEAR_X: lambda: timm.shear_x(image, value, **options),
        ops.SHEAR_Y: lambda: timm.shear_y(image, value, **options),
        ops.TRANSLATE_X: lambda: timm.translate_x_rel(image, value / size[0], **options),
        ops.TRANSLATE_Y: lambda: timm.translate_y_rel(image, value / size[1], **options),
    }
    return references[code % ops.BILINEAR]()


def apply(pixels: Pixels, *steps: tuple[int, float]) -> Pixels:
    result = pixels.copy()
    apply_program(result, *encode(steps, len(steps)), FILL)
    return result


def single(value: float) -> float:
    """As a program holds it."""
    return float(np.float32(value))


def photo(height: int, width: int, seed: int = 0) -> Pixels:
    rng = np.random.default_rng(seed)
    whole = load_sample_image("flower.jpg" if seed % 2 else "china.jpg")
    top, left = rng.integers(0, 300), rng.integers(0, 500)
    return np.ascontiguousarray(whole[top : top + height, left : left + width])


def pictures(height: int, width: int) -> list[Pixels]:
    """A photograph, noise, and pictures on whose flat or saturated areas rounding shows."""
    rng = np.random.default_rng(height * width)
    steps = (np.add.outer(np.arange(height) // 5, np.arange(width) // 7) * 37 % 256).astype(np.uint8)
    return [
        photo(height, width),
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255),
        np.dstack([steps, 255 - steps, np.full_like(steps, 77)]),
        np.full((height, width, 3), (0, 255, 100), np.uint8),
    ]


VALUES: dict[int, list[float]] = {
    ops.POSTERIZE: [-4, 0, 1, 3, 4, 7, 8],
    ops.SOLARIZE: [0, 1, 100, 128, 255, 256],
    ops.SOLARIZE_ADD: [0, 40, 99, 110, 128],
    ops.BRIGHTNESS: [0, 0.1, 0.7, 1, 1.3, 1.9, 2.8],
    ops.CONTRAST: [0, 0.1, 0.7, 1, 1.3, 1.9, 2.8],
    ops.SATURATION: [0, 0.1, 0.7, 1, 1.3, 1.9, 2.8],
    ops.SHARPNESS: [0, 0.1, 0.7, 1, 1.3, 1.9, 2.8],
    ops.HUE: [-0.5, -0.2, -0.004, -0.001, 0, 0.003, 0.1, 0.2, 0.5],
    ops.GAUSSIAN_BLUR: [0, 0.1, 0.3, 0.5, 0.815, 0.817, 1, 1.4, 1.63, 1.64, 2, 2.5, 5],
    ops.ROTATE: [0, 90, 180, 270, -90, -360, 27.3, -13.1, 0.01, -0.01, 30, 45, 60, -30],
    ops.SHEAR_X: [0, 0.27, -0.27, 0.25, -0.5, 0.3, 1e-9, -1e-9],
    ops.SHEAR_Y: [0, 0.27, -0.27, 0.25, -0.5, 0.3, 1e-9, -1e-9],
    ops.TRANSLATE_X: [0, 1, -1, 10, 12.8, -25.6, 0.5, -0.5, 500, -500],
    ops.TRANSLATE_Y: [0, 1, -1, 10, 12.8, -25.6, 0.5, -0.5, 500, -500],
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("code", ops.CODES)
def test_operation_equals_pillow(code: int, size: tuple[int, int]) -> None:
    for pixels, value in itertools.product(pictures(*size), VALUES.get(code % ops.BILINEAR, [0.0])):
        if code % ops.BILINEAR in (ops.TRANSLATE_X, ops.TRANSLATE_Y):
            extent = size[1] if code % ops.BILINEAR == ops.TRANSLATE_X else size[0]
            value = single(value) / extent * extent  # what the reference makes of the share it is given
        reference = pillow(Image.fromarray(pixels), code, single(value))
        np.testing.assert_array_equal(apply(pixels, (code, value)), np.asarray(reference), err_msg=f"value {value}")


def test_codes_are_all_different_and_tested() -> None:
    assert len(set(ops.CODES)) == len(ops.CODES) == 25
    assert set(VALUES) | set(range(15)) == {code % ops.BILINEAR for code in ops.CODES}
    assert max(ops.CODES) <= np.iinfo(np.int8).max


@pytest.mark.parametrize("code", [ops.ROTATE, ops.ROTATE + ops.BILINEAR, ops.SHEAR_X, ops.SHEAR_Y])
def test_geometry_equals_pillow_at_random_values(code: int) -> None:
    rng = random.Random(code)
    for seed in range(40):
        pixels = photo(96, 96, seed)
        value = single(rng.uniform(-60, 60) if code % ops.BILINEAR == ops.ROTATE else rng.uniform(-0.6, 0.6))
        expected = np.asarray(pillow(Image.fromarray(pixels), code, value))
        np.testing.assert_array_equal(apply(pixels, (code, value)), expected, err_msg=f"value {value}")


@pytest.mark.parametrize("code", [ops.HUE, ops.SATURATION, ops.GRAYSCALE])
def test_colour_equals_pillow_on_every_colour(code: int) -> None:
    levels = np.arange(256, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(4096, 4096, 3)
    value = single(0.37)
    expected = np.asarray(pillow(Image.fromarray(colours), code, value))
    assert np.array_equal(apply(colours, (code, value)), expected)


def test_blur_equals_pillow_at_every_radius() -> None:
    pixels = photo(24, 31)
    for radius in np.linspace(0.1, 2.0, 300, dtype=np.float32).tolist():
        expected = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))
        assert np.array_equal(apply(pixels, (ops.GAUSSIAN_BLUR, radius)), expected), radius


def random_step(rng: random.Random) -> tuple[int, float]:
    code = rng.choice(ops.CODES)
    return code, single(rng.choice(VALUES.get(code % ops.BILINEAR, [0.0])))


def test_a_program_equals_its_steps_one_after_the_other() -> None:
    """Runs of point operations, which become one look-up, above all."""
    rng = random.Random(0)
    points = [*ops.TABLE_CODES, ops.AUTO_CONTRAST, ops.EQUALIZE, ops.CONTRAST]
    for seed in range(150):
        pixels = photo(40, 40, seed)
        steps = [random_step(rng) for _ in range(5)]
        if seed % 2:
            steps = [(code, single(rng.choice(VALUES.get(code, [0.0])))) for code in rng.choices(points, k=5)]
        expected = pixels
        for step in steps:
            expected = apply(expected, step)
        np.testing.assert_array_equal(apply(pixels, *steps), expected, err_msg=str(steps))


def test_a_program_ignores_its_padding() -> None:
    pixels = photo(20, 20)
    codes, values = encode([(ops.INVERT, 0.0), (ops.ROTATE, 10.0)], 6)
    assert codes.dtype == np.int8 and values.dtype == np.float32 and codes.shape == values.shape == (6,)
    assert codes.tolist() == [ops.INVERT, ops.ROTATE, 0, 0, 0, 0]
    padded = pixels.copy()
    apply_program(padded, codes, values, FILL)
    assert np.array_equal(padded, apply(pixels, (ops.INVERT, 0.0), (ops.ROTATE, 10.0)))
    assert not np.array_equal(padded, pixels)


def test_a_view_into_a_batch_is_changed_in_place_and_its_neighbours_are_not() -> None:
    batch = np.stack([photo(30, 30, seed) for seed in range(3)])
    before = batch.copy()
    for code in ops.CODES:
        value = VALUES.get(code % ops.BILINEAR, [0.0])[-1]
        expected = apply(batch[1], (code, value))
        apply_program(batch[1], *encode([(code, value)], 1), FILL)
        assert np.array_equal(batch[1], expected)
    assert np.array_equal(batch[::2], before[::2]) and not np.array_equal(batch[1], before[1])


def test_warm_up_compiles_every_kernel() -> None:
    ops.warm_up()
    kernels = (ops.colour.hue, ops.colour.histogram_step, ops.space.affine, ops.space.box_blur, ops.space.slide_rows)
    assert all(kernel.signatures for kernel in kernels)
