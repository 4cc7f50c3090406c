"""Finds images that are the same, or nearly the same, in two classes or in two splits.

Files are identical where all their bytes are. Two images are nearly the same where their grey thumbnails (32 x 32
pixels, each less its mean, over its standard deviation) have a correlation of ``ALIKE`` or more, and their proportions
differ by a tenth at most. An image whose thumbnail varies by less than ``FLAT`` levels is taken to be like no other.
"""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from io import StringIO
from typing import NamedTuple

import numpy as np

from vitcomposer.data.conversion.folder_splits import Labelled, identical_files
from vitcomposer.data.conversion.sources import FolderSource, Item, ListSource
from vitcomposer.survey.photos import Photo, Survey

ALIKE = 0.95
FLAT = 4.0  # of 255 levels, the standard deviation
_PROPORTION = 1.1
_ROWS = 512  # compared with all others at once
_COLUMNS = ("what", "file", "split", "class", "other_file", "other_split", "other_class")


class Pair(NamedTuple):
    """Two images of one content; ``what`` says how alike they are."""

    what: str
    first: Labelled
    other: Labelled

    @property
    def across(self) -> str:
        """What the two lie in that they should share: classes before splits."""
        return "different classes" if self.first.label != self.other.label else "different splits"


def find_pairs(source: FolderSource | ListSource, found: Survey) -> list[Pair]:
    """Identical files among all images, and nearly identical ones among those that were looked at."""
    files = [_labelled(split, item) for split, items in source.splits.items() for item in items]
    identical = identical_files(source.root, files, source.report)
    known = {frozenset((first.name, other.name)) for first, other in identical}
    near = (pair for pair in _near(found.photos) if frozenset((pair[0].name, pair[1].name)) not in known)
    return [Pair("identical files", *pair) for pair in identical] + [
        Pair("nearly identical images", *pair) for pair in near
    ]


def counted(pairs: list[Pair]) -> Counter[tuple[str, str]]:
    """The number of pairs by ``what`` and ``across``."""
    return Counter((pair.what, pair.across) for pair in pairs)


def to_csv(pairs: list[Pair], class_names: list[str]) -> str:
    """A table with a row for each pair."""
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(_COLUMNS)
    for pair in pairs:
        sides = ((file.name, file.split, class_names[file.label]) for file in (pair.first, pair.other))
        rows.writerow([pair.what, *(value for side in sides for value in side)])
    return text.getvalue()


def _labelled(split: str, item: Item) -> Labelled:
    return Labelled(split, item.label, item.name, item.size)


def _near(photos: Sequence[Photo]) -> Iterator[tuple[Labelled, Labelled]]:
    """Pairs of the photographs in two classes or splits whose thumbnails agree."""
    seen = [(photo, photo.look.thumbnail) for photo in photos if photo.look.thumbnail is not None]
    seen = [(photo, thumbnail.ravel()) for photo, thumbnail in seen if thumbnail.std() >= FLAT]
    if not seen:
        return
    photos, thumbnails = zip(*seen, strict=True)
    pixels = np.stack(thumbnails).astype(np.float32)  # (N, 1024)
    pixels -= pixels.mean(1, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    shapes = np.array([photo.look.width / photo.look.height for photo in photos])
    group = np.array([2 * photo.item.label + (photo.split == "train") for photo in photos])
    for top in range(0, len(photos), _ROWS):
        rows = slice(top, top + _ROWS)
        alike = pixels[rows] @ pixels.T >= ALIKE  # (rows, N)
        alike &= group[rows, None] != group
        alike &= np.abs(np.log(shapes[rows, None] / shapes)) <= np.log(_PROPORTION)
        for row, column in np.argwhere(alike):
            if top + row < column:
                first, other = photos[top + row], photos[column]
                yield _labelled(first.split, first.item), _labelled(other.split, other.item)
