"""torchvision's ImageFolder with its classic transforms on Pillow images: what most ImageNet scripts do."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.input.candidates import BATCH, MEAN, SIZE, STD
from benchmarks.input.candidates.folder import image_folder

PACKAGES = ("torch", "torchvision", "pillow")

_BICUBIC = transforms.InterpolationMode.BICUBIC


def batches(
    store: Path, *, dtype: str = "float32", policy: str | None = None, workers: int = 0, size: int = SIZE
) -> Iterator[Tensor]:
    torch.set_num_threads(1)
    last = [transforms.PILToTensor()]
    if dtype == "float32":
        last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, interpolation=_BICUBIC),
            transforms.RandomHorizontalFlip(),
            *_policy(policy),
            *last,
        ]
    )
    loader = DataLoader(
        image_folder(store, transform),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        for images, _ in loader:
            yield images


def _policy(name: str | None) -> list:
    if name == "rand_augment":
        return [transforms.RandAugment(num_ops=2, magnitude=9, interpolation=_BICUBIC)]
    if name == "three_augment":  # DeiT III, arXiv:2204.07118: one of three, then colour jitter
        choices = [
            transforms.RandomGrayscale(p=1),
            transforms.RandomSolarize(threshold=128, p=1),
            transforms.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0)),
        ]
        return [transforms.RandomChoice(choices), transforms.ColorJitter(0.3, 0.3, 0.3)]
    return []
