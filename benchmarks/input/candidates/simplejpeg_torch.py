"""The fastest plain combination of wheels: libjpeg-turbo through simplejpeg, and torch's uint8 antialiased resize."""

from collections.abc import Iterator
from pathlib import Path

import simplejpeg
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop

from benchmarks.input.candidates import BATCH, SIZE
from benchmarks.input.candidates.folder import image_folder

PACKAGES = ("simplejpeg", "torch", "torchvision")


def batches(store: Path) -> Iterator[Tensor]:
    torch.set_num_threads(1)
    loader = DataLoader(image_folder(store, loader=_view), batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        for images, _ in loader:
            yield images


def _view(path: str) -> Tensor:
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(Path(path).read_bytes(), colorspace="RGB")).permute(2, 0, 1)
    top, left, height, width = RandomResizedCrop.get_params(pixels, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
    box = pixels[None, :, top : top + height, left : left + width]
    view = interpolate(box, (SIZE, SIZE), mode="bicubic", antialias=True)[0]
    return view.flip(2) if torch.rand(()) < 0.5 else view
