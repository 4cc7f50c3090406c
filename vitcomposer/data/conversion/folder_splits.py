"""Finds which folder of a data set is training, which is validation, and where the folders of the classes are.

A folder is a split where its name is one of the usual ones, in any case, and a folder for training lies beside one for
validation or test. A folder that holds nothing but one folder is a wrapper and gone through.
"""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import xxhash

from vitcomposer.data.conversion.folders import (
    BESIDE,
    LOOPS,
    NOTES,
    OUTSIDE,
    TWO_LABELS,
    TWO_SPLITS,
    Report,
    below,
    is_image,
    subfolders,
)
from vitcomposer.data.jpeg import current_reading
from vitcomposer.escape import for_terminal

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
# Also train2017, val_1, test-clean, trainA: where all folders are called so, they are no classes.
_LIKE_A_SPLIT = re.compile(rf"({'|'.join(name for names in SPLIT_NAMES.values() for name in names)})([\W\d_].*|[a-z])?")
_COMPARED = 200_000  # files of equal size that are looked into for copies
_SAMPLE = 4096  # bytes in the middle of a file, which tell nearly all different files apart


class Layout(NamedTuple):
    """Folders of the splits by our names for them; without any, the class folders lie in ``classes``."""

    splits: dict[str, Path]
    classes: Path


class Labelled(NamedTuple):
    """A file of a split, to be compared with others."""

    split: str
    label: int
    name: str
    size: int


def find_layout(root: Path, report: Report, val_name: str | None = None) -> Layout:
    """Find the splits or the class folders in a folder.

    Args:
        val_name: Of the folder beside the training folder; None takes one of the usual name.

    Raises:
        ValueError: Splits that are not complete or not clear, or class folders that look like splits.
    """
    folder = root
    while True:
        names = subfolders(folder, report, root)
        splits = _splits(folder, names, val_name)
        if splits:
            _note_splits(root, folder, splits, names, report)
            return Layout({split: folder / name for split, name in splits.items()}, folder)
        if len(names) != 1 or split_of(names[0]) or _images(folder) or _is_end(folder / names[0], report, root):
            break
        folder /= names[0]
    if val_name:
        raise ValueError(
            f"{root} must hold a folder for training ({', '.join(SPLIT_NAMES['train'])}) and the folder {val_name} "
            "(--val-name). At least one is missing."
        )
    if not names and report.names(LOOPS):
        raise ValueError(f"{root} must hold one folder per class. It holds nothing but links to itself or above it.")
    if not names:
        raise ValueError(f"{root} must hold one folder per class. It holds no folder.")
    _refuse_splits(folder, names, report)
    if folder != root:
        report.add(NOTES, f"The classes are the folders in {folder}, which is all that {root} holds.")
    return Layout({}, folder)


def class_folder(folder: Path, report: Report, root: Path) -> Path:
    """Where the class folders of a split are: in it, or below wrappers."""
    start = folder
    names = subfolders(folder, report, root)
    while len(names) == 1 and not _images(folder) and not _is_end(folder / names[0], report, root):
        folder /= names[0]
        names = subfolders(folder, report, root)
    if folder != start:
        report.add(NOTES, f"The classes of {start} are the folders in {folder}, which is all that it holds.")
    return folder


