"""Finishes whole batches on the device: colours and geometry, normalise, erase, mix, and the soft targets.

The order is timm's: its loader augments, normalises and erases, its training loop mixes. Nothing here is random and
nothing looks at a value: the loader worker drew every box, share and seed, so the device never waits for the host and a
batch gives the same tensors however it is split.
"""

import math

import torch
from torch import Tensor

from vitcomposer.data.augment.colour_kernels import normalize_lines
from vitcomposer.data.augment.mixing import mix_images, soft_targets
from vitcomposer.data.augment.policies import fill_colour
from vitcomposer.data.augment.programs_torch import apply_programs
from vitcomposer.data.batch import ERASE_BOX, ERASE_SEED, MIX_BOX, MIX_LAM, OP_CODES, OP_VALUES, UNMIXED, Batch
from vitcomposer.data.boxes import box_mask
from vitcomposer.schema import Augment, Mixing

_GOLDEN = 0x9E3779B97F4A7C15  # increment and multipliers of splitmix64
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class TrainTransform:
    """A collated training batch on its device to ``image`` float32, ``target`` float32 (B, num_classes).

    ``label``, ``sample_id`` and ``mix_lam`` stay; what else the loader drew for the device is used up.

    Args:
        keep_unmixed: Leave the images as they were before they were mixed, normalised and erased, in ``unmixed``.
    """

    def __init__(self, augment: Augment, mixing: Mixing, *, num_classes: int, keep_unmixed: bool = False) -> None:
        self._fill = fill_colour(augment.mean)
        self._normalize = Normalize(augment.mean, augment.std)
        self._erases = augment.random_erasing > 0
        self._num_classes = num_classes
        self._label_smoothing = mixing.label_smoothing
        self._keep_unmixed = keep_unmixed

    def __call__(self, batch: Batch) -> Batch:
        batch = dict(batch)
        images = batch["image"]  # uint8 (B, 3, H, W)
        if OP_CODES in batch:
            images = apply_programs(images, batch.pop(OP_CODES), batch.pop(OP_VALUES), self._fill)
        images = self._normalize(images)  # float32 (B, 3, H, W)
        if self._erases:
            images = erase(images, batch.pop(ERASE_BOX), batch.pop(ERASE_SEED))
        if self._keep_unmixed:
            batch[UNMIXED] = images
        lam = batch.get(MIX_LAM)  # (B,) or None
        if lam is not None:
            images = mix_images(images, lam, batch.pop(MIX_BOX))
        target = soft_targets(batch["label"], self._num_classes, self._label_smoothing, lam)
        return {**batch, "image": images, "target": target}


class EvalTransform:
    """A collated evaluation batch on its device to ``image`` float32; the rest stays."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        self._normalize = Normalize(mean, std)

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "image": self._normalize(batch["image"])}


class Normalize:
    """uint8 (B, 3, H, W) to float32 with the given mean and std of values in [0, 1]."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        self._mean = torch.tensor([255 * m for m in mean]).view(3, 1, 1)  # (3, 1, 1)
        self._std = torch.tensor([255 * s for s in std]).view(3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        if images.device.type == "cpu" and images.is_contiguous(memory_format=torch.channels_last):
            return self._on_processor(images)
        if self._mean.device != images.device:  # once: a copy in every step would make the host wait
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return torch.sub(images, self._mean).div_(self._std)

    def _on_processor(self, images: Tensor) -> Tensor:
        """The same numbers in one pass: torch broadcasts slowly over channels that lie side by side."""
        count, _, height, width = images.shape
        mean, std = (stat.cpu().flatten().repeat(width).numpy() for stat in (self._mean, self._std))  # (3 * W,) each
        result = torch.empty(count, height, width, 3)  # float32 (B, H, W, 3)
        lines = images.permute(0, 2, 3, 1).reshape(count * height, 3 * width)  # (B * H, 3 * W)
        normalize_lines(lines.numpy(), mean, std, result.view(count * height, 3 * width).numpy())
        return result.permute(0, 3, 1, 2)


def erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
    """Replace the pixels inside each box with standard normal noise (timm's ``pixel`` mode)."""
    return torch.where(box_mask(boxes, *images.shape[-2:]), pixel_noise(seeds, *images.shape[1:]), images)


def pixel_noise(seeds: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Standard normal values (B, channels, height, width) that depend on nothing but each sample's int64 seed.

    A counter-based generator in three steps. Splitmix64 gives every line of pixels and every column of a sample its
    own 32-bit key; the product of the two keys modulo 2**32 is the uniform number of a pixel; the inverse normal
    distribution function makes it normal. Only one multiplication touches every pixel, because on a GPU the passes
    over the whole batch are the cost.
    """
    lines = channels * height
    keys = _splitmix64(seeds[:, None] + _signed(_GOLDEN) * torch.arange(1, lines + width + 1, device=seeds.device))
    keys = (keys >> 32).to(torch.int32)  # (B, lines + width)
    line = (keys[:, :lines] | 1).view(-1, channels, height, 1)  # odd: an even key would lose bits of the product
    column = keys[:, lines:].view(-1, 1, 1, width)  # (B, 1, 1, width)
    # Slightly below 2**-31, so that no value rounds to 1, whose quantile is infinite; the largest here is 5.2 sigma.
    uniform = (line * column) * (2**-31 * (1 - 2**-22))  # (-1, 1)
    return torch.erfinv(uniform).mul_(math.sqrt(2.0))


def _splitmix64(state: Tensor) -> Tensor:
    """The output function of splitmix64 (Steele et al. 2014) on int64, whose products wrap and shifts are signed."""
    for shift, multiplier in _MULTIPLIERS:
        state = (state ^ _unsigned_shift(state, shift)) * _signed(multiplier)
    return state ^ _unsigned_shift(state, 31)


def _unsigned_shift(state: Tensor, shift: int) -> Tensor:
    return (state >> shift) & ((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of this uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value
