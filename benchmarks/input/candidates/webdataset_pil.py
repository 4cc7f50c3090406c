"""webdataset's tar shards, decoded by Pillow, with torchvision transforms."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
import webdataset
from torch import Tensor
from torchvision import transforms

from benchmarks.input.candidates import BATCH, MEAN, SIZE, STD, photo_files

PACKAGES = ("webdataset", "torch", "torchvision", "pillow")


def write(photos: Path, store: Path) -> None:
    with tarfile.open(store / "shard-000000.tar", "w") as tar:
        for number, file in enumerate(photo_files(photos)):
            for suffix, data in (("jpg", file.read_bytes()), ("cls", b"0")):
                entry = tarfile.TarInfo(f"{number:06}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def batches(store: Path) -> Iterator[Tensor]:
    torch.set_num_threads(1)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    data = (
        webdataset.WebDataset(str(store / "shard-000000.tar"), shardshuffle=False)
        .repeat()
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH, partial=False)
    )
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=0)
    while True:
        for images, _ in loader:
            yield images
