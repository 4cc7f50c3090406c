"""Reads image files that nobody has checked, in loader workers; the broken ones are named and left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vitcomposer.data.batch import Batch, Sample, batch_head
from vitcomposer.data.collate import EvalCollate
from vitcomposer.data.conversion.folders import read_file
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.jpeg.decode import Interpolation
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

    def describe(self, sample_id: int) -> str:
        """What a sample is called."""
        return f"{self.name}:{sample_id}" if self.paths is None else self.paths[sample_id]


class ImageFiles(Dataset[Sample]):
    """Files as samples: ``image``, ``label`` and ``sample_id``, the place in the list; ``image`` may be an error."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int] | None = None) -> None:
        self._paths, self._labels = paths, labels

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, at: int) -> Sample:
        try:
            image: Any = read_file(self._paths[at])
        except (OSError, ValueError) as error:
            image = error
        return {"image": image, "label": IGNORE_LABEL if self._labels is None else self._labels[at], "sample_id": at}


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
