"""Programs of a batch in torch against the same programs on the processor, image by image."""

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_sample_image

from vitcomposer.data.augment import programs as ops
from vitcomposer.data.augment import programs_torch as ops_device
from vitcomposer.data.augment.programs import apply_program, encode
from vitcomposer.data.augment.programs_torch import apply_programs

FILL = np.array([124, 116, 104], np.uint8)
VALUES: dict[int, tuple[float, float]] = {
    ops.POSTERIZE: (0, 8),
    ops.SOLARIZE: (0, 256),
    ops.SOLARIZE_ADD: (0, 128),
    ops.HUE: (-0.5, 0.5),
    ops.GAUSSIAN_BLUR: (0.1, 3.5),
    ops.ROTATE: (-60, 60),
    ops.SHEAR_X: (-0.5, 0.5),
    ops.SHEAR_Y: (-0.5, 0.5),
    ops.TRANSLATE_X: (-40, 40),
    ops.TRANSLATE_Y: (-40, 40),
}
SIZES = [(64, 64), (41, 70), (3, 3), (2, 5), (1, 1)]


def draw_value(rng: random.Random, code: int) -> float:
    return rng.uniform(*VALUES.get(code % ops.BILINEAR, (0.0, 2.0)))


def crops(count: int, height: int, width: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(count)
    whole = load_sample_image("china.jpg")
    corners = zip(rng.integers(0, 300, count), rng.integers(0, 500, count), strict=True)
    images = np.stack([whole[top : top + height, left : left + width] for top, left in corners])
    images[-1] = images[-1, 0, 0]  # flat
    images[-2] = rng.integers(0, 2, (height, width, 3)) * 255
    return images


def programs(rng: random.Random, count: int, length: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Random ones; some are shorter, and the quarter turns are among them."""
    encoded = []
    for _ in range(count):
        codes = rng.choices(ops.CODES, k=rng.randint(0, length))
        steps = [(code, draw_value(rng, code)) for code in codes]
        encoded.append(
            encode([(c, 90.0 * rng.randint(-4, 4)) if c == ops.ROTATE else (c, v) for c, v in steps], length)
        )
    codes, values = zip(*encoded, strict=True)
    return np.stack(codes), np.stack(values)


def one_by_one(images: NDArray[np.uint8], codes: NDArray[np.int8], values: NDArray[np.float32]) -> torch.Tensor:
    images = images.copy()
    for pixels, *program in zip(images, codes, values, strict=True):
        apply_program(pixels, *program, FILL)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("code", ops.CODES)
def test_operation_equals_that_of_the_processor(code: int, size: tuple[int, int]) -> None:
    rng, images = random.Random(code), crops(8, *size)
    codes = np.full((8, 1), code, np.int8)
    values = np.array([[draw_value(rng, code)] for _ in range(8)], np.float32)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(apply_programs(batch, codes, values, FILL), one_by_one(images, codes, values))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_mixed_programs_equal_those_of_the_processor(layout: torch.memory_format) -> None:
    images = crops(48, 40, 40)
    codes, values = programs(random.Random(1), 48, 6)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    before = batch.clone()
    result = apply_programs(batch, codes, values, FILL)
    assert torch.equal(result, one_by_one(images, codes, values))
    assert result.dtype == torch.uint8 and result.is_contiguous(memory_format=layout)
    assert torch.equal(batch, before), "the input stays"


def test_empty_programs_change_nothing() -> None:
    batch = torch.from_numpy(crops(3, 8, 8)).permute(0, 3, 1, 2)
    assert torch.equal(apply_programs(batch, np.zeros((3, 4), np.int8), np.zeros((3, 4), np.float32), FILL), batch)


def test_chunks_give_the_pixels_of_the_whole_group(monkeypatch: pytest.MonkeyPatch) -> None:
    images = crops(11, 24, 24)
    codes = np.full((11, 1), ops.ROTATE, np.int8)
    values = np.linspace(-40, 40, 11, dtype=np.float32)[:, None]
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    whole = apply_programs(batch, codes, values, FILL)
    monkeypatch.setattr(ops_device, "_CHUNK_BYTES", 3 * 24 * 24 * ops_device._BYTES_PER_PIXEL)
    assert torch.equal(apply_programs(batch, codes, values, FILL), whole)


def test_no_operation_looks_at_the_pixels() -> None:
    """Meta tensors have none: an item(), a nonzero() or a mask as an index would raise."""
    count = len(ops.CODES)
    codes = np.array(ops.CODES, np.int8)[:, None]
    batch = torch.empty((count, 3, 16, 16), dtype=torch.uint8, device="meta")
    result = apply_programs(batch, codes, np.full((count, 1), 0.3, np.float32), FILL)
    assert result.shape == batch.shape and result.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(64, 64), (41, 70)], ids=str)
def test_cuda_equals_the_processor_and_never_synchronises(size: tuple[int, int]) -> None:
    rng, count = random.Random(2), 4 * len(ops.CODES)
    images = crops(count, *size)
    codes = np.tile(np.array(ops.CODES, np.int8), 4)[:, None]
    values = np.array([[draw_value(rng, code)] for code in codes[:, 0].tolist()], np.float32)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    on_device = batch.cuda()
    apply_programs(on_device, codes, values, FILL)  # the first call loads kernels and pins memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = apply_programs(on_device, codes, values, FILL)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (result.cpu().int() - one_by_one(images, codes, values).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() <= 1e-3
