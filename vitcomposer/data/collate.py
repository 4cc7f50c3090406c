"""Makes a batch of tensors of samples, in the loader worker: decode, crop, resize, and every random draw.

What was drawn for an image's colours and geometry is a short program (``data.augment.programs``), run here or on the
device. A sample's draws depend on (seed, epoch, sample_id, copy) alone and a batch's mixing on the same of its first
sample, so a run is the same with any number of workers and after a resume.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcomposer.data.augment.crop import decode_views
from vitcomposer.data.augment.mixing import draw_mixing
from vitcomposer.data.augment.policies import Policies, build_policies
from vitcomposer.data.augment.programs import FLIP, apply_program
from vitcomposer.data.batch import (
    ERASE_BOX,
    ERASE_SEED,
    MIX_BOX,
    MIX_LAM,
    OP_CODES,
    OP_VALUES,
    Batch,
    Sample,
    Source,
    _place,
    batch_head,
    batch_labels,
    check_labels,
)
from vitcomposer.data.batch_memory import by_value, empty_batch
from vitcomposer.data.boxes import Box, centre_box, random_erasing_box, random_resized_box, shape_with_shorter_side
from vitcomposer.data.jpeg.decode import Interpolation, decode_rgb, read_size, resize_into
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.mds.small_column import LOW_RESOLUTION_COLUMN
from vitcomposer.data.random import _MIXING, random_key, view_seed
from vitcomposer.schema import Augment, Mixing

_MAX_PIXELS = 1 << 26  # of an image after its resize in evaluation: a line of pixels would become gigabytes


class Views(Protocol):
    """Decides which view of a sample is made, where that is not (seed, epoch, sample_id, copy)."""

    def seed(self, sample: Sample) -> int:
        """Of the sample's view, see ``view_seed``."""
        ...

    def columns(self, samples: list[Sample], seeds: list[int], boxes: list[Box], flips: NDArray[np.bool_]) -> Batch:
        """What the batch gets beside its images, given how these were cut and whether they were flipped."""
        ...


