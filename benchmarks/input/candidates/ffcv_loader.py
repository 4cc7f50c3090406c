"""FFCV's loader on a beton file that its own writer made; one thread, the file in the page cache.

Its decoder averages pixel areas (OpenCV's INTER_AREA) where the others filter, and decodes JPEG with the fast DCT. Its
writer would encode the pixels once more; here it stores the files as they are, so that all decode the same bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from PIL import Image
from torch import Tensor

from benchmarks.input.candidates import BATCH, EPOCH_REPEATS, SIZE, photo_files

PACKAGES = ("ffcv", "numba", "opencv-python-headless", "torch")

_BETON = "photos.beton"


def write(photos: Path, store: Path, *, mode: str) -> None:
    image = RGBImageField(write_mode=mode)
    if mode == "jpg":
        image.encode = _keep_file
    writer = DatasetWriter(str(store / _BETON), {"image": image, "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(_Photos(photo_files(photos), as_files=mode == "jpg"))


class _Photos:
    def __init__(self, files: list[Path], *, as_files: bool) -> None:
        self._files, self._as_files = files, as_files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Path | np.ndarray, int]:
        file = self._files[index]
        return (file if self._as_files else np.asarray(Image.open(file))), 0


def _keep_file(destination: np.ndarray, file: Path, malloc: Any) -> None:
    with Image.open(file) as image:
        destination["width"], destination["height"] = image.size
    destination["mode"] = IMAGE_MODES["jpg"]
    encoded = np.frombuffer(file.read_bytes(), np.uint8)
    destination["data_ptr"], storage = malloc(encoded.nbytes)
    storage[:] = encoded


def batches(store: Path) -> Iterator[Tensor]:
    torch.set_num_threads(1)
    decoder = RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    image = [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage(convert_back_int16=False)]
    beton = str(store / _BETON)
    loader = Loader(
        beton,
        indices=np.tile(np.arange(Reader(beton).num_samples, dtype=np.uint64), EPOCH_REPEATS),
        batch_size=BATCH,
        num_workers=1,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
    while True:
        for images, _ in loader:
            yield images
