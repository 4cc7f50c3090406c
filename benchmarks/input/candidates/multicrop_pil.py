"""SwAV's and VISSL's multi-crop: every crop is its own chain of torchvision transforms on the decoded Pillow image."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.input.candidates import MEAN, MULTICROP_BATCH, STD
from benchmarks.input.candidates.folder import image_folder

PACKAGES = ("torch", "torchvision", "pillow")


def batches(
    store: Path,
    *,
    num_crops: Sequence[int],
    size_crops: Sequence[int],
    crop_scales: Sequence[tuple[float, float]],
    distort: bool,
) -> Iterator[list[Tensor]]:
    torch.set_num_threads(1)
    chains = []
    for count, size, scale in zip(num_crops, size_crops, crop_scales, strict=True):
        chain = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale),  # bilinear
                transforms.RandomHorizontalFlip(),
                *(_distortion() if distort else []),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )
        chains += [chain] * count
    data = image_folder(store, lambda image: [chain(image) for chain in chains])
    loader = DataLoader(data, batch_size=MULTICROP_BATCH, shuffle=True, drop_last=True)
    while True:
        for crops, _ in loader:
            yield crops


def _distortion() -> list:
    """SimCLR's at strength 1, with SwAV's blur."""
    return [
        transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([_blur], p=0.5),
    ]


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))