class TrainCollate:
    """Training samples to ``image`` uint8 (B, 3, S, S), ``label``, ``sample_id`` and the draws for the device.

    ``image`` lies in channels-last memory. The batch holds ``op_codes`` and ``op_values`` with
    ``augment_on_device``, ``erase_box`` and ``erase_seed`` when ``augment.random_erasing`` is above 0, ``mix_lam`` and
    ``mix_box`` when one of the alphas of ``mixing`` is. Neighbours that are copies of one sample share its decode.

    Args:
        views: Whose views are made, and what it adds to the batch; ``seed`` then decides the mixing alone.
        source: Gives another sample, with its own label and draws, for one that cannot be decoded; None raises.

    Attributes:
        view: From the step of a batch to its image size and the factor on RandAugment's magnitude; None leaves them at
            ``image_size`` and 1. To be set before the loader starts its workers.
        augment_on_device: Whether programs are left to the device. To be set as ``view``.
        largest_small: Pixels of the largest views that are cut from ``image_small`` of the samples and not from
            ``image``; 0 cuts all from ``image``. To be set as ``view``.

    Raises:
        ConfigError: ``augment.rand_augment`` is no RandAugment string of timm.
        ValueError: On a call, a label outside the classes, an odd batch with mixing on, or, without ``source``, an
            image that cannot be decoded.
    """

    def __init__(
        self,
        augment: Augment,
        mixing: Mixing,
        *,
        image_size: int,
        num_classes: int,
        seed: int,
        augment_on_device: bool = False,
        views: Views | None = None,
        source: Source | None = None,
    ) -> None:
        self._augment = augment
        self._mixing = mixing
        self._mixes = mixing.mixup_alpha > 0 or mixing.cutmix_alpha > 0
        self.view: Callable[[int], tuple[int, float]] | None = None
        self.largest_small = 0
        self._made_for = (image_size, 1.0)  # of the batch before
        self._num_classes = num_classes
        self._seed = seed
        self.augment_on_device = augment_on_device
        self._views = views
        self._source = source
        self._policies = build_policies(augment, image_size)

    def warm_up(self) -> None:
        """Compile or load what the workers run on the pixels, before they are forked."""
        if not self.augment_on_device:
            self._policies.warm_up()

    def __call__(self, samples: list[Sample]) -> Batch:
        if self._mixes and len(samples) % 2:
            raise ValueError(
                f"global_train_batch_size must give every device an even batch when mixing is on, got {len(samples)} "
                "images. Mixup pairs images: use an even share per device, or set both alphas of mixing to 0."
            )
        image_size = self._look_up(samples)
        samples = self._with_column(samples)
        images = empty_batch(len(samples), image_size)  # uint8 (B, 3, S, S), channels last
        seeds: list[int] = []
        rngs: list[random.Random] = []
        boxes: list[Box] = []
        for first, end in list(_runs(samples)):
            drawn = self._decode_run(samples, first, end, images)
            seeds += drawn[0]
            rngs += drawn[1]
            boxes += drawn[2]
        check_labels(samples, self._num_classes, source=self._source)
        batch = {"image": images, **batch_labels(samples)}
        codes, values = draw_programs(self._policies, rngs)  # (B, L) each
        if self._views is not None:
            batch.update(self._views.columns(samples, seeds, boxes, codes[:, 0] == FLIP))
        if self.augment_on_device:
            batch[OP_CODES], batch[OP_VALUES] = codes, values
        else:
            run_programs(batch["image"], codes, values, self._policies.fill)
        if self._augment.random_erasing > 0:
            erased = [random_erasing_box(rng, image_size, self._augment.random_erasing) for rng in rngs]
            batch[ERASE_BOX] = torch.tensor(erased, dtype=torch.int32)  # (B, 4)
            batch[ERASE_SEED] = torch.tensor([rng.getrandbits(63) for rng in rngs])  # int64 (B,)
        if self._mixes:
            batch[MIX_LAM], batch[MIX_BOX] = self._draw_mixing(samples, image_size)  # (B,), (B, 4)
        return by_value(batch)

    def _look_up(self, samples: list[Sample]) -> int:
        """Image size of the batch, with the policies made for it."""
        if self.view is not None:
            step = samples[0]["step"]
            assert step == samples[-1]["step"], "the loader's batches are those of the data set"
            view = self.view(step)
            if view != self._made_for:
                self._made_for, self._policies = view, build_policies(self._augment, *view)
        return self._made_for[0]

    def _with_column(self, samples: list[Sample]) -> list[Sample]:
        """The samples, their ``image`` being what views of this batch's size are cut from."""
        if self._made_for[0] > self.largest_small:
            return list(samples)
        return [{**sample, "image": sample[LOW_RESOLUTION_COLUMN]} for sample in samples]

    def _view_seed(self, sample: Sample) -> int:
        if self._views is not None:
            return self._views.seed(sample)
        return view_seed(self._seed, sample["epoch"], sample["sample_id"], sample["copy"])

    def _decode_run(
        self, samples: list[Sample], first: int, end: int, images: Tensor
    ) -> tuple[list[int], list[random.Random], list[Box]]:
        """Seeds, generators and boxes of the copies of a sample, which another may take the place of."""
        while True:
            seeds = [self._view_seed(sample) for sample in samples[first:end]]
            rngs = [random.Random(seed) for seed in seeds]
            try:
                return seeds, rngs, self._decode(samples[first]["image"], rngs, images[first:end])
            except ValueError as error:
                samples[first:end] = self._with_column(replaced(self._source, samples[first:end], error))
            except Exception as error:
                raise unexpected(self._source, samples[first], error) from error

    def _decode(self, encoded: bytes | memoryview, rngs: Sequence[random.Random], outs: Tensor) -> list[Box]:
        """One random view of the image for each generator, and their boxes."""
        augment = self._augment
        height, width = read_size(encoded)
        boxes = [random_resized_box(rng, height, width, augment.crop_scale, augment.crop_ratio) for rng in rngs]
        decode_views(encoded, boxes, outs.unbind(), augment.interpolation, augment.decode_scale)
        return boxes

    def _draw_mixing(self, samples: list[Sample], image_size: int) -> tuple[Tensor, Tensor]:
        # RandomState, because numpy promises its stream for ever; that of Generator may change between versions.
        first = samples[0]
        key = random_key(self._seed, first["epoch"], first["sample_id"], first["copy"], _MIXING)
        rng = np.random.RandomState(key >> 32)
        mixing = self._mixing
        lam, boxes = draw_mixing(
            rng,
            len(samples),
            image_size,
            mixup_alpha=mixing.mixup_alpha,
            cutmix_alpha=mixing.cutmix_alpha,
            prob=mixing.prob,
            switch_prob=mixing.switch_prob,
            mode=mixing.mode,
        )
        return torch.from_numpy(lam), torch.from_numpy(boxes)


