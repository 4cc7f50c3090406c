"""Where the images of a conversion come from: class folders, a list of files, torchvision, scikit-learn's digits.

A source knows its splits as lists of :class:`Item` and gives the encoded bytes of one item. Bytes of files are handed
on as they are; images that only exist as arrays become PNG, which loses nothing.
"""

import csv
import hashlib
import importlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from vitcomposer.schema import did_you_mean

_SUFFIXES = "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm avif jp2 tga"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))
VAL_NAMES = ("val", "valid", "validation", "test")
PNG_OVERHEAD = 128  # header and checksums: keeps the size of an image that is yet to be encoded an upper bound


class Item(NamedTuple):
    """One image: a name that is unique in its source, its size in bytes (or an upper bound) and its label."""

    name: str
    size: int
    label: int


class Source(ABC):
    """The images of one or several splits. ``ignored`` names files that were left out as they are no images."""

    class_names: list[str]
    splits: dict[str, list[Item]]
    ignored: Sequence[str] = ()

    @abstractmethod
    def read(self, item: Item) -> bytes:
        """The encoded image."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "splits": {}}  # workers get their items part by part; the lists may be huge


def hash_order(seed: int, name: str) -> bytes:
    """A sort key that shuffles names the same way everywhere, whatever the order they were found in."""
    return hashlib.blake2b(os.fsencode(f"{seed}/{name}"), digest_size=16).digest()


class FolderSource(Source):
    """One folder per class, as torchvision's ImageFolder has it; files may lie deeper.

    ``root/train`` beside ``root/val`` are the splits. Otherwise the class folders are in ``root`` and each class gives
    the same share of its images to ``val``.

    Args:
        root: Folder of the data set.
        val_name: Name of the folder beside ``train``; None takes the first of val, valid, validation, test.
        val_fraction: Share of each class for ``val`` when ``root`` holds class folders, in [0, 1); 0 gives no ``val``.
        seed: Of that draw.

    Raises:
        ValueError: No images, a class without images, or different classes in the two splits.
    """

    def __init__(
        self, root: str | Path, *, val_name: str | None = None, val_fraction: float = 0.1, seed: int = 0
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"{root} must be a folder with one folder per class. There is no such folder.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"--val-fraction must be in [0, 1), got {val_fraction}. 0.1 keeps a tenth for validation.")
        self.ignored: list[str] = []
        val_name = self._find_val(val_name)
        if val_name is None:
            self.class_names, items = self._scan(self.root)
            self.splits = hold_out(items, val_fraction, seed) if val_fraction else {"train": items}
            return
        self.class_names, train = self._scan(self.root / "train")
        val_names, val = self._scan(self.root / val_name)
        check_same_classes(self.class_names, val_names, str(self.root / "train"), str(self.root / val_name))
        self.splits = {"train": train, "val": val}

    def read(self, item: Item) -> bytes:
        """The file as it is."""
        return (self.root / item.name).read_bytes()

    def _find_val(self, val_name: str | None) -> str | None:
        names = [val_name] if val_name else VAL_NAMES
        found = [name for name in names if (self.root / name).is_dir()]
        if (self.root / "train").is_dir() and found:
            return found[0]
        if val_name:
            raise ValueError(
                f"{self.root} must hold the folders train and {val_name} (--val-name). At least one is missing."
            )
        if _subfolders(self.root) == ["train"]:
            raise ValueError(
                f"{self.root} must hold train and one of {', '.join(VAL_NAMES)}, got train alone. Name the other with "
                f"--val-name, or convert {self.root / 'train'} to hold out a part of it (--val-fraction)."
            )
        return None

    def _scan(self, folder: Path) -> tuple[list[str], list[Item]]:
        names = _subfolders(folder)
        if not names:
            raise ValueError(f"{folder} must hold one folder per class. It holds no folder.")
        self.ignored += [_relative(p, self.root) for p in sorted(folder.iterdir()) if p.is_file()]
        items: list[Item] = []
        for label, name in enumerate(names):
            before = len(items)
            for path in _files_below(folder / name):
                relative = _relative(path, self.root)
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    items.append(Item(relative, path.stat().st_size, label))
                else:
                    self.ignored.append(relative)
            if len(items) == before:
                raise ValueError(
                    f"Every class folder must hold an image, got {folder / name} without a file that ends in one of "
                    f"{', '.join(sorted(IMAGE_SUFFIXES))}. Fill or remove it."
                )
        return names, items


class ListSource(Source):
    """Lines of a path and a label, separated by a comma, a tab or white space.

    Args:
        file: The list. A first line that names the columns is left out.
        split: Name of the one split.
        root: Folder that relative paths start from; None is the folder of the list.
        class_names: Names in the order of the labels. None takes the names found, sorted, or, when all labels are
            numbers, the numbers up to the largest one.

    Raises:
        ValueError: A line that cannot be used, as ``file:line``.
    """

    def __init__(
        self, file: str | Path, *, split: str, root: str | Path | None = None, class_names: list[str] | None = None
    ) -> None:
        self.root = Path(root) if root is not None else Path(file).parent
        rows = _read_rows(Path(file))
        if rows and Path(rows[0][1]).suffix.lower() not in IMAGE_SUFFIXES and not (self.root / rows[0][1]).exists():
            rows = rows[1:]  # a header
        if not rows:
            raise ValueError(f"{file} must hold lines of a path and a label. It holds none.")
        numbers = [bool(re.fullmatch(r"-?\d+", label)) for _, _, label in rows]
        if class_names is None or not set(class_names) >= {label for _, _, label in rows}:
            _check_same_kind(file, rows, numbers)
        if class_names is None:
            labels = {label for _, _, label in rows}
            class_names = [str(i) for i in range(1 + max(map(int, labels)))] if numbers[0] else sorted(labels)
        self.class_names = class_names
        index = {name: label for label, name in enumerate(class_names)}
        items: list[Item] = []
        for (line, path, label), is_number in zip(rows, numbers, strict=True):
            where = f"{file}:{line}"
            value = index.get(label, int(label) if is_number else None)
            if value is None or not 0 <= value < len(class_names):
                raise ValueError(
                    f"{where}: the label must be one of the {len(class_names)} classes{_near(label, index)}"
                )
            items.append(Item(path, self._size(path, where), value))
        self.splits = {split: items}

    def read(self, item: Item) -> bytes:
        """The file as it is."""
        return (self.root / item.name).read_bytes()

    def _size(self, path: str, where: str) -> int:
        try:
            return (self.root / path).stat().st_size
        except OSError as error:
            raise ValueError(
                f"{where}: {self.root / path} cannot be read: {error.strerror}. Set --root to the folder that the "
                "paths start from."
            ) from error


class DigitsSource(Source):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 grey pixels; a fifth of each class is ``val``."""

    def __init__(self, *, seed: int = 0) -> None:
        load_digits = importlib.import_module("sklearn.datasets").load_digits
        digits = load_digits()
        self.pixels = (digits.images * (255 / 16)).round().astype("uint8")  # stored as 0..16
        self.class_names = [str(name) for name in digits.target_names]
        size = self.pixels[0].size + PNG_OVERHEAD
        items = [Item(f"digits/{index:04}.png", size, int(label)) for index, label in enumerate(digits.target)]
        self.splits = hold_out(items, 0.2, seed)

    def read(self, item: Item) -> bytes:
        """The digit as PNG."""
        from PIL import Image

        return encode_png(Image.fromarray(self.pixels[int(Path(item.name).stem)]))


