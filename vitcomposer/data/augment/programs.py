"""Runs augmentation programs: lists of operations on the pixels of one image, drawn before they are done.

A program is ``codes`` int8 (L,) and ``values`` float32 (L,), applied in order; IDENTITY fills it up. Its arithmetic is
that of the per-image references on Pillow images, on the processor (:func:`apply_program`) as in batches on the device
(:mod:`vitcomposer.data.augment.programs_torch`). What each code's value means:

========================  ==============================================================================
IDENTITY, FLIP, GRAYSCALE  none; FLIP exchanges left and right, GRAYSCALE keeps three channels
INVERT, AUTO_CONTRAST      none
EQUALIZE                   none
POSTERIZE                  bits that are kept, at most 8
SOLARIZE                   the lowest value that is inverted, up to 256
SOLARIZE_ADD               what is added to values below 128
BRIGHTNESS, CONTRAST       factor of ImageEnhance; 1 changes nothing
SATURATION, SHARPNESS      factor of ImageEnhance; SATURATION is its Color
HUE                        share of the circle, in [-0.5, 0.5]
GAUSSIAN_BLUR              radius of ImageFilter.GaussianBlur in pixels, the standard deviation
ROTATE                     degrees counter-clockwise
SHEAR_X, SHEAR_Y           pixels of the source per pixel of the other axis
TRANSLATE_X, TRANSLATE_Y   pixels by which the source lies to the right or below
========================  ==============================================================================

ROTATE to TRANSLATE_Y interpolate bicubically, with BILINEAR added to their code bilinearly.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from vitcomposer.data.augment import colour_kernels as colour
from vitcomposer.data.augment import geometry_kernels as space

Step = tuple[int, float]  # code, value
Program = tuple[NDArray[np.int8], NDArray[np.float32]]  # codes, values

IDENTITY, FLIP, GRAYSCALE = 0, 1, 2
INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, BRIGHTNESS = 3, 4, 5, 6, 7
AUTO_CONTRAST, EQUALIZE, CONTRAST, SATURATION, SHARPNESS, HUE, GAUSSIAN_BLUR = 8, 9, 10, 11, 12, 13, 14
ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = 15, 16, 17, 18, 19
BILINEAR = 32
CODES = (*range(ROTATE + 5), *(BILINEAR + code for code in range(ROTATE, ROTATE + 5)))

TABLE_CODES = (INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, BRIGHTNESS)  # a table that does not depend on the image

_LEVELS = np.arange(256)  # int64 (256,)
_NO_CHANGE = np.tile(_LEVELS.astype(np.uint8), (3, 1))  # uint8 (3, 256)


def encode(steps: Sequence[Step], length: int) -> Program:
    """The steps as a program of ``length``, which holds all of them."""
    codes, values = np.zeros(length, np.int8), np.zeros(length, np.float32)  # (length,) each
    for i, (code, value) in enumerate(steps):
        codes[i], values[i] = code, value
    return codes, values


def apply_program(
    pixels: NDArray[np.uint8], codes: NDArray[np.int8], values: NDArray[np.float32], fill: NDArray[np.uint8]
) -> None:
    """Run a program on one image, in place.

    Args:
        pixels: C-contiguous (H, W, 3).
        fill: Colour (3,) of what rotation, shear and translation uncover.
    """
    assert pixels.flags.c_contiguous and pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)
    flat = pixels.reshape(-1)  # (3 * H * W,), a view
    table = None  # point operations wait here, because a run of them is one look-up
    for code, value in zip(codes.tolist(), values.tolist(), strict=True):
        if code in TABLE_CODES:
            table = point_table(code, value)[_NO_CHANGE if table is None else table]  # (3, 256)
        elif code in (AUTO_CONTRAST, EQUALIZE):
            table = _NO_CHANGE if table is None else table
            step = colour.histogram_step(flat, table, code == EQUALIZE)  # (3, 256)
            table = np.take_along_axis(step, table.astype(np.intp), axis=1)  # (3, 256): step after table
        elif code != IDENTITY:
            if table is not None:
                colour.look_up(flat, table)
                table = None
            if code == CONTRAST:
                table = blend_table(colour.mean_luma(flat), value)[_NO_CHANGE]  # (3, 256)
            else:
                _APPLY[code](pixels, value, fill)
    if table is not None:
        colour.look_up(flat, table)


def point_table(code: int, value: float) -> NDArray[np.uint8]:
    """What one of TABLE_CODES makes of the values 0 to 255."""
    if code == INVERT:
        table = 255 - _LEVELS
    elif code == POSTERIZE:
        table = _LEVELS & (0xFF00 >> min(max(int(value), 0), 8))
    elif code == SOLARIZE:
        table = np.where(value > _LEVELS, _LEVELS, 255 - _LEVELS)
    elif code == SOLARIZE_ADD:
        table = np.where(_LEVELS < 128, np.minimum(_LEVELS + int(value), 255), _LEVELS)
    else:
        table = blend_table(0, value)
    return table.astype(np.uint8)


def blend_table(low: int, factor: float) -> NDArray[np.uint8]:
    """Image.blend from the constant ``low`` to the values 0 to 255, in single precision and cut off."""
    blended = np.float32(low) + np.float32(factor) * (_LEVELS - low).astype(np.float32)  # float32 (256,)
    return np.clip(blended, 0, 255).astype(np.uint8)


def hue_shift(value: float) -> int:
    """The share of the circle in the steps of a uint8 hue, in [0, 255]."""
    return int(value * 255) & 255


def box_weights(radius: float) -> tuple[int, int, int]:
    """Pillow's three boxes for a Gaussian: reach, and the weights of its inner and its two outer pixels in 2**-24.

    The lengths are those of Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box
    filtering", equations 7, 11 and 14, in single precision as Pillow has them.
    """
    one, three, six = np.float32(1), np.float32(3), np.float32(6)
    variance = np.float32(radius) * np.float32(radius) / three
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(math.floor((float(length) - 1.0) / 2.0))
    rest = (2 * whole + one) * (whole * (whole + one) - three * variance)
    rest /= six * (variance - (whole + one) * (whole + one))
    half = whole + rest
    reach, inner = int(half), int(np.float32(1 << 24) / (half * 2 + one))
    return reach, inner, ((1 << 24) - (2 * reach + 1) * inner) // 2


def quarter_turns(degrees: float, height: int, width: int) -> int | None:
    """How many counter-clockwise quarters the rotation is, where Pillow moves whole pixels instead of interpolating."""
    turns, rest = divmod(degrees % 360.0, 90.0)
    return int(turns) if rest == 0 and (turns % 2 == 0 or height == width) else None


def rotation_matrix(degrees: float, height: int, width: int) -> NDArray[np.float64]:
    """From output to input around the centre, as the six numbers of Image.transform."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return np.array([cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y])


