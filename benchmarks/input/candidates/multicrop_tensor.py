"""Multi-crop with torchvision's JPEG decoder and its v2 transforms on uint8 tensors."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from benchmarks.input.candidates import MULTICROP_BATCH
from benchmarks.input.candidates.folder import image_folder

PACKAGES = ("torch", "torchvision")


def batches(
    store: Path,
    *,
    num_crops: Sequence[int],
    size_crops: Sequence[int],
    crop_scales: Sequence[tuple[float, float]],
    distort: bool,
) -> Iterator[list[Tensor]]:
    torch.set_num_threads(1)
    distortion = [
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))], p=0.5),
    ]
    chains = []
    for count, size, scale in zip(num_crops, size_crops, crop_scales, strict=True):
        crop = v2.RandomResizedCrop(size, scale=scale, antialias=True)
        chains += [v2.Compose([crop, v2.RandomHorizontalFlip(), *(distortion if distort else [])])] * count
    data = image_folder(
        store,
        lambda image: [chain(image) for chain in chains],
        loader=lambda path: decode_image(read_file(path), ImageReadMode.RGB),
    )
    loader = DataLoader(data, batch_size=MULTICROP_BATCH, shuffle=True, drop_last=True)
    while True:
        for crops, _ in loader:
            yield crops
