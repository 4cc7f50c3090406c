"""Opens labelled data sets to measure a model on, MDS or one folder per class, and matches their classes to its own."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vitcomposer.data.conversion.folder_splits import Labelled, class_folder, find_copies, find_layout
from vitcomposer.data.conversion.folders import NOTES, Report, scan_classes, subfolders
from vitcomposer.data.files import ImageFiles, ImageSet
from vitcomposer.data.jpeg import current_reading
from vitcomposer.data.loader import open_dataset
from vitcomposer.data.mds.shards import CLASS_NAMES, INDEX, read_class_names
from vitcomposer.data.mds.stream import ImageStream
from vitcomposer.errors import ShardError, did_you_mean
from vitcomposer.schema import Data

REAL_IMAGES = 50_000  # of ImageNet's validation split
_REAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.")
_WORDNET = re.compile(r"n\d{8}")


def open_labelled_images(path: str, *, split: str, batch_size: int, cache: str | None = None) -> ImageSet:
    """Open an MDS data set or a folder with one folder per class; each has the split below it or is the split.

    Args:
        path: Folder, or the location of an MDS data set on an object store.
        batch_size: Of the loader.
        cache: Folder for the shards of an object store.

    Raises:
        ValueError: Nothing of the kind is there; ConfigError and ShardError for an MDS data set that cannot be read.
    """
    if "://" in path:
        if cache is None:
            raise ValueError(f"--cache must name a folder for the shards of {path}. Add --cache /fast/disk/FOLDER")
        local = os.path.join(cache, re.sub(r"\W+", "_", path))
        return _open_mds(path, Data(remote=path, local=local, val_split=split), batch_size)
    root = Path(path)
    if not root.is_dir():
        raise ValueError(
            f"--data must be a folder or a location such as s3://bucket/folder. There is no folder {path}."
        )
    if (root / split / INDEX).is_file():
        return _open_mds(path, Data(local=path, val_split=split), batch_size)
    if (root / INDEX).is_file():
        return open_split(path, batch_size)
    splits = sorted(index.parent.name for index in root.glob(f"*/{INDEX}"))
    if splits:
        raise ValueError(f"{path} must hold the split {split!r}, it holds {', '.join(splits)}. Choose one by --split.")
    return _open_folder(path, root, split)


def open_split(folder: str, batch_size: int) -> ImageSet:
    """Open the MDS split whose index is in ``folder``; errors as :func:`open_labelled_images`."""
    whole = Path(folder).resolve()
    return _open_mds(folder, Data(local=str(whole.parent), val_split=whole.name), batch_size)


def _open_mds(name: str, data: Data, batch_size: int) -> ImageSet:
    data = replace(data, max_pixels=current_reading().max_pixels)
    assert data.local is not None
    try:
        images = open_dataset(data, "val", num_classes=0, batch_size=batch_size, seed=0)
    except ShardError as error:
        raise ValueError(str(error)) from error
    assert isinstance(images, ImageStream)
    names = read_class_names(Path(data.local, data.val_split, CLASS_NAMES))
    return ImageSet(name, images, images.num_samples, names)


def _open_folder(name: str, root: Path, split: str) -> ImageSet:
    report = Report()
    folder = root / split
    if not folder.is_dir() and not subfolders(root, report, root):
        folder = root
    elif not folder.is_dir():
        layout = find_layout(root, report)
        if layout.splits and split not in layout.splits:
            found = ", ".join(str(folder.name) for folder in layout.splits.values())
            raise ValueError(f"{name} must hold the split {split!r}, it holds {found}. Choose one by --split.")
        folder = layout.splits.get(split, layout.classes)
    classes = scan_classes(root, class_folder(folder, report, root), report)
    report.check(folder)
    report.add(NOTES, *(f"The class {name} has no image." for name, files in classes.items() if not files))
    files = [(file, label) for label, found in enumerate(classes.values()) for file in found]
    if not files:
        raise ValueError(
            f"{folder} must be an MDS data set ({INDEX}) or hold one folder of images per class; it holds neither. "
            "For images without labels use `vitcomposer predict`."
        )
    find_copies(root, [Labelled(split, label, file.name, file.size) for file, label in files], report)
    paths = [os.path.join(root, file.name) for file, _ in files]
    samples = ImageFiles(paths, [label for _, label in files])
    return ImageSet(name, samples, len(paths), list(classes), paths, report.lines(errors=False))


def model_classes(
    names: Sequence[str] | None, model_names: Sequence[str] | None, *, num_classes: int, where: str
) -> list[int] | None:
    """The output of the model that each label of a data set stands for; None where labels are the outputs.

    Classes are matched by name. Folders called 0 to ``num_classes - 1``, as ImageNet-V2 has them, are numbers of
    outputs unless the model has a class of such a name. A model without names takes the order of a data set that has as
    many classes.

    Raises:
        ValueError: A class that the model does not have, or a number of classes that does not tell which they are.
    """
    if names is None:
        return None
    if model_names is not None:
        index = {name: output for output, name in enumerate(model_names)}
        if all(name in index for name in names):
            return [index[name] for name in names]
    if all(name.isdecimal() and int(name) < num_classes for name in names):
        return [int(name) for name in names]
    if model_names is None:
        if len(names) == num_classes:
            return list(range(num_classes))
        raise ValueError(
            f"{where} must have the {num_classes} classes of the model, it has {len(names)}, and the model has no "
            f"names to tell which they are. Put a {CLASS_NAMES}, a list of names, into the folder of the run."
        )
    unknown = [name for name in names if name not in set(model_names)]
    hint = did_you_mean(unknown[0], model_names) or f" Its classes start with {', '.join(model_names[:3])}."
    raise ValueError(
        f"{where} must have classes of the model, got {', '.join(unknown[:5])}"
        f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}, which it does not know.{hint}"
    )


def read_real_labels(file: str | Path, model_names: Sequence[str] | None) -> list[list[int]]:
    """ImageNet-ReaL (arXiv:2006.07159): for each validation image the outputs that are right, possibly none.

    Its numbers are those of the classes sorted by WordNet id, which is also the order of a model without names.

    Raises:
        ValueError: Not the file, or a model whose classes are not ImageNet's.
    """
    try:
        labels = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--real {file} cannot be read: {error}. Give the file real.json of ImageNet-ReaL.") from error
    fits = isinstance(labels, list) and len(labels) == REAL_IMAGES
    if not fits or not all(isinstance(some, list) and all(isinstance(n, int) for n in some) for some in labels):
        raise ValueError(f"--real {file} must be a list of {REAL_IMAGES:,} lists of class numbers. It is another file.")
    largest = max((number for some in labels for number in some), default=0)
    if model_names is None:
        return labels
    if largest >= len(model_names) or not all(_WORDNET.fullmatch(name) for name in model_names):
        raise ValueError(
            f"--real needs a model whose {largest + 1:,} classes are named by WordNet ids such as n01440764, as the "
            f"folders of ImageNet are, got {len(model_names):,} classes such as {model_names[0]}. Leave --real out."
        )
    output = {name: at for at, name in enumerate(model_names)}
    order = [output[name] for name in sorted(model_names)]
    return [[order[number] for number in some] for some in labels]


def real_of_files(paths: Sequence[str], labels: Sequence[list[int]]) -> list[list[int]] | None:
    """The right outputs for each file, by the number in its name; None where no file is an ImageNet validation image.

    Raises:
        ValueError: Some files have such a name and some do not.
    """
    found = [_REAL_NAME.match(os.path.basename(path)) for path in paths]
    if not any(found):
        return None
    numbers = [int(match[1]) if match else 0 for match in found]
    for path, number in zip(paths, numbers, strict=True):
        if not 1 <= number <= len(labels):
            raise ValueError(f"--real knows ILSVRC2012_val_00000001 to ILSVRC2012_val_{len(labels):08}, got {path}.")
    return [labels[number - 1] for number in numbers]
