"""Makes multi-crop (SwAV, arXiv:2006.09882): several views of different sizes from one decode."""

import random
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vitcomposer.data.augment.crop import decode_views
from vitcomposer.data.augment.policies import ColorDistortion, Policies
from vitcomposer.data.augment.programs_torch import apply_programs
from vitcomposer.data.augment.transforms import Normalize
from vitcomposer.data.batch import CROPS, OP_CODES, OP_VALUES, Batch, Sample, Source, batch_labels
from vitcomposer.data.batch_memory import by_value, empty_batch
from vitcomposer.data.boxes import Box, random_resized_box
from vitcomposer.data.collate import draw_programs, replaced, run_programs, unexpected
from vitcomposer.data.jpeg.decode import Interpolation, read_size
from vitcomposer.data.random import random_key
from vitcomposer.errors import require

_RATIO = (3 / 4, 4 / 3)  # RandomResizedCrop's, which none of the papers changes
_NO_FILL = np.zeros(3, np.uint8)  # colour distortion uncovers nothing


class MultiCrop:
    """Samples to ``crops``, uint8 (count * B, 3, size, size) for each group of crops, ``sample_id`` and ``label``.

    Crop ``c`` of image ``i`` is row ``c * B + i`` of its group, so that one crop of the whole batch is a slice and all
    crops of one size go through a network at once. ``num_crops``, ``size_crops`` and ``crop_scales`` are VISSL's: one
    entry per group, groups in the order given. With ``augment_on_device`` the batch holds ``op_codes`` and
    ``op_values``, one array per group, for :class:`MultiCropTransform`; otherwise they have been applied.

    Args:
        num_crops: Crops of each group, such as (2, 4).
        size_crops: Their side in pixels, such as (160, 96).
        crop_scales: Range of a crop's share of the image's area, such as ((0.08, 1.0), (0.05, 0.14)).
        distortions: Colour, blur and solarize of each group's crops; None for none.
        source: Gives another sample for one that cannot be decoded; None raises.

    Raises:
        ConfigError: Groups that do not fit each other.
        ValueError: On a call without ``source``, an image that cannot be decoded, with its sample_id.
    """

    def __init__(  # noqa: PLR0913 (all are named at the call)
        self,
        *,
        num_crops: Sequence[int],
        size_crops: Sequence[int],
        crop_scales: Sequence[tuple[float, float]],
        seed: int,
        distortions: Sequence[ColorDistortion | None] | None = None,
        flip_prob: float = 0.5,
        interpolation: Interpolation = "bilinear",
        augment_on_device: bool = False,
        source: Source | None = None,
    ) -> None:
        groups = len(num_crops)
        distortions = [None] * groups if distortions is None else distortions
        for name, given in (("size_crops", size_crops), ("crop_scales", crop_scales), ("distortions", distortions)):
            rule = f"as long as num_crops, {groups}"
            require(len(given) == groups, name, rule, len(given), "Give one entry for each group of crops.")
        require(groups > 0 and min(num_crops) > 0, "num_crops", "one or more crops a group", num_crops, "Use [2, 4].")
        require(min(size_crops) > 0, "size_crops", "numbers of pixels", size_crops, "Use [160, 96].")
        fits = all(0 < low <= high <= 1 for low, high in crop_scales)
        require(fits, "crop_scales", "pairs with 0 < low <= high <= 1", crop_scales, "Use [[0.08, 1], [0.05, 0.14]].")
        self._num_crops, self._size_crops, self._crop_scales = num_crops, size_crops, crop_scales
        self._policies = [Policies(flip_prob, [d] if d else [], _NO_FILL) for d in distortions]
        self._seed = seed
        self._interpolation: Interpolation = interpolation
        self._augment_on_device = augment_on_device
        self._source = source

    def warm_up(self) -> None:
        """Compile or load what the workers run on the pixels, before they are forked."""
        for policies in () if self._augment_on_device else self._policies:
            policies.warm_up()

    def __call__(self, samples: list[Sample]) -> Batch:
        samples = list(samples)
        count = len(samples)
        groups = list(zip(self._num_crops, self._size_crops, strict=True))
        crops = [empty_batch(crops * count, size) for crops, size in groups]  # (count * B, 3, size, size) of each group
        rngs = [self._decode(samples, i, [group[i::count] for group in crops]) for i in range(count)]
        # Codes and values of each group, (count * B, L): a generator draws for all crops of its image, in turn.
        drawn = [draw_programs(p, rngs * n) for p, n in zip(self._policies, self._num_crops, strict=True)]
        batch: Batch = {CROPS: crops, **batch_labels(samples)}
        if self._augment_on_device:
            batch[OP_CODES], batch[OP_VALUES] = ([arrays[k] for arrays in drawn] for k in (0, 1))
        else:
            for images, (codes, values) in zip(crops, drawn, strict=True):
                run_programs(images, codes, values, _NO_FILL)
        return by_value(batch)

    def _decode(self, samples: list[Sample], at: int, outs: list[Tensor]) -> random.Random:
        """Crops of a sample, which another may take the place of; the generator of its colours."""
        while True:
            sample = samples[at]
            rng = random.Random(random_key(self._seed, sample["epoch"], sample["sample_id"], sample["copy"]))
            try:
                self._cut(sample["image"], rng, outs)
                return rng
            except ValueError as error:
                (samples[at],) = replaced(self._source, [sample], error)
            except Exception as error:
                raise unexpected(self._source, sample, error) from error

    def draw_boxes(self, rng: random.Random, height: int, width: int) -> list[list[Box]]:
        """Where the crops of each group lie in an image of that size: the first draws of its generator."""
        return [
            [random_resized_box(rng, height, width, scale, _RATIO) for _ in range(crops)]
            for crops, scale in zip(self._num_crops, self._crop_scales, strict=True)
        ]

    def _cut(self, encoded: bytes | memoryview, rng: random.Random, outs: list[Tensor]) -> None:
        """Every crop of one image, ``outs`` holding those of each group."""
        boxes = [box for group in self.draw_boxes(rng, *read_size(encoded)) for box in group]
        decode_views(encoded, boxes, [out for group in outs for out in group.unbind()], self._interpolation)


class MultiCropTransform:
    """A batch of :class:`MultiCrop` on its device: ``crops`` become float32, augmented and normalised."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        self._normalize = Normalize(mean, std)

    def __call__(self, batch: Batch) -> Batch:
        batch = dict(batch)
        crops = batch[CROPS]
        if OP_CODES in batch:
            programs = zip(crops, batch.pop(OP_CODES), batch.pop(OP_VALUES), strict=True)
            crops = [apply_programs(images, codes, values, _NO_FILL) for images, codes, values in programs]
        return {**batch, CROPS: [self._normalize(images) for images in crops]}