class EvalCollate:
    """Evaluation samples to ``image`` uint8 (B, 3, S, S) in channels-last memory, ``label`` and ``sample_id``.

    Equal to torchvision's Resize(int(image_size / crop_ratio)) and CenterCrop(image_size). CenterCrop never pads
    here: with a ratio of at most 1 both sides are at least ``image_size`` after the resize.

    Args:
        source: Is told of an image that cannot be decoded, which is black then and has IGNORE_LABEL; None raises.
    """

    def __init__(
        self,
        *,
        image_size: int,
        crop_ratio: float,
        interpolation: Interpolation,
        num_classes: int,
        source: Source | None = None,
    ) -> None:
        self._image_size = image_size
        self._shorter = int(image_size / crop_ratio)
        self._interpolation: Interpolation = interpolation
        self._num_classes = num_classes
        self._source = source

    def __call__(self, samples: list[Sample]) -> Batch:
        batch = batch_head(samples, self._image_size, self._num_classes, self._source)
        for i, sample in enumerate(samples):
            try:
                self._centre(sample["image"], batch["image"][i])
            except ValueError as error:
                if self._source is None:
                    raise unreadable(sample, error) from error
                self._source.skip(sample, error)
                batch["image"][i].zero_()
                batch["label"][i] = IGNORE_LABEL
            except Exception as error:
                raise unexpected(self._source, sample, error) from error
        return by_value(batch)

    def _centre(self, encoded: bytes | memoryview, out: Tensor) -> None:
        rows, columns = read_size(encoded)
        height, width = shape_with_shorter_side(rows, columns, self._shorter)
        if height * width > _MAX_PIXELS:
            raise ValueError(f"{columns} x {rows} pixels are too thin for a crop of {self._image_size}")
        pixels = decode_rgb(encoded)  # (rows, columns, 3)
        resized = torch.empty((height, width, 3), dtype=torch.uint8).permute(2, 0, 1)  # (3, height, width)
        resize_into(pixels, resized, self._interpolation)
        top, left, size, _ = centre_box(height, width, self._image_size)
        out.copy_(resized[:, top : top + size, left : left + size])


def draw_programs(policies: Policies, rngs: Sequence[random.Random]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A program from each generator, as codes and values (len(rngs), L)."""
    codes, values = zip(*(policies.draw(rng) for rng in rngs), strict=True)
    return np.stack(codes), np.stack(values)


def run_programs(images: Tensor, codes: NDArray[np.int8], values: NDArray[np.float32], fill: NDArray[np.uint8]) -> None:
    """Run each image's program on it, in place; ``images`` is uint8 (B, 3, S, S) over channels-last memory."""
    pixels = images.permute(0, 2, 3, 1).numpy()  # (B, S, S, 3), a view
    for image, image_codes, image_values in zip(pixels, codes, values, strict=True):
        apply_program(image, image_codes, image_values, fill)


def replaced(source: Source | None, samples: list[Sample], error: ValueError) -> list[Sample]:
    """What stands in for views of a sample that cannot be decoded.

    Raises:
        ValueError: Without a source nothing does.
    """
    if source is None:
        raise unreadable(samples[0], error) from error
    return source.replace(samples, error)


def unreadable(sample: Sample, error: ValueError) -> ValueError:
    """The error that says which sample a decoder's error is about."""
    return ValueError(
        f"sample_id {sample['sample_id']}: the image ({len(sample['image'])} bytes) cannot be read: {error}. "
        "Write the data set again without it or with a sound copy."
    )


def unexpected(source: Source | None, sample: Sample, error: Exception) -> RuntimeError:
    """The error that says at which sample something happened that no image should cause."""
    size = len(sample["image"])
    return RuntimeError(f"{_place(source, sample)}, of {size:,} bytes: {type(error).__name__}: {error}")


def _runs(samples: list[Sample]) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of neighbours that are copies of one sample."""
    first = 0
    for i in range(1, len(samples) + 1):
        if i == len(samples) or samples[i]["sample_id"] != samples[first]["sample_id"]:
            yield first, i
            first = i
