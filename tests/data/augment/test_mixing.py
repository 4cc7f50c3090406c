"""Mixing against timm's Mixup, draw by draw and pixel by pixel, and what a split must keep."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from timm.data.mixup import Mixup, mixup_target

from vitcomposer.data.augment.mixing import draw_mixing, mix_images, soft_targets
from vitcomposer.data.batch import MIX_BOX, MIX_LAM, split_batch
from vitcomposer.data.random import random_key

SIZE, CLASSES = 24, 10


def draw(seed: int, batch_size: int = 8, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    settings = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, "mode": "batch", **options}
    lam, boxes = draw_mixing(np.random.RandomState(seed), batch_size, SIZE, **settings)
    return torch.from_numpy(lam), torch.from_numpy(boxes)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.2, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("prob", [1.0, 0.6])
def test_mixed_batch_equals_timm(mode: str, alphas: tuple[float, float], prob: float) -> None:
    generator = torch.Generator().manual_seed(0)
    settings = {"mixup_alpha": alphas[0], "cutmix_alpha": alphas[1], "prob": prob, "switch_prob": 0.5, "mode": mode}
    # timm keeps the batch's lambda in float64, hence the last bit of float32 in the comparisons below.
    timm_mixup = Mixup(**settings, label_smoothing=0.1, num_classes=CLASSES)
    state = np.random.get_state()
    for seed in range(40):
        images = torch.randn(8, 3, SIZE, SIZE, generator=generator)
        label = torch.randint(0, CLASSES, (8,), generator=generator)
        np.random.seed(seed)
        expected, expected_target = timm_mixup(images.clone(), label)
        lam, boxes = draw(seed, **settings)
        torch.testing.assert_close(mix_images(images, lam, boxes), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(soft_targets(label, CLASSES, 0.1, lam), expected_target, rtol=0, atol=3e-7)
    np.random.set_state(state)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [1.0, 0.75, 0.3])
def test_soft_targets_equal_timm_exactly(smoothing: float, share: float) -> None:
    label = torch.tensor([0, 3, 9, 3])
    share = float(np.float32(share))
    expected = mixup_target(label, CLASSES, share, smoothing)
    assert torch.equal(soft_targets(label, CLASSES, smoothing, torch.full((4,), share)), expected)
    assert torch.equal(soft_targets(label, CLASSES, smoothing), mixup_target(label, CLASSES, 1.0, smoothing))


def test_soft_targets_have_the_closed_form() -> None:
    target = soft_targets(torch.tensor([1, 4]), 5, 0.1, torch.tensor([0.75, 0.25]))
    off, on = 0.1 / 5, 0.9 + 0.1 / 5
    first = [off, 0.75 * on + 0.25 * off, off, off, 0.25 * on + 0.75 * off]
    second = [off, 0.75 * on + 0.25 * off, off, off, 0.25 * on + 0.75 * off]
    torch.testing.assert_close(target, torch.tensor([first, second]))


def test_mixup_is_the_convex_combination_in_float64() -> None:
    images = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    lam = torch.tensor([0.25, 0.5, 0.75, 1.0])
    expected = images * lam.double().view(-1, 1, 1, 1) + images.flip(0) * (1 - lam.double()).view(-1, 1, 1, 1)
    mixed = mix_images(images, lam, torch.zeros(4, 4, dtype=torch.int32))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-15)


def test_cutmix_pastes_the_partner_and_lambda_is_the_area_left() -> None:
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, SIZE, SIZE)
    boxes_seen = 0
    for seed in range(50):
        lam, boxes = draw(seed, mixup_alpha=0.0, mode="elem")
        mixed = mix_images(images, lam, boxes)
        for i in range(8):
            own = (mixed[i] == i).float().mean().item()
            assert own == pytest.approx(lam[i].item(), abs=1e-6)
            assert ((mixed[i] == i) | (mixed[i] == 7 - i)).all()
            boxes_seen += int(0 < own < 1)
    assert boxes_seen > 300


def test_draws_keyed_by_batch_have_the_right_distribution() -> None:
    """Consecutive keys must behave like independent draws: the switch, and Beta of mixup's lambda."""
    draws = [draw(random_key(0, 0, first, 0, 1) >> 32, batch_size=2) for first in range(0, 4000, 2)]
    lam = np.array([lam[0].item() for lam, _ in draws])
    is_cutmix = np.array([box[0, 2].item() > 0 for _, box in draws])
    assert abs(is_cutmix.mean() - 0.5) < 0.04
    assert kstest(lam[~is_cutmix & (lam < 1)], beta(0.8, 0.8).cdf).pvalue > 0.01


def test_prob_is_the_share_of_mixed_batches() -> None:
    mixed = np.array([draw(seed, batch_size=2, prob=0.3)[0][0].item() < 1 for seed in range(1500)])
    assert abs(mixed.mean() - 0.3) < 0.04


def mixed_batch(count: int, mode: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    lam, boxes = draw(5, batch_size=count, mode=mode)
    return {
        "image": torch.randn(count, 3, SIZE, SIZE, generator=generator),
        "label": torch.randint(0, CLASSES, (count,), generator=generator),
        "sample_id": torch.arange(count),
        MIX_LAM: lam,
        MIX_BOX: boxes,
    }


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("count", [2, 8, 14, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 13, 16, 32])
def test_split_keeps_every_mixed_image_and_target(mode: str, count: int, size: int) -> None:
    batch = mixed_batch(count, mode)
    whole = mix_images(batch["image"], batch[MIX_LAM], batch[MIX_BOX])
    target = soft_targets(batch["label"], CLASSES, 0.1, batch[MIX_LAM])
    parts = split_batch(batch, size)
    order = torch.cat([part["sample_id"] for part in parts])
    assert torch.equal(order.sort().values, torch.arange(count))
    images = torch.cat([mix_images(part["image"], part[MIX_LAM], part[MIX_BOX]) for part in parts])
    targets = torch.cat([soft_targets(part["label"], CLASSES, 0.1, part[MIX_LAM]) for part in parts])
    assert torch.equal(images, whole[order]) and torch.equal(targets, target[order])
    sizes = [len(part["label"]) for part in parts]
    assert all(n % 2 == 0 and n <= max(size, 2) for n in sizes)
    assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]


@pytest.mark.parametrize(("size", "expected"), [(3, [3, 3, 1]), (7, [7]), (100, [7]), (1, [1] * 7)])
def test_split_without_mixing_is_contiguous(size: int, expected: list[int]) -> None:
    batch = {"image": torch.rand(7, 3, 4, 4), "label": torch.arange(7), "sample_id": torch.arange(7)}
    parts = split_batch(batch, size)
    assert [len(part["image"]) for part in parts] == expected
    for key, value in batch.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value)


def test_split_keeps_channels_last_memory() -> None:
    batch = mixed_batch(8, "batch")
    batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
    assert all(part["image"].is_contiguous(memory_format=torch.channels_last) for part in split_batch(batch, 4))


@pytest.mark.parametrize("size", [0, -2, 0.5])
def test_split_refuses_a_fraction_of_an_image(size: float) -> None:
    with pytest.raises(ValueError, match="device_train_microbatch_size must be a whole number"):
        split_batch(mixed_batch(8, "batch"), size)
