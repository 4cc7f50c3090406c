"""Runs the augmentation programs of a whole batch in torch, with the pixels of :func:`apply_program`.

The host knows every code and value. It sorts the images of a layer into groups of one operation, so the device works
on whole groups whose sizes need no look at the data, and nothing synchronises. What decides a pixel is integer
arithmetic or has the precision and the order of the processor's, so a run may move between the two.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcomposer.data.augment import programs as ops

_CHUNK_BYTES = 192 << 20  # of temporaries that one operation may hold
_BYTES_PER_PIXEL = 256  # of them in the largest operation, the cubic in double precision
_NO_NUMBERS = (0.0,) * 6  # room for what one image needs in one step
_NO_TABLE = np.zeros(256, np.uint8)

# Images uint8 (n, 3, H, W), numbers float64 (n, 6), tables uint8 (n, 1, 256) and fill uint8 (3, 1, 1) to images.
_Operation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _Group(NamedTuple):
    """One operation and, for each of its images, place in the batch, numbers and table."""

    operation: _Operation
    members: list[int]
    numbers: list[tuple[float, ...]]
    tables: list[NDArray[np.uint8]]


def apply_programs(
    images: Tensor, codes: NDArray[np.int8], values: NDArray[np.float32], fill: NDArray[np.uint8]
) -> Tensor:
    """Run a program on every image of a batch.

    Args:
        images: uint8 (B, 3, H, W), which stay as they are.
        codes: (B, L) on the host, like ``values``.
        fill: Colour (3,) of what rotation, shear and translation uncover.
    """
    height, width = images.shape[-2:]
    groups = [group for layer in range(codes.shape[1]) for group in _group_layer(codes, values, layer, height, width)]
    if not groups:
        return images
    # (N,), (N, 6), (N, 1, 256) and (3, 1, 1), N the steps of all images.
    members, numbers, tables, colour = _upload(groups, fill, images.device)
    result, start = images.clone(), 0
    size = max(1, _CHUNK_BYTES // (_BYTES_PER_PIXEL * height * width))
    for group in groups:
        end = start + len(group.members)
        for begin in range(start, end, size):
            rows = slice(begin, min(begin + size, end))
            chosen = result.index_select(0, members[rows])  # (n, 3, H, W)
            chosen = group.operation(chosen, numbers[rows], tables[rows], colour)
            result.index_copy_(0, members[rows], chosen)
        start = end
    return result


def _group_layer(
    codes: NDArray[np.int8], values: NDArray[np.float32], layer: int, height: int, width: int
) -> list[_Group]:
    """Every image's step in this layer, sorted by operation."""
    groups: dict[tuple[Any, ...], _Group] = {}
    steps = zip(codes[:, layer].tolist(), values[:, layer].tolist(), strict=True)
    for member, (code, value) in enumerate(steps):
        if code == ops.IDENTITY:
            continue
        operation, numbers = _plan(code, value, height, width)
        if operation not in groups:
            groups[operation] = _Group(partial(*operation), [], [], [])
        groups[operation].members.append(member)
        groups[operation].numbers.append((*numbers, *_NO_NUMBERS[len(numbers) :]))
        groups[operation].tables.append(ops.point_table(code, value) if operation[0] is _look_up_host else _NO_TABLE)
    return list(groups.values())


def _plan(code: int, value: float, height: int, width: int) -> tuple[tuple[Any, ...], tuple[float, ...]]:
    """The operation with the arguments that its whole group shares, and the numbers of this image."""
    cubic, kind = code < ops.BILINEAR, code % ops.BILINEAR
    if code in ops.TABLE_CODES:
        return (_look_up_host,), ()
    if kind == ops.ROTATE:
        turns = ops.quarter_turns(value, height, width)
        if turns is not None:
            return (_turn, turns), ()
        return (_affine, cubic), tuple(ops.rotation_matrix(value, height, width).tolist())
    if kind in (ops.SHEAR_X, ops.TRANSLATE_X, ops.SHEAR_Y, ops.TRANSLATE_Y):
        along_rows = kind in (ops.SHEAR_X, ops.TRANSLATE_X)
        return (_slide, cubic, along_rows), (value, 0.0) if kind in (ops.SHEAR_X, ops.SHEAR_Y) else (0.0, value)
    if code == ops.GAUSSIAN_BLUR:
        reach, inner, outer = ops.box_weights(value)
        return (_blur, reach), (inner, outer)
    return (_SIMPLE[code],), (ops.hue_shift(value) if code == ops.HUE else value,)