def _rotate(pixels: NDArray[np.uint8], degrees: float, fill: NDArray[np.uint8], cubic: bool) -> None:
    turns = quarter_turns(degrees, *pixels.shape[:2])
    if turns is None:
        space.affine(pixels, rotation_matrix(degrees, *pixels.shape[:2]), fill, cubic)
    elif turns:
        pixels[:] = np.rot90(pixels, turns).copy()


def _shear_columns(pixels: NDArray[np.uint8], slope: float, fill: NDArray[np.uint8], cubic: bool) -> None:
    columns = np.empty((pixels.shape[1], pixels.shape[0], 3), np.uint8)  # (W, H, 3)
    space.transpose(pixels, columns)
    space.slide_rows(columns, slope, 0.0, fill, cubic)
    space.transpose(columns, pixels)


def _geometry(cubic: bool) -> dict[int, Callable[[NDArray[np.uint8], float, NDArray[np.uint8]], None]]:
    offset = 0 if cubic else BILINEAR
    return {
        offset + ROTATE: lambda pixels, value, fill: _rotate(pixels, value, fill, cubic),
        offset + SHEAR_X: lambda pixels, value, fill: space.slide_rows(pixels, value, 0.0, fill, cubic),
        offset + SHEAR_Y: lambda pixels, value, fill: _shear_columns(pixels, value, fill, cubic),
        offset + TRANSLATE_X: lambda pixels, value, fill: space.slide_rows(pixels, 0.0, value, fill, cubic),
        offset + TRANSLATE_Y: lambda pixels, value, fill: space.shift_rows(pixels, value, fill, cubic),
    }


_APPLY: dict[int, Callable[[NDArray[np.uint8], float, NDArray[np.uint8]], None]] = {
    FLIP: lambda pixels, value, fill: space.flip(pixels),
    GRAYSCALE: lambda pixels, value, fill: colour.gray(pixels.reshape(-1)),
    SATURATION: lambda pixels, value, fill: colour.saturation(pixels.reshape(-1), value),
    SHARPNESS: lambda pixels, value, fill: colour.sharpness(pixels, value),
    HUE: lambda pixels, value, fill: colour.hue(pixels.reshape(-1), hue_shift(value)),
    GAUSSIAN_BLUR: lambda pixels, value, fill: space.box_blur(pixels, *box_weights(value)),
    **_geometry(cubic=True),
    **_geometry(cubic=False),
}


def warm_up(codes: Iterable[int] = CODES) -> None:
    """Compile the kernels of these operations, or load them from disk: the first images would wait for them."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    for code in codes:
        apply_program(pixels, *encode([(code, 0.25)], 1), fill=np.zeros(3, np.uint8))