def split_of(name: str) -> str | None:
    """train, val or test for a folder with one of the usual names, in any case."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def find_copies(root: Path, files: list[Labelled], report: Report) -> None:
    """Report files of the same bytes under two labels, or in two splits."""
    for first, other in identical_files(root, files, report):
        report.add(TWO_LABELS if other.label != first.label else TWO_SPLITS, f"{first.name} = {other.name}")


def identical_files(root: Path, files: list[Labelled], report: Report) -> list[tuple[Labelled, Labelled]]:
    """Pairs of files of the same bytes that have two labels, or are in two splits.

    Files of one size alone are looked into: at first a piece of them, then all of those that agree in it.
    """
    alike = _apart([files], lambda file: str(file.size))
    count = sum(map(len, alike))
    if count > _COMPARED:
        report.add(
            NOTES, f"{count:,} files share their size with others: they were not compared, as so many take long."
        )
        return []
    for whole in (False, True):
        alike = _apart(alike, _digests(root, alike, whole).__getitem__)
    pairs = [(first, other) for first, *others in alike for other in others]
    return [(a, b) for a, b in pairs if (a.label, a.split) != (b.label, b.split)]


def _apart(groups: list[list[Labelled]], key: Callable[[Labelled], str]) -> list[list[Labelled]]:
    """Each group cut by a key; of those the ones that hold two labels or two splits."""
    cut: dict[tuple[int, str], list[Labelled]] = {}
    for number, group in enumerate(groups):
        for file in group:
            if file.size:
                cut.setdefault((number, key(file)), []).append(file)
    return [group for group in cut.values() if len({(file.split, file.label) for file in group}) > 1]


def _digests(root: Path, groups: list[list[Labelled]], whole: bool) -> dict[Labelled, str]:
    files = [file for group in groups for file in group]
    with ThreadPoolExecutor(16) as pool:  # hides the latency of a network
        found = pool.map(lambda file: _digest(root / file.name, file.size, whole), files)
        return dict(zip(files, found, strict=True))


def _digest(path: Path, size: int, whole: bool) -> str:
    if size > current_reading().max_bytes:
        return os.fspath(path)  # reading it will be refused
    try:
        with open(path, "rb", buffering=0) as file:
            if whole:
                return xxhash.xxh3_128_hexdigest(file.read())
            return os.pread(file.fileno(), _SAMPLE, max(size - _SAMPLE, 0) // 2).hex()
    except OSError:  # reading it for the conversion will tell
        return os.fspath(path)


def _splits(folder: Path, names: list[str], val_name: str | None) -> dict[str, str]:
    """The folders of the splits among these names; none where there is no training folder with one beside it."""
    of: dict[str, list[str]] = {split: [name for name in names if split_of(name) == split] for split in SPLIT_NAMES}
    if val_name is not None:
        others = [name for name in of["test"] if name != val_name]
        of = {"train": of["train"], "val": [val_name] if val_name in names else [], "test": others}
        of["train"] = [name for name in of["train"] if name != val_name]
    if not of["train"] or not (of["val"] or (of["test"] and val_name is None)):
        return {}
    for split, found in of.items():
        if len(found) > 1:
            remedy = "Choose one by --val-name." if split == "val" else "Rename or remove the others."
            listed = ", ".join(map(for_terminal, found))
            raise ValueError(f"{folder} must hold one folder for the split {split}, got {listed}. {remedy}")
    found = {split: some[0] for split, some in of.items() if some}
    return found if "val" in found else {"train": found["train"], "val": found["test"]}


def _note_splits(root: Path, folder: Path, splits: dict[str, str], names: list[str], report: Report) -> None:
    if any(split != name for split, name in splits.items()):
        listed = ", ".join(f"{split} is {below(folder / name, root)}" for split, name in splits.items())
        report.add(NOTES, f"The splits: {listed}.")
    report.add(OUTSIDE, *(below(folder / name, root) for name in names if name not in splits.values()))
    report.add(BESIDE, *(below(folder / name, root) for name in _images(folder)))


def _refuse_splits(folder: Path, names: list[str], report: Report) -> None:
    """Refuse class folders that can only be splits."""
    if len(names) == 1 and split_of(names[0]) == "train":
        raise ValueError(
            f"{folder} must hold train and one of {', '.join((*SPLIT_NAMES['val'], *SPLIT_NAMES['test']))}, got "
            f"{names[0]} alone. Name the other with --val-name, or convert {folder / names[0]} to hold out a part of "
            "it (--val-fraction)."
        )
    listed = ", ".join(map(for_terminal, names[:5])) + (", ..." if len(names) > 5 else "")
    if all(_LIKE_A_SPLIT.fullmatch(name.lower()) for name in names):
        raise ValueError(
            f"{folder} must hold one folder per class, or train and val, got {listed}, which look like splits. Call "
            "them train and val, or name the one for validation by --val-name."
        )
    if len(names) < 2:
        return
    shared = subfolders(folder / names[0], report, folder)
    for name in names[1:]:
        if len(shared) < 2:
            return  # so that the folders of most data sets are not listed twice
        others = set(subfolders(folder / name, report, folder))
        shared = [other for other in shared if other in others]
    if len(shared) > 1 and not any(_images(folder / name) for name in names):
        common = ", ".join(map(for_terminal, shared[:5])) + (", ..." if len(shared) > 5 else "")
        raise ValueError(
            f"{folder} must hold one folder per class, got {listed}, which look like splits, as all hold the folders "
            f"{common}. Call them train and val. If "
            "they are classes, move the images out of these folders, or list them for `vitcomposer convert list`."
        )


def _is_end(folder: Path, report: Report, root: Path) -> bool:
    """Whether the one folder that a folder holds is a class: no folders of images branch off in it or below."""
    while True:
        names = subfolders(folder, report, root)
        if len(names) != 1:
            return not names
        folder /= names[0]


def _images(folder: Path) -> list[str]:
    """Files directly in a folder that are images by their names."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if is_image(e.name) and not e.name.startswith(".") and e.is_file())
    except OSError:  # the walk reports it
        return []
