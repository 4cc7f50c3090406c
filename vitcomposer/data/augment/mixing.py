"""Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899) with DeiT's switch, as in timm's ``Mixup``.

The partner of image i in a batch of B is image B - 1 - i. What is mixed how is drawn on the host
(:func:`draw_mixing`) and applied on the device without looking at a value (:func:`mix_images`).
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitcomposer.data.boxes import NO_BOX, Box, box_mask


def draw_mixing(
    rng: np.random.RandomState,
    batch_size: int,
    image_size: int,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
    mode: Literal["batch", "pair", "elem"],
) -> tuple[np.ndarray, np.ndarray]:
    """Label shares, float32 (B,), and CutMix boxes, int32 (B, 4), of one batch.

    ``mode`` says who shares a draw: the batch, an image and its partner, or nobody. One of the alphas is above 0. The
    order of the draws is timm's, so the same numpy seed gives the same mixing.
    """
    # lam, cut and boxes are (draws,), (draws,) and (draws, 4) at first, and are repeated to B in the end.
    draws = {"batch": 1, "pair": batch_size // 2, "elem": batch_size}[mode]
    lam, cut = _draw_lam(rng, None if mode == "batch" else draws, mixup_alpha, cutmix_alpha, prob, switch_prob)
    boxes = np.zeros((draws, 4), dtype=np.int32)
    sides = (image_size * np.sqrt(1 - lam)).astype(int)  # (draws,): of boxes with the share 1 - lam of the area
    for i in np.flatnonzero(cut & (lam < 1)):
        boxes[i], lam[i] = _cutmix_box(rng, image_size, int(sides[i]))
    if mode == "pair":
        lam, boxes = np.concatenate([lam, lam[::-1]]), np.concatenate([boxes, boxes[::-1]])
    repeats = batch_size // len(lam)
    return lam.astype(np.float32).repeat(repeats), boxes.repeat(repeats, axis=0)


def _draw_lam(
    rng: np.random.RandomState,
    count: int | None,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Lambda before any box and whether it is CutMix's; ``count`` None draws one for a whole batch."""
    if count is None:
        if rng.rand() >= prob:
            return np.ones(1), np.zeros(1, dtype=bool)
        cut = cutmix_alpha > 0 and (mixup_alpha == 0 or rng.rand() < switch_prob)
        alpha = cutmix_alpha if cut else mixup_alpha
        return np.array([rng.beta(alpha, alpha)]), np.array([cut])
    if mixup_alpha > 0 and cutmix_alpha > 0:
        cut = rng.rand(count) < switch_prob
        cutmix_lam = rng.beta(cutmix_alpha, cutmix_alpha, count)
        lam = np.where(cut, cutmix_lam, rng.beta(mixup_alpha, mixup_alpha, count))
    else:
        cut = np.full(count, cutmix_alpha > 0)
        alpha = max(mixup_alpha, cutmix_alpha)
        lam = rng.beta(alpha, alpha, count)
    # timm rounds to float32 before it computes the box.
    return np.where(rng.rand(count) < prob, lam.astype(np.float32), np.float32(1)), cut


def _cutmix_box(rng: np.random.RandomState, size: int, side: int) -> tuple[Box, float]:
    """A square box around a uniform centre, clipped to the image, and lambda by the area outside it."""
    centre_y, centre_x = rng.randint(0, size), rng.randint(0, size)
    top, bottom = max(centre_y - side // 2, 0), min(centre_y + (side + 1) // 2, size)
    left, right = max(centre_x - side // 2, 0), min(centre_x + (side + 1) // 2, size)
    height, width = bottom - top, right - left
    if height == 0 or width == 0:
        return NO_BOX, 1.0
    return (top, left, height, width), 1.0 - height * width / float(size * size)


def mix_images(images: Tensor, lam: Tensor, boxes: Tensor) -> Tensor:
    """Mix float images (B, 3, H, W) with the reversed batch: by ``lam`` where the box is empty, else by the box."""
    is_cutmix = (boxes[:, 2] > 0).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    inside = box_mask(boxes, *images.shape[-2:])  # (B, 1, H, W)
    own = torch.where(is_cutmix, (~inside).to(images.dtype), lam.to(images.dtype).view(-1, 1, 1, 1))  # (B, 1, H, W)
    return images.flip(0).mul_(1 - own).add_(images * own)


def soft_targets(label: Tensor, num_classes: int, label_smoothing: float, lam: Tensor | None = None) -> Tensor:
    """Smoothed one-hot targets, float32 (B, num_classes); mixed with the reversed batch's where ``lam`` is given.

    Smoothing spreads ``label_smoothing`` over all classes, the true one included, before the mix.
    """
    off = label_smoothing / num_classes
    is_label = label[:, None] == torch.arange(num_classes, device=label.device)  # (B, num_classes)
    target = torch.where(is_label, 1.0 - label_smoothing + off, off)  # (B, num_classes)
    if lam is None:
        return target
    return target * lam[:, None] + target.flip(0) * (1 - lam[:, None])
