"""MosaicML's StreamingDataset with its ``jpeg`` column and torchvision transforms: the usual Composer recipe."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.input.candidates import BATCH, MEAN, SIZE, STD, lengthen_epoch, photo_files

PACKAGES = ("mosaicml-streaming", "torch", "torchvision", "pillow")


def write(photos: Path, store: Path) -> None:
    with MDSWriter(out=str(store), columns={"x": "jpeg", "y": "int"}) as out:
        for file in photo_files(photos):
            # Streaming stores the file as it is when the image was opened from one.
            out.write({"x": Image.open(file), "y": 0})
    lengthen_epoch(store / "index.json")


class _Images(StreamingDataset):
    def __init__(self, store: Path) -> None:
        super().__init__(local=str(store), batch_size=BATCH, shuffle=True)
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = super().__getitem__(index)
        return self.transform(sample["x"]), sample["y"]


def batches(store: Path) -> Iterator[Tensor]:
    torch.set_num_threads(1)
    loader = DataLoader(_Images(store), batch_size=BATCH, drop_last=True)
    while True:
        for images, _ in loader:
            yield images
