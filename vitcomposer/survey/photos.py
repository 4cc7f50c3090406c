"""Reads the headers of a sample of images, and small thumbnails of them, and counts what is odd."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitcomposer.data.conversion.folders import read_file
from vitcomposer.data.conversion.sources import FolderSource, Item, ListSource, UnlabelledSource, hash_order
from vitcomposer.data.jpeg.pixels import eight_bits, is_deep, open_image
from vitcomposer.data.jpeg.upright import exif_orientation, turned, turned_size

LOOKED_AT = 2_000  # images
THUMBNAIL = 32  # pixels of a side
DECODED = 2_000_000_000  # pixels in all of the images that thumbnails are made of
_READERS = 4  # threads: Pillow decodes without holding Python's lock


@dataclass(frozen=True)
class Look:
    """What one image is; ``fault`` says why it cannot be read."""

    width: int = 0  # pixels, when it is upright
    height: int = 0
    turned: bool = False  # by EXIF
    odd: str | None = None  # CMYK, 16 bits, transparency
    thumbnail: NDArray[np.uint8] | None = None  # grey, (THUMBNAIL, THUMBNAIL)
    fault: str | None = None


@dataclass(frozen=True)
class Photo:
    """An image of a split with its class, and what a look at it told."""

    split: str
    item: Item
    look: Look


@dataclass(frozen=True)
class Survey:
    """What a folder holds. Counts of images are of all of them; what is odd is counted in the sample ``photos``."""

    name: str
    class_names: list[str]
    counts: dict[str, Counter[int]]  # of each split: images of each label
    photos: list[Photo]
    odd: Counter[str] = field(default_factory=Counter)
    turned: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """Of all splits."""
        return sum(counts.total() for counts in self.counts.values())

    @property
    def training_images(self) -> int:
        """Of the split train."""
        return self.counts["train"].total()

    @property
    def of_a_class(self) -> list[int]:
        """Images of each class over all splits, the fewest first."""
        return sorted(sum(self.counts.values(), Counter[int]()).values())

    @property
    def imbalance(self) -> float:
        """Training images of the largest class over those of the smallest."""
        return max(self.counts["train"].values()) / min(self.counts["train"].values())

    @property
    def size(self) -> tuple[int, int]:
        """Median width and height in pixels of the images that can be read."""
        good = [(photo.look.width, photo.look.height) for photo in self.photos if photo.look.fault is None]
        return int(np.median([width for width, _ in good])), int(np.median([height for _, height in good]))

    @property
    def broken(self) -> list[Photo]:
        """The images that cannot be read."""
        return [photo for photo in self.photos if photo.look.fault is not None]

    @property
    def broken_share(self) -> float:
        """The largest share of a split's images that cannot be read, as far as the sample tells."""
        seen = Counter(photo.split for photo in self.photos)
        broken = Counter(photo.split for photo in self.broken)
        return max(broken[split] / count for split, count in seen.items())


def survey(
    source: FolderSource | ListSource | UnlabelledSource,
    name: str,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Look at no more than ``LOOKED_AT`` images of a source, which seed and names choose.

    Args:
        on_progress: Called with images looked at and to be looked at.

    Raises:
        ValueError: None of them can be read.
    """
    every = [(split, item) for split, items in source.splits.items() for item in items]
    if len(every) > LOOKED_AT:
        every = sorted(every, key=lambda entry: hash_order(seed, f"new/{entry[1].name}"))[:LOOKED_AT]
    photos = []
    for (split, item), look in zip(every, _look_at_all(source.root, [item for _, item in every]), strict=True):
        photos.append(Photo(split, item, look))
        if on_progress:
            on_progress(len(photos), len(every))
    if all(photo.look.fault for photo in photos):
        first = photos[0]
        raise ValueError(f"{name} must hold images that can be read, none can: {first.item.name} ({first.look.fault}).")
    counts = {split: Counter(item.label for item in items) for split, items in source.splits.items()}
    odd = Counter(photo.look.odd for photo in photos if photo.look.odd)
    turned = sum(photo.look.turned for photo in photos)
    return Survey(name, source.class_names, counts, photos, odd, turned, tuple(source.warnings))


def _look_at_all(root: Path, items: list[Item]) -> Iterable[Look]:
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda item: look_at(root / item.name, decode=DECODED // len(items)), items)


def look_at(path: Path, *, decode: int) -> Look:
    """The header of an image, and a thumbnail of it where it has at most ``decode`` pixels."""
    try:
        with open_image(read_file(path)) as image, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF blocks and palettes
            width, height = image.size
            orientation = exif_orientation(image)
            height, width = turned_size(height, width, orientation)
            odd = _odd(image)
            small = turned(_thumbnail(image), orientation) if width * height <= decode else None
            return Look(width, height, orientation != 1, odd, small)
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Exception as error:  # decoders raise almost anything on damaged input
        return Look(fault=str(error) or type(error).__name__)


def _odd(image: Image.Image) -> str | None:
    """What of an image is not kept when it becomes RGB, in words."""
    if is_deep(image):
        return f"{image.format} of 16 bits"
    if image.mode == "CMYK":
        return "CMYK"
    return "with transparency" if "A" in image.mode or "transparency" in image.info else None


def _thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """Grey, (THUMBNAIL, THUMBNAIL); a JPEG is decoded at the coarsest scale that is still larger."""
    if not is_deep(image):
        image.draft("L", (2 * THUMBNAIL, 2 * THUMBNAIL))
    grey = eight_bits(image).convert("L")
    return np.asarray(grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, reducing_gap=2.0))
