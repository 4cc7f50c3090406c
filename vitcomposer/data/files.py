"""Reads image files that nobody has checked, in loader workers; the broken ones are named and left out.

Whether files are turned by their EXIF orientation is said here; stored samples say it themselves (``jpeg.upright``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vitcomposer.data.batch import Batch, Sample, batch_head
from vitcomposer.data.collate import EvalCollate
from vitcomposer.data.conversion.folders import read_file
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.jpeg.decode import Interpolation
from vitcomposer.data.jpeg.pixels import open_image
from vitcomposer.data.jpeg.raw import raw_of
from vitcomposer.data.jpeg.upright import exif_orientation, turned, with_mark, without_mark
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.mds.shared_memory import ignore_interrupt
from vitcomposer.data.mds.worker_room import check_worker_room

_ANY_LABEL = 1 << 62


@dataclass(frozen=True)
class ImageSet:
    """A data set to be looked at once, in order: files or an MDS split.

    Attributes:
        name: As the user gave it.
        samples: ImageFiles or an ImageStream that does not shuffle.
        class_names: In label order, where it has them.
        paths: Of the files by sample_id; None for MDS, which keeps no names.
        warnings: What was left out of a folder, a line each.
    """

    name: str
    samples: Dataset[Sample]
    num_samples: int
    class_names: Sequence[str] | None = None
    paths: Sequence[str] | None = None
    warnings: Sequence[str] = ()

    def lying(self, upright: bool) -> "ImageSet":
        """The same images, where they are files turned upright by EXIF or read as they are stored."""
        if not isinstance(self.samples, ImageFiles):
            return self
        return replace(self, samples=self.samples.lying(upright))

    def describe(self, sample_id: int) -> str:
        """What a sample is called."""
        return f"{self.name}:{sample_id}" if self.paths is None else self.paths[sample_id]


class ImageFiles(Dataset[Sample]):
    """Files as samples: ``image``, ``label`` and ``sample_id``, the place in the list; ``image`` may be an error.

    Args:
        upright: Turn them by their EXIF orientation; False reads them as they are stored.
    """

    def __init__(self, paths: Sequence[str], labels: Sequence[int] | None = None, *, upright: bool = True) -> None:
        self._paths, self.labels, self._upright = paths, labels, upright

    def lying(self, upright: bool) -> "ImageFiles":
        """The same files, turned upright or not."""
        return ImageFiles(self._paths, self.labels, upright=upright)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, at: int) -> Sample:
        try:
            image: Any = without_mark(read_file(self._paths[at]))
            image = _upright(image) if self._upright else image
        except (OSError, ValueError) as error:
            image = error
        return {"image": image, "label": IGNORE_LABEL if self.labels is None else self.labels[at], "sample_id": at}


def _upright(encoded: bytes) -> bytes:
    """A file as decoders turn it: with a mark, or its turned pixels; as it is where it lies right or is no image."""
    try:
        with open_image(encoded) as image:
            orientation = exif_orientation(image)
    except ValueError:  # decoders say why
        return encoded
    if orientation == 1:
        return encoded
    if encoded[:2] == b"\xff\xd8":
        return with_mark(encoded, orientation)
    return raw_of(turned(jpeg.decode_rgb(encoded), orientation))


class TolerantCollate(EvalCollate):
    """An EvalCollate that goes on after images that cannot be read.

    They are black, and ``broken`` in the batch has the row of each and the reason.
    """

    def __call__(self, samples: list[Sample]) -> Batch:
        batch = batch_head(samples, self._image_size, self._num_classes)
        broken: list[tuple[int, str]] = []
        for row, sample in enumerate(samples):
            try:
                self._check(sample["image"])
                self._centre(sample["image"], batch["image"][row])
            except MemoryError:
                raise  # the machine's fault, not the image's
            except Exception as error:  # whatever it is, it ends no answers to other images
                batch["image"][row].zero_()
                broken.append((row, _reason(error)))
        return {**batch, "broken": broken}

    def _check(self, encoded: bytes | memoryview | OSError | ValueError) -> None:
        if isinstance(encoded, OSError | ValueError):
            raise encoded
        if not len(encoded):
            raise ValueError("the file is empty")


def _reason(error: Exception) -> str:
    if isinstance(error, ValueError | OSError):
        return getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {error}"


def crop_loader(
    samples: Dataset[Sample],
    *,
    image_size: int,
    crop_ratio: float,
    interpolation: Interpolation,
    batch_size: int,
    workers: int,
) -> DataLoader[Any]:
    """Centre crops of all samples in their order, batched as by EvalCollate, with ``broken`` as TolerantCollate has it.

    Labels are those of the data set, unchecked.
    """
    check_worker_room("--workers", workers, batch_bytes=batch_size * 3 * image_size**2)
    jpeg.warm_up()  # compiled kernels come from their cache on disk: the workers get them with the fork
    collate = TolerantCollate(
        image_size=image_size, crop_ratio=crop_ratio, interpolation=interpolation, num_classes=_ANY_LABEL
    )
    return DataLoader(
        samples,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_interrupt,
        timeout=600 if workers else 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # an iterator draws a seed, which must not come from the caller's generator
    )
