"""torchvision's own JPEG decoder and the v2 transforms on uint8 tensors, which its documentation calls the fast way."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import InterpolationMode, v2

from benchmarks.input.candidates import BATCH, SIZE
from benchmarks.input.candidates.folder import image_folder

PACKAGES = ("torch", "torchvision")


def batches(store: Path) -> Iterator[Tensor]:
    torch.set_num_threads(1)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    data = image_folder(store, transform, loader=lambda path: decode_image(read_file(path), ImageReadMode.RGB))
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        for images, _ in loader:
            yield images
