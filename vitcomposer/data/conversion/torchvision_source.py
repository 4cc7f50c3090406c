"""Takes the images of a conversion from the classification data sets of torchvision.

Where torchvision keeps image files, their bytes are taken as they are; where it has arrays, the images become PNG.
"""

import inspect
import warnings
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets

from vitcomposer.data.conversion.sources import PNG_OVERHEAD, Item, Source, encode_png
from vitcomposer.errors import did_you_mean

_SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid", "test")}


class TorchvisionSource(Source):
    """A data set by its name in ``torchvision.datasets``: CIFAR10, FashionMNIST, SVHN, Flowers102, ...

    ``val`` is the data set's validation split where it has one, else its test split.

    Args:
        name: Name of the class.
        root: Folder that torchvision keeps the data in.
        download: Fetch the data when it is not there.

    Raises:
        ValueError: An unknown name, missing data, or a data set that is not one image and one class per sample.
    """

    def __init__(self, name: str, *, root: str | Path, download: bool = False) -> None:
        self.name = name
        self.root = Path(root)
        self._class = _find_class(name)
        self._open: dict[str, Any] = {split: self._build(split, download) for split in _SPLITS}
        self.splits = {split: self._list(split) for split in _SPLITS}
        number = 1 + max(item.label for items in self.splits.values() for item in items)
        names = getattr(self._open["train"], "classes", None)
        self.class_names = [str(n) for n in names] if names and len(names) >= number else list(map(str, range(number)))

    def read(self, item: Item) -> bytes:
        """The original file, or the array as PNG."""
        split, index = item.name.split("/")[:2]
        if split not in self._open:
            self._open[split] = self._build(split, download=False)
        image = _sample(self._open[split], int(index))[0]
        return encode_png(image) if isinstance(image, Image.Image) else Path(image).read_bytes()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_open": {}}  # a worker opens the data set again rather than receive it

    def _build(self, split: str, download: bool) -> Any:
        parameters = inspect.signature(self._class).parameters
        options: dict[str, Any] = {"root": str(self.root)}
        if "download" in parameters:
            options["download"] = download
        if "loader" in parameters or issubclass(self._class, datasets.DatasetFolder):
            options["loader"] = str  # gives the path in place of the decoded image, so the file can be kept as it is
        if "train" in parameters:
            choices: list[dict[str, Any]] = [{"train": split == "train"}]
        elif "split" in parameters:
            choices = [{"split": choice} for choice in _SPLITS[split]]
        else:
            raise ValueError(f"torchvision's {self.name} has no training and test split. Save it as class folders.")
        reason: Exception | None = None
        for choice in choices:
            try:
                return self._class(**options, **choice)
            except ValueError as error:  # torchvision's answer to a split that the data set does not have
                reason = reason or error
            except (RuntimeError, OSError, TypeError) as error:
                remedy = "Check --root." if download else "Add --download, or set --root to the folder it is in."
                raise ValueError(
                    f"torchvision's {self.name} cannot be opened in {self.root}: {error} {remedy}"
                ) from error
        raise ValueError(f"torchvision's {self.name} has no {split} split that is known here: {reason}.") from reason

    def _list(self, split: str) -> list[Item]:
        items = []
        for index in range(len(self._open[split])):
            image, label = _sample(self._open[split], index)
            if isinstance(image, Image.Image):
                size, suffix = image.width * image.height * len(image.getbands()) + PNG_OVERHEAD, "image.png"
            elif isinstance(image, str) and Path(image).is_file():
                size, suffix = Path(image).stat().st_size, Path(image).name
            else:
                label = None
                size, suffix = 0, ""
            if not isinstance(label, int):
                raise ValueError(
                    f"torchvision's {self.name} must give an image and one class per sample. Choose another."
                )
            items.append(Item(f"{split}/{index:07}/{suffix}", size, label))
        return items


def _find_class(name: str) -> Any:
    known = [n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n))]
    if name not in known:
        exact = [n for n in known if n.lower() == name.lower()]  # cifar10: letter by letter it is far from CIFAR10
        hint = did_you_mean(exact[0] if exact else name, known) or f" Known: {', '.join(known)}."
        raise ValueError(f"torchvision has no data set {name!r}.{hint}")
    return getattr(datasets, name)


def _sample(dataset: Any, index: int) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision calls Pillow in ways that newer Pillows call deprecated
        image, label = dataset[index]
    return image, label
