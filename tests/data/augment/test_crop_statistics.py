"""The boxes of both groups of SwAV's crops are distributed as torchvision's RandomResizedCrop draws them."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from vitcomposer.data.boxes import random_resized_box
from vitcomposer.data.random import random_key

BOXES = 100_000
REFERENCE = 25_000  # torchvision takes 0.1 ms for one
HEIGHT, WIDTH = 375, 500  # ImageNet's most frequent size


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.05, 0.14)])
def test_boxes_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    ratio = (3 / 4, 4 / 3)
    ours = np.empty((BOXES, 4))
    for i in range(BOXES):
        ours[i] = random_resized_box(random.Random(random_key(0, 0, i, 0)), HEIGHT, WIDTH, scale, ratio)
    image = torch.empty(3, HEIGHT, WIDTH)
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(REFERENCE)], float)
    for name, measure in MEASURES.items():
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 0.01, name


MEASURES = {
    "top": lambda boxes: boxes[:, 0],
    "left": lambda boxes: boxes[:, 1],
    "area": lambda boxes: boxes[:, 2] * boxes[:, 3],
    "aspect": lambda boxes: boxes[:, 3] / boxes[:, 2],
}