def hold_out(items: list[Item], fraction: float, seed: int) -> dict[str, list[Item]]:
    """Split items into ``train`` and ``val``, class by class, by a hash of seed and name.

    A class of two or more images gives at least one to either split; a single image is for training.
    """
    classes: dict[int, list[Item]] = {}
    for item in items:
        classes.setdefault(item.label, []).append(item)
    train: list[Item] = []
    val: list[Item] = []
    for members in classes.values():
        members.sort(key=lambda item: hash_order(seed, f"val/{item.name}"))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        val += members[:count]
        train += members[count:]
    if not val:
        raise ValueError("No class has two images, so nothing can be held out. Use --val-fraction 0 for no val split.")
    return {"train": train, "val": val}


def check_same_classes(names: list[str], others: list[str], where: str, elsewhere: str) -> None:
    """Raise ValueError, naming the classes that differ, unless both splits have the same classes in the same order."""
    if names == others:
        return
    alone, others_alone = (sorted(set(a) - set(b)) for a, b in ((names, others), (others, names)))
    found = [
        f"only in {place}: {', '.join(some[:10])}{f' and {len(some) - 10} more' if len(some) > 10 else ''}"
        for place, some in ((where, alone), (elsewhere, others_alone))
        if some
    ] or ["the same classes in another order"]
    raise ValueError(f"{where} and {elsewhere} must have the same classes, got {'; '.join(found)}. Make them equal.")


def read_class_names(file: str | Path) -> list[str]:
    """Class names from a file: a JSON list, or one name per line."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"--classes {file} cannot be read: {error.strerror}.") from error
    names = json.loads(text) if text.lstrip().startswith("[") else [line.strip() for line in text.splitlines()]
    return [str(name) for name in names if name != ""]


def encode_png(image: Any) -> bytes:
    """A Pillow image as PNG."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files_below(folder: Path) -> list[Path]:
    # Class folders that are links to one big archive of images are common, so links are followed.
    return sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".")
    )


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _near(label: str, index: dict[str, int]) -> str:
    return f", got {label!r}.{did_you_mean(label, index)} Mend the line or use --classes."


def _read_rows(file: Path) -> list[tuple[int, str, str]]:
    """Line number, path and label of every line that is not empty."""
    try:
        # surrogateescape is how Python names files whose names are no valid text
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read: {error.strerror}. Give a file of lines of a path and a label."
        ) from error
    first = next((line for line in lines if line.strip()), "")
    delimiter = next((mark for mark in "\t," if mark in first), None)
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = next(csv.reader([line], delimiter=delimiter)) if delimiter else line.strip().rsplit(maxsplit=1)
        fields = [field.strip() for field in fields]
        if len(fields) != 2 or not all(fields):
            raise ValueError(f"{file}:{number}: a line must be a path and a label, got {line!r}. Mend the line.")
        rows.append((number, fields[0], fields[1]))
    return rows


def _check_same_kind(file: str | Path, rows: list[tuple[int, str, str]], numbers: list[bool]) -> None:
    """Numbers among names are mistakes: a silent class called 3 would shift every label after it."""
    odd = next((row for row, is_number in zip(rows, numbers, strict=True) if is_number != numbers[0]), None)
    if odd:
        raise ValueError(
            f"{file}:{odd[0]}: labels must be all numbers or all names, got {odd[2]!r} here and {rows[0][2]!r} at "
            f"{file}:{rows[0][0]}. Mend the line or list all classes in --classes."
        )
