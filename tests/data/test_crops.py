"""Boxes against timm draw by draw, and against torchvision by distribution."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from vitcomposer.data import boxes as crops

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (64, 64), (30, 400), (900, 50)])
@pytest.mark.parametrize("scale", [SCALE, (0.9, 1.0)])
def test_random_resized_box_equals_timm_draw_by_draw(shape: tuple[int, int], scale: tuple[float, float]) -> None:
    image = Image.new("RGB", (shape[1], shape[0]))
    rng, reference = random.Random(3), random.Random(3)
    state = random.getstate()
    for _ in range(100):
        random.setstate(reference.getstate())
        expected = RandomResizedCropAndInterpolation.get_params(image, scale, RATIO)
        reference.setstate(random.getstate())
        assert crops.random_resized_box(rng, *shape, scale, RATIO) == expected
    random.setstate(state)


@pytest.mark.parametrize("shape", [(375, 500), (480, 200)])
def test_random_resized_box_is_distributed_as_torchvision(shape: tuple[int, int]) -> None:
    rng = random.Random(0)
    ours = np.array([crops.random_resized_box(rng, *shape, SCALE, RATIO) for _ in range(4000)], dtype=float)
    image = torch.empty(3, *shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(4000)]
    theirs = np.array(theirs, dtype=float)
    for name, measure in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "centre y": lambda b: b[:, 0] + b[:, 2] / 2,
        "centre x": lambda b: b[:, 1] + b[:, 3] / 2,
    }.items():
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 0.01, name


@pytest.mark.parametrize("shape", [(1, 1000), (1000, 1), (1, 1), (2, 900), (7, 300), (300, 7)])
def test_random_resized_box_of_a_strip_stays_inside_and_has_pixels(shape: tuple[int, int]) -> None:
    rng = random.Random(1)
    for _ in range(50):
        top, left, height, width = crops.random_resized_box(rng, *shape, SCALE, RATIO)
        assert height >= 1 and width >= 1 and top >= 0 and left >= 0
        assert top + height <= shape[0] and left + width <= shape[1]


@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (101, 77), (33, 1000), (64, 64), (20, 21)])
@pytest.mark.parametrize(("size", "shorter"), [(32, 36), (32, 32), (33, 40), (32, 45)])
def test_resize_and_centre_box_equal_torchvision(shape: tuple[int, int], size: int, shorter: int) -> None:
    rows, columns = np.indices(shape)
    image = Resize(shorter)(Image.fromarray((rows % 256).astype(np.uint8)))
    height, width = crops.shape_with_shorter_side(*shape, shorter)
    assert (height, width) == (image.height, image.width)
    top, left, box_height, box_width = crops.centre_box(height, width, size)
    marked = np.arange(height * width, dtype=np.int32).reshape(height, width)
    expected = np.asarray(CenterCrop(size)(Image.fromarray(marked)))
    np.testing.assert_array_equal(marked[top : top + box_height, left : left + box_width], expected)


@pytest.mark.parametrize("size", [64, 32, 8])
def test_erasing_box_equals_timm_draw_by_draw(size: int) -> None:
    timm_erasing = RandomErasing(probability=0.25, mode="pixel", device="cpu")
    rng, reference = random.Random(11), random.Random(11)
    state = random.getstate()
    erased = 0
    for _ in range(200):
        image = torch.zeros(1, size, size)
        random.setstate(reference.getstate())
        timm_erasing(image)
        reference.setstate(random.getstate())
        box = torch.tensor([crops.random_erasing_box(rng, size, 0.25)])
        assert torch.equal(crops.box_mask(box, size, size)[0], image != 0)
        erased += int(box[0, 2] > 0)
    random.setstate(state)
    assert 30 <= erased <= 70


def test_box_mask_marks_exactly_the_box() -> None:
    mask = crops.box_mask(torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 5, 7]]), 5, 7)
    expected = torch.zeros(3, 1, 5, 7, dtype=torch.bool)
    expected[0, :, 1:4, 2:6] = True
    expected[2] = True
    assert torch.equal(mask, expected)
