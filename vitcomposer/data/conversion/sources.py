"""Lists the images of a conversion: of class folders, a list of files, torchvision, scikit-learn's digits.

A source knows its splits as lists of :class:`Item` and gives the encoded bytes of one item. Bytes of files are handed
on as they are; images that only exist as arrays become PNG, which loses nothing.
"""

import csv
import hashlib
import importlib
import json
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from vitcomposer.data.conversion.encode import Exif
from vitcomposer.data.conversion.folder_splits import Labelled, Layout, class_folder, find_layout
from vitcomposer.data.conversion.folder_splits import find_copies as report_copies
from vitcomposer.data.conversion.folders import (
    EMPTY,
    IMAGE_SUFFIXES,
    NO_VAL,
    NOTES,
    UNKNOWN,
    ImageFile,
    Report,
    find_images,
    read_file,
    scan_classes,
)
from vitcomposer.errors import did_you_mean

UNLABELLED = "unlabelled"  # the one class of images without classes
PNG_OVERHEAD = 128  # header and checksums: keeps the size of an image that is yet to be encoded an upper bound


class Item(NamedTuple):
    """One image: a name that is unique in its source, its size in bytes (or an upper bound) and its label."""

    name: str
    size: int
    label: int


class Source(ABC):
    """The images of one or several splits.

    Attributes:
        folder: All of which is read; a conversion must not write into it.
        warnings: What was found in it and is no error, a line each.
        exif: Whether its images are turned upright by EXIF where nothing else is said (see ``StoreOptions``).
        held_out: Share of each class that was put aside for ``val``; None where the splits came as they are.
    """

    exif: Exif = "keep"
    class_names: list[str]
    splits: dict[str, list[Item]]
    folder: Path | None = None
    warnings: Sequence[str] = ()
    held_out: float | None = None

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

    A folder for training beside one for validation are the splits, and a third for test where it has the classes of
    training. Otherwise the class folders are in ``root`` and each class gives the same share of its images to ``val``.

    Args:
        root: Folder of the data set.
        val_name: Name of the folder beside the one for training; None takes one of the usual name.
        val_fraction: Share of each class for ``val`` when ``root`` holds class folders, in [0, 1); 0 gives no ``val``.
        seed: Of that draw.
        find_copies: Whether to look for files that are in two classes or splits; they are ``warnings``.

    Raises:
        ValueError: All that makes the labels of the folder doubtful, at once; ``warnings`` has what does not.
    """

    exif = "apply"

    def __init__(
        self,
        root: str | Path,
        *,
        val_name: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        find_copies: bool = True,
    ) -> None:
        self.root = self.folder = Path(root)
        self.report = Report()
        if not self.root.is_dir():
            raise ValueError(f"{root} must be a folder with one folder per class. There is no such folder.")
        _check_val_fraction(val_fraction)
        layout = find_layout(self.root, self.report, val_name)
        scanned = {split: self._scan(folder) for split, folder in (layout.splits or {"train": layout.classes}).items()}
        self.class_names = list(scanned["train"])
        self.report.add(EMPTY, *(name for name, files in scanned["train"].items() if not files))
        if len(self.class_names) == 1:
            self.report.add(NOTES, f"There is one class, {self.class_names[0]}: labels tell nothing.")
        self._compare_classes(scanned, layout)
        self.splits = {split: self._items(classes) for split, classes in scanned.items()}
        self.report.check(self.root)
        if not layout.splits and val_fraction:
            self.splits, self.held_out = hold_out(self.splits["train"], val_fraction, seed), val_fraction
        if "val" in self.splits:
            measured = {item.label for item in self.splits["val"]}
            self.report.add(NO_VAL, *(name for at, name in enumerate(self.class_names) if at not in measured))
        if find_copies:
            files = [Labelled(split, i.label, i.name, i.size) for split, items in self.splits.items() for i in items]
            report_copies(self.root, files, self.report)
        self.warnings = self.report.lines(errors=False)

    def read(self, item: Item) -> bytes:
        """The file as it is."""
        return read_file(self.root / item.name)

    def _scan(self, folder: Path) -> dict[str, list[ImageFile]]:
        return scan_classes(self.root, class_folder(folder, self.report, self.root), self.report)

    def _compare_classes(self, scanned: dict[str, dict[str, list[ImageFile]]], layout: Layout) -> None:
        """Leave out a split test whose classes are others; of val they are errors, for they have no label."""
        for split, classes in list(scanned.items()):
            unknown = [name for name in classes if name not in scanned["train"]]
            if split == "test" and (unknown or not any(classes.values())):
                where = layout.splits[split]
                self.report.add(NOTES, f"{where} is left out: its folders are not the classes of the split train.")
                del scanned[split]
            elif unknown:
                missing = [name for name in scanned["train"] if name not in classes]
                for names, alone in ((unknown, split), (missing, "train")):
                    self.report.add(UNKNOWN, *(f"{name} (only in {layout.splits[alone]})" for name in names))

    def _items(self, classes: dict[str, list[ImageFile]]) -> list[Item]:
        label = {name: at for at, name in enumerate(self.class_names)}
        known = ((label[name], files) for name, files in classes.items() if name in label)
        return [Item(file.name, file.size, at) for at, files in known for file in files]


class UnlabelledSource(Source):
    """All images of a folder and of those below it, as the split ``train`` of one class, for training without labels.

    Raises:
        ValueError: No image, or folders whose content is not known.
    """

    exif = "apply"

    def __init__(self, root: str | Path) -> None:
        self.root = self.folder = Path(root)
        self.report = Report()
        if not self.root.is_dir():
            raise ValueError(f"{root} must be a folder of images. There is no such folder.")
        self.splits = {"train": [Item(file.name, file.size, 0) for file in find_images(self.root, self.report)]}
        self.report.check(self.root)
        if not self.splits["train"]:
            raise ValueError(f"{root} must hold images, or folders of them. It holds none.")
        self.class_names = [UNLABELLED]
        self.warnings = self.report.lines(errors=False)

    def read(self, item: Item) -> bytes:
        """The file as it is."""
        return read_file(self.root / item.name)


class ListSource(Source):
    """Lines of a path and a label, separated by a comma, a tab or white space.

    Args:
        file: The list. A first line that names the columns is left out.
        split: Name of the one split; None makes ``train`` and ``val`` of it, as of class folders without splits.
        root: Folder that relative paths start from; None is the folder of the list.
        class_names: Names in the order of the labels. None takes the names found, sorted, or, when all labels are
            numbers, the numbers up to the largest one.
        val_fraction: Share of each class for ``val`` where ``split`` is None, in [0, 1); 0 gives no ``val``.
        seed: Of that draw.

    Raises:
        ValueError: A line that cannot be used, as ``file:line``.
    """

    exif = "apply"

    def __init__(
        self,
        file: str | Path,
        *,
        split: str | None,
        root: str | Path | None = None,
        class_names: list[str] | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        _check_val_fraction(val_fraction)
        self.root = Path(root) if root is not None else Path(file).parent
        self.report = Report()
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
        seen: dict[str, tuple[int, int]] = {}
        for (line, path, label), is_number in zip(rows, numbers, strict=True):
            where = f"{file}:{line}"
            value = index.get(label, int(label) if is_number else None)
            if value is None or not 0 <= value < len(class_names):
                raise ValueError(
                    f"{where}: the label must be one of the {len(class_names)} classes{_near(label, index)}"
                )
            line_before, value_before = seen.setdefault(path, (line, value))
            if value_before != value:
                raise ValueError(
                    f"{where}: {path} must have one label, it has another in line {line_before}. Mend one."
                )
            items.append(Item(path, self._size(path, where), value))
        self.splits = {split or "train": items}
        if split is None and val_fraction:
            self.splits, self.held_out = hold_out(items, val_fraction, seed), val_fraction

    def read(self, item: Item) -> bytes:
        """The file as it is."""
        return read_file(self.root / item.name)

    def _size(self, path: str, where: str) -> int:
        try:
            status = (self.root / path).stat()
        except OSError as error:
            raise ValueError(
                f"{where}: {self.root / path} cannot be read: {error.strerror}. Set --root to the folder that the "
                "paths start from."
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{where}: {self.root / path} must be a file. It is a folder, pipe, socket or device.")
        return status.st_size


class DigitsSource(Source):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 grey pixels; a fifth of each class is ``val``."""

    def __init__(self, *, seed: int = 0) -> None:
        load_digits = importlib.import_module("sklearn.datasets").load_digits
        digits = load_digits()
        self.pixels = (digits.images * (255 / 16)).round().astype("uint8")  # stored as 0..16
        self.class_names = [str(name) for name in digits.target_names]
        size = self.pixels[0].size + PNG_OVERHEAD
        items = [Item(f"digits/{index:04}.png", size, int(label)) for index, label in enumerate(digits.target)]
        self.splits, self.held_out = hold_out(items, 0.2, seed), 0.2

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


def _check_val_fraction(fraction: float) -> None:
    if not 0 <= fraction < 1:
        raise ValueError(f"--val-fraction must be in [0, 1), got {fraction}. 0.1 keeps a tenth for validation.")


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
