"""The photo set as torchvision's ImageFolder, for the candidates that read files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from benchmarks.input.candidates import EPOCH_REPEATS


def image_folder(
    store: Path, transform: Callable[[Any], Any] | None = None, loader: Callable[[str], Any] = default_loader
) -> ImageFolder:
    data = ImageFolder(str(store), transform, loader=loader)
    data.samples *= EPOCH_REPEATS
    return data