def _upload(
    groups: list[_Group], fill: NDArray[np.uint8], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All members, numbers and tables and the colour, in one copy that the host does not wait for."""
    members = np.concatenate([np.array(group.members, np.int64) for group in groups])  # (N,)
    numbers = np.concatenate([np.array(group.numbers, np.float64) for group in groups])  # (N, 6)
    tables = np.concatenate([np.stack(group.tables) for group in groups])  # (N, 256)
    # uint8 (bytes,), numbers of 8 bytes first: the views below must be aligned.
    packed = np.concatenate([part.reshape(-1).view(np.uint8) for part in (members, numbers, tables, fill)])
    buffer = torch.from_numpy(packed)
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    buffer = buffer.to(device, non_blocking=True)
    parts = buffer.split([members.nbytes, numbers.nbytes, tables.nbytes, 3])
    return (
        parts[0].view(torch.int64),
        parts[1].view(torch.float64).view(-1, len(_NO_NUMBERS)),
        parts[2].view(-1, 1, 256),
        parts[3].view(3, 1, 1),
    )


def _look_up_host(images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    return _look_up(images, tables)


def _flip(images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    return images.flip(-1)


def _turn(turns: int, images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    return images.rot90(turns, (-2, -1))


def _gray(images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    return _luma(images).to(torch.uint8).expand_as(images)


def _contrast(images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    luma = _luma(images)  # int32 (n, 1, H, W)
    total, count = luma.sum((1, 2, 3), keepdim=True, dtype=torch.int64), luma[0].numel()
    mean = torch.div(2 * total + count, 2 * count, rounding_mode="floor")  # (n, 1, 1, 1), rounded
    return _blend(mean.float(), images, numbers)


def _saturation(images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    return _blend(_luma(images).float(), images, numbers)


def _sharpness(images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    if min(images.shape[-2:]) < 3:
        return images
    wide = images.to(torch.int16)
    rows = wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]  # (n, 3, H, W - 2)
    # (n, 3, H - 2, W - 2): the eight neighbours and five times the middle.
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :] + 4 * wide[..., 1:-1, 1:-1]
    wide[..., 1:-1, 1:-1] = torch.div(2 * total + 13, 26, rounding_mode="floor")  # over 13, rounded
    return _blend(wide.float(), images, numbers)


def _hue(images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    """Single precision gives every hue and every colour of Pillow's conversions, in this order of operations."""
    r, g, b = images.float().unbind(1)  # float32 (n, H, W) each
    # A division by a number of Python would be a product with its reciprocal on CUDA, which rounds otherwise.
    six, full = (torch.full((), divisor, device=images.device) for divisor in (6.0, 255.0))
    top, low = torch.maximum(r, torch.maximum(g, b)), torch.minimum(r, torch.minimum(g, b))
    chroma = top - low
    middle = (top - (r + g + b - top - low)) / chroma.clamp_min(1)
    sector = torch.where(r >= g, 5 - middle, 3 + middle)
    sector = torch.where(g == top, torch.where(r >= b, 1 + middle, 3 - middle), sector)
    sector = torch.where(r == top, torch.where(g >= b, 1 - middle, middle - 1), sector)
    angle = sector / six * 255
    angle = torch.where(sector < 0, angle + 255, angle).floor()
    angle = torch.where(angle >= 255, 0, angle) + numbers[:, :1, None].float()
    angle = 6 * torch.where(angle >= 256, angle - 256, angle)
    share = (chroma / top.clamp_min(1) * 255).floor() / full
    distances = (510 - (angle - 765).abs(), (angle - 510).abs() - 255, (angle - 1020).abs() - 255)
    channels = [top * (1 - share * (distance.clamp(0, 255) / full)) + 0.5 for distance in distances]
    return torch.stack(channels, 1).to(torch.uint8)  # (n, 3, H, W)


def _auto_contrast(images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    low, high = (extreme((2, 3)).double()[..., None] for extreme in (images.amin, images.amax))  # float64 (n, 3, 1)
    levels = torch.arange(256, device=images.device, dtype=torch.float64)
    scale = torch.full_like(low, 255.0) / (high - low).clamp_min(1)  # 255.0 / would multiply with the reciprocal
    stretched = (levels * scale + -low * scale).clamp(0, 255)  # (n, 3, 256)
    return _look_up(images, torch.where(high > low, stretched, levels).to(torch.uint8))


def _equalize(images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    places = images.flatten(2).long()  # (n, 3, H * W)
    one = torch.ones((), dtype=torch.int64, device=images.device)
    counts = torch.zeros(*images.shape[:2], 256, dtype=torch.int64, device=images.device)  # (n, 3, 256)
    counts.scatter_add_(2, places, one.expand_as(places))
    highest = counts.gather(2, places.amax(2, keepdim=True))  # (n, 3, 1): pixels of the highest level
    size = torch.div(places.shape[2] - highest, 255, rounding_mode="floor")
    below = size // 2 + counts.cumsum(2) - counts  # (n, 3, 256)
    levels = torch.arange(256, device=images.device)
    stretched = torch.div(below, size.clamp_min(1), rounding_mode="floor").clamp_max(255)
    return _look_up(images, torch.where(size > 0, stretched, levels).to(torch.uint8))


def _blur(reach: int, images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    inner, outer = numbers[:, :2].to(torch.int32).view(-1, 2, 1, 1, 1).unbind(1)  # (n, 1, 1, 1) each
    for _ in range(2):  # the rows, then the columns
        for _ in range(3):
            ends = [images[..., :1]] * (reach + 1), [images[..., -1:]] * (reach + 1)
            line = torch.cat([*ends[0], images, *ends[1]], -1).to(torch.int16)  # (n, 3, H, W + 2 * reach + 2)
            shifted = line.unfold(-1, images.shape[-1], 1)  # (n, 3, H, 2 * reach + 3, W)
            middle = sum(shifted[..., k, :] for k in range(2, 2 * reach + 2)) + shifted[..., 1, :]
            outside = shifted[..., 0, :] + shifted[..., 2 * reach + 2, :]
            # The sum may pass 2**31 and wrap; its bits 24 to 31 are the result all the same.
            images = ((middle * inner + outside * outer + (1 << 23)) >> 24).to(torch.uint8)
        images = images.transpose(-1, -2)
    return images


def _slide(cubic: bool, along_rows: bool, images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    """Shear or translation: every line is interpolated along itself only."""
    lines = images if along_rows else images.transpose(-1, -2)
    count, length = lines.shape[-2:]
    slope, offset = numbers[:, :2].view(-1, 2, 1, 1).unbind(1)  # (n, 1, 1) each
    position = _middles(length, images) + slope * _middles(count, images)[:, None] + offset  # (n, count, length)
    inside = (position >= 0) & (position < length)
    share, place = _split(position)
    # Two or four of (n, 3, count, length).
    taps = [lines.gather(-1, _spread((place + k).clamp(0, length - 1), lines)) for k in _reach(cubic)]
    result = torch.where(inside[:, None], _interpolate(taps, share[:, None]).clamp_(0, 255).to(torch.uint8), fill)
    return result if along_rows else result.transpose(-1, -2)


def _affine(cubic: bool, images: Tensor, numbers: Tensor, tables: Tensor, fill: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    m = numbers.view(-1, 6, 1, 1).unbind(1)  # 6 of (n, 1, 1)
    x, y = _middles(width, images), _middles(height, images)[:, None]
    px, py = m[0] * x + m[1] * y + m[2], m[3] * x + m[4] * y + m[5]  # (n, H, W) each
    inside = (px >= 0) & (px < width) & (py >= 0) & (py < height)
    (share_x, left), (share_y, top) = _split(px), _split(py)
    flat, rows = images.flatten(2), []  # (n, 3, H * W)
    for j in _reach(cubic):
        row = (top + j).clamp(0, height - 1) * width
        places = [row + (left + i).clamp(0, width - 1) for i in _reach(cubic)]
        taps = [flat.gather(2, _spread(place.flatten(1), flat)).view_as(images) for place in places]
        rows.append(_interpolate(taps, share_x[:, None]))  # (n, 3, H, W), float64
    return torch.where(inside[:, None], _interpolate(rows, share_y[:, None]).clamp_(0, 255).to(torch.uint8), fill)


def _reach(cubic: bool) -> range:
    """Neighbours of a source pixel that are interpolated."""
    return range(-1, 3) if cubic else range(2)


def _middles(length: int, images: Tensor) -> Tensor:
    return torch.arange(length, device=images.device, dtype=torch.float64) + 0.5


def _split(position: Tensor) -> tuple[Tensor, Tensor]:
    """How far a position is behind the middle of its pixel, and the pixel."""
    position = position - 0.5
    whole = position.floor()
    return position - whole, whole.long()


def _spread(places: Tensor, images: Tensor) -> Tensor:
    return places[:, None].expand(-1, images.shape[1], *places.shape[1:])  # (n, 3, ...)


def _interpolate(taps: list[Tensor], share: Tensor) -> Tensor:
    """Pillow's cubic (slope -1) or line, in double precision; pixels become integers that their differences fit in."""
    taps = [tap.to(torch.int16) if tap.dtype == torch.uint8 else tap for tap in taps]
    if len(taps) == 2:
        return ((taps[1] - taps[0]) * share).add_(taps[0])
    a, b, c, d = taps
    value = (b - a - c + d) * share
    value.add_(2 * (a - b) + c - d).mul_(share).add_(c - a).mul_(share)
    return value.add_(b)


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """``tables`` uint8 (n, 1 or 3, 256)."""
    return tables.expand(-1, 3, -1).gather(2, images.flatten(2).long()).view_as(images)


def _luma(images: Tensor) -> Tensor:
    """ITU-R 601-2 as int32 (n, 1, H, W)."""
    r, g, b = images.to(torch.int32).split(1, dim=1)
    return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16


def _blend(low: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
    """Image.blend in single precision with the factor of every image, cut off."""
    factor = numbers[:, :1].float().view(-1, 1, 1, 1)  # (n, 1, 1, 1)
    return (images.float() - low).mul_(factor).add_(low).clamp_(0, 255).to(torch.uint8)


_SIMPLE: dict[int, _Operation] = {
    ops.FLIP: _flip,
    ops.GRAYSCALE: _gray,
    ops.AUTO_CONTRAST: _auto_contrast,
    ops.EQUALIZE: _equalize,
    ops.CONTRAST: _contrast,
    ops.SATURATION: _saturation,
    ops.SHARPNESS: _sharpness,
    ops.HUE: _hue,
}
