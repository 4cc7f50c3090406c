"""Samples of the reader to a batch of tensors, in the loader worker: decode, crop, resize, flip, and every draw.

A sample's draws depend on (seed, epoch, sample_id, copy) alone and a batch's mixing on the same of its first sample,
so a run is the same with any number of workers and after a resume.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitcomposer.data.augment import ERASE_BOX, ERASE_SEED
from vitcomposer.data.crops import (
    NO_BOX,
    centre_box,
    random_erasing_box,
    random_resized_box,
    shape_with_shorter_side,
)
from vitcomposer.data.jpeg import Interpolation, decode_crop_into, decode_rgb, read_size, resize_into
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.mixing import MIX_BOX, MIX_LAM, Batch, draw_mixing
from vitcomposer.data.policies import build_policies, global_generators_restored
from vitcomposer.schema import Augment, Mixing

_MASK64 = (1 << 64) - 1
_SAMPLE, _MIXING = 0, 1  # separate streams: the first sample of a batch must not share its numbers with the mixing


class TrainCollate:
    """Training samples to ``image`` uint8 (B, 3, S, S), ``label``, ``sample_id`` and the draws for the device.

    ``image`` lies in channels-last memory. The batch holds ``erase_box`` and ``erase_seed`` when
    ``augment.random_erasing`` is above 0, ``mix_lam`` and ``mix_box`` when one of the alphas of ``mixing`` is.

    Raises:
        ConfigError: ``augment.rand_augment`` is no RandAugment string of timm.
        ValueError: On a call, a label outside the classes, a damaged image, or an odd batch with mixing on.
    """

    def __init__(self, augment: Augment, mixing: Mixing, *, image_size: int, num_classes: int, seed: int) -> None:
        self._augment = augment
        self._mixing = mixing
        self._mixes = mixing.mixup_alpha > 0 or mixing.cutmix_alpha > 0
        self._image_size = image_size
        self._num_classes = num_classes
        self._seed = seed
        self._policies = build_policies(augment, image_size)

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        if self._mixes and len(samples) % 2:
            raise ValueError(
                f"global_train_batch_size must give every device an even batch when mixing is on, got {len(samples)} "
                "images. Mixup pairs images: use an even share per device, or set both alphas of mixing to 0."
            )
        batch = _head(samples, self._image_size, self._num_classes)
        boxes, seeds = [NO_BOX] * len(samples), [0] * len(samples)
        with global_generators_restored():
            for i, sample in enumerate(samples):
                rng = random.Random(self._key(sample, _SAMPLE))
                with _naming(sample):
                    self._view(sample["image"], rng, batch["image"][i])
                if self._augment.random_erasing > 0:
                    boxes[i] = random_erasing_box(rng, self._image_size, self._augment.random_erasing)
                    seeds[i] = rng.getrandbits(63)
        if self._augment.random_erasing > 0:
            batch[ERASE_BOX] = torch.tensor(boxes, dtype=torch.int32)
            batch[ERASE_SEED] = torch.tensor(seeds)
        if self._mixes:
            batch[MIX_LAM], batch[MIX_BOX] = self._draw_mixing(samples)
        return batch

    def _view(self, encoded: bytes, rng: random.Random, out: Tensor) -> None:
        """One random view of the image into ``out``, uint8 (3, S, S) over channels-last memory."""
        augment = self._augment
        box = random_resized_box(rng, *read_size(encoded), augment.crop_scale, augment.crop_ratio)
        decode_crop_into(encoded, box, out, augment.interpolation)
        pixels = out.permute(1, 2, 0)  # (S, S, 3)
        if rng.random() < augment.flip_prob:
            pixels.copy_(pixels.flip(1))
        if self._policies:
            image = Image.fromarray(pixels.numpy())
            for policy in self._policies:
                image = policy(image, rng)
            np.copyto(pixels.numpy(), np.asarray(image))

    def _draw_mixing(self, samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        # RandomState, because numpy promises its stream for ever; that of Generator may change between versions.
        rng = np.random.RandomState(self._key(samples[0], _MIXING) >> 32)
        mixing = self._mixing
        lam, boxes = draw_mixing(
            rng,
            len(samples),
            self._image_size,
            mixup_alpha=mixing.mixup_alpha,
            cutmix_alpha=mixing.cutmix_alpha,
            prob=mixing.prob,
            switch_prob=mixing.switch_prob,
            mode=mixing.mode,
        )
        return torch.from_numpy(lam), torch.from_numpy(boxes)

    def _key(self, sample: dict[str, Any], stream: int) -> int:
        return random_key(self._seed, sample["epoch"], sample["sample_id"], sample["copy"], stream)


class EvalCollate:
    """Evaluation samples to ``image`` uint8 (B, 3, S, S) in channels-last memory, ``label`` and ``sample_id``.

    Equal to torchvision's Resize(int(image_size / crop_ratio)) and CenterCrop(image_size). CenterCrop never pads
    here: with a ratio of at most 1 both sides are at least ``image_size`` after the resize.
    """

    def __init__(self, *, image_size: int, crop_ratio: float, interpolation: Interpolation, num_classes: int) -> None:
        self._image_size = image_size
        self._shorter = int(image_size / crop_ratio)
        self._interpolation: Interpolation = interpolation
        self._num_classes = num_classes

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        batch = _head(samples, self._image_size, self._num_classes, ignored=IGNORE_LABEL)
        for i, sample in enumerate(samples):
            with _naming(sample):
                self._centre(sample["image"], batch["image"][i])
        return batch

    def _centre(self, encoded: bytes, out: Tensor) -> None:
        pixels = decode_rgb(encoded)
        height, width = shape_with_shorter_side(pixels.shape[0], pixels.shape[1], self._shorter)
        resized = torch.empty((height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
        resize_into(pixels, resized, self._interpolation)
        top, left, size, _ = centre_box(height, width, self._image_size)
        out.copy_(resized[:, top : top + size, left : left + size])


def random_key(*parts: int) -> int:
    """One 64-bit seed out of several integers: splitmix64 folded over them, so that their order matters."""
    state = 0
    for part in parts:
        state = ((state ^ int(part)) + 0x9E3779B97F4A7C15) & _MASK64  # int(): numpy's overflow
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def _head(samples: list[dict[str, Any]], image_size: int, num_classes: int, ignored: int | None = None) -> Batch:
    """The batch with its labels checked and its images still to be filled."""
    for sample in samples:
        label = sample["label"]
        if not 0 <= label < num_classes and label != ignored:
            raise ValueError(
                f"sample_id {sample['sample_id']}: the label must be in [0, {num_classes}) for model.num_classes="
                f"{num_classes}, got {label}. Set model.num_classes to the number of classes in the data set."
            )
    return {
        "image": torch.empty((len(samples), image_size, image_size, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
        "label": torch.tensor([int(sample["label"]) for sample in samples]),
        "sample_id": torch.tensor([int(sample["sample_id"]) for sample in samples]),
    }


@contextmanager
def _naming(sample: dict[str, Any]) -> Iterator[None]:
    """Say which sample a decoder's error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"sample_id {sample['sample_id']}: the image ({len(sample['image'])} bytes) cannot be read: {error}. "
            "Write the data set again without it or with a sound copy."
        ) from error
