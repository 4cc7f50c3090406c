"""Image policies against timm and torchvision; the device side against timm's loader; the noise by its statistics."""

import dataclasses
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy.stats import kstest
from sklearn.datasets import load_sample_image
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as tv

from vitcomposer.data import augment as device
from vitcomposer.data.mixing import MIX_BOX, MIX_LAM, draw_mixing
from vitcomposer.data.policies import (
    RandAugment,
    build_policies,
    color_jitter,
    global_generators_restored,
    three_augment,
)
from vitcomposer.schema import IMAGENET_MEAN, IMAGENET_STD, Augment, ConfigError, Mixing

DEIT = Augment(
    crop_scale=(0.08, 1.0),
    interpolation="bicubic",
    flip_prob=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    three_augment=False,
    color_jitter=0.0,
    random_erasing=0.25,
    repeated_augmentation=1,
)
MIXING = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1)
NO_MIXING = dataclasses.replace(MIXING, mixup_alpha=0.0, cutmix_alpha=0.0)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg")).resize((64, 64))


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.8-mstd101", "rand-m15-mmax20-tweights"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_rand_augment_equals_timm_pixel_by_pixel(name: str, interpolation: str, photo: Image.Image) -> None:
    ours = RandAugment(name, image_size=64, mean=IMAGENET_MEAN, interpolation=interpolation)
    _, theirs, _ = create_transform(
        64, is_training=True, auto_augment=name, interpolation=interpolation, separate=True, color_jitter=0.4
    )
    changed = 0
    with global_generators_restored():
        for seed in range(60):
            result = np.asarray(ours(photo, random.Random(seed)))
            same_draws = random.Random(seed)
            random.seed(same_draws.getrandbits(64))
            np.random.seed(same_draws.getrandbits(32))
            np.testing.assert_array_equal(result, np.asarray(theirs(photo)))
            changed += int((result != np.asarray(photo)).any())
    assert changed > 30


def test_policies_leave_the_global_generators_alone(photo: Image.Image) -> None:
    policy = RandAugment("rand-m9-mstd0.5-inc1", image_size=64, mean=IMAGENET_MEAN, interpolation="bicubic")
    before = random.getstate(), np.random.get_state()[1].copy()
    with global_generators_restored():
        policy(photo, random.Random(0))
        assert random.getstate() != before[0]
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize(
    "name",
    ["rand", "randaugment", "augmix-m3", "rand-m9-mstd", "rand-m9-tfoo", "rand-mm9", "rand-m9_inc1", "rand-p1.5", ""],
)
def test_rand_augment_that_timm_would_not_read_raises(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"augment\.rand_augment must be .* got .*Write it like rand-m9-mstd0\.5-inc1"
    ):
        RandAugment(name, image_size=64, mean=IMAGENET_MEAN, interpolation="bicubic")


def test_three_augment_applies_each_operation_with_a_third(photo: Image.Image) -> None:
    grey = np.dstack([np.asarray(photo.convert("L"))] * 3)
    solarized = np.asarray(ImageOps.solarize(photo))
    counts = {"grey": 0, "solarize": 0, "blur": 0}
    for seed in range(900):
        result = np.asarray(three_augment(photo, random.Random(seed)))
        if (result == grey).all():
            counts["grey"] += 1
        elif (result == solarized).all():
            counts["solarize"] += 1
        else:
            counts["blur"] += 1
    assert all(abs(count - 300) < 45 for count in counts.values()), counts


def test_three_augment_blur_radius_is_uniform(photo: Image.Image) -> None:
    radii = []
    for seed in range(400):
        rng = random.Random(seed)
        result = three_augment(photo, rng)
        same = random.Random(seed)
        if same.randrange(3) == 2:
            radii.append(same.uniform(0.1, 2.0))
            expected = photo.filter(ImageFilter.GaussianBlur(radii[-1]))
            np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
    assert min(radii) < 0.3 and max(radii) > 1.8


@pytest.mark.parametrize("strength", [0.3, 1.2])
def test_color_jitter_equals_torchvision(strength: float, photo: Image.Image) -> None:
    """The same order and factors through torchvision's functions, in its ColorJitter's range, give the same pixels."""
    functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation]
    reference = ColorJitter(strength, strength, strength)
    assert reference.brightness == reference.contrast == reference.saturation
    orders = set()
    for seed in range(60):
        result = np.asarray(color_jitter(photo, random.Random(seed), strength))
        rng, order = random.Random(seed), list(range(3))
        rng.shuffle(order)
        expected = photo
        for i in order:
            expected = functions[i](expected, rng.uniform(*reference.brightness))
        np.testing.assert_array_equal(result, np.asarray(expected))
        orders.add(tuple(order))
    assert len(orders) == 6


def test_policies_come_in_the_order_of_the_schema() -> None:
    policies = build_policies(dataclasses.replace(DEIT, color_jitter=0.3), 64)
    assert isinstance(policies[0], RandAugment) and len(policies) == 2
    deit3 = dataclasses.replace(DEIT, rand_augment=None, three_augment=True, color_jitter=0.3)
    assert build_policies(deit3, 64)[0] is three_augment and len(build_policies(deit3, 64)) == 2
    assert build_policies(dataclasses.replace(DEIT, rand_augment=None), 64) == []


def test_noise_is_standard_normal() -> None:
    noise = device.pixel_noise(torch.arange(64), 3, 64, 64).double()
    count = noise.numel()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert kstest(noise.flatten().numpy()[::4], "norm").pvalue > 0.01


@pytest.mark.parametrize("measure", [lambda x: x, lambda x: (x**2 - 1) / 2**0.5], ids=["value", "square"])
def test_noise_is_independent_between_pixels_channels_and_samples(
    measure: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    values = measure(device.pixel_noise(torch.arange(64), 3, 64, 64).double())
    pairs = {
        "columns": (values[..., 1:], values[..., :-1]),
        "far columns": (values[..., 32:], values[..., :-32]),
        "rows": (values[..., 1:, :], values[..., :-1, :]),
        "channels": (values[:, 1:], values[:, :-1]),
        "samples": (values[1:], values[:-1]),
        "diagonal": (values[..., 1:, 1:], values[..., :-1, :-1]),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean().item()) < 4.5 / a.numel() ** 0.5, name


def test_noise_lines_and_columns_sum_like_independent_values() -> None:
    noise = device.pixel_noise(torch.arange(64), 3, 64, 64).double()
    assert kstest((noise.mean(-1) * 8).flatten().numpy(), "norm").pvalue > 0.01
    assert kstest((noise.mean((1, 2)) * 192**0.5).flatten().numpy(), "norm").pvalue > 0.01


def test_noise_depends_on_the_seed_alone() -> None:
    seeds = torch.tensor([5, 2**62, 7])
    whole = device.pixel_noise(seeds, 3, 9, 7)
    assert torch.equal(device.pixel_noise(seeds[1:2], 3, 9, 7)[0], whole[1])
    assert not torch.equal(whole[0], whole[1])


def test_normalize_equals_timm() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255, torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
    result = device.EvalTransform(IMAGENET_MEAN, IMAGENET_STD)({"image": images, "label": torch.zeros(2)})
    torch.testing.assert_close(result["image"], images.float().sub(mean).div(std))
    assert result["image"].dtype == torch.float32 and "label" in result


def train_batch(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lam, mix_box = draw_mixing(
        np.random.RandomState(3), count, 32, mixup_alpha=0.8, cutmix_alpha=0, prob=1, switch_prob=0, mode="batch"
    )
    boxes = [(4, 5, 10, 12) if i % 2 else (0, 0, 0, 0) for i in range(count)]
    return {
        "image": torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "label": torch.randint(0, 7, (count,), generator=generator),
        "sample_id": torch.arange(count),
        device.ERASE_BOX: torch.tensor(boxes, dtype=torch.int32),
        device.ERASE_SEED: torch.arange(count),
        MIX_LAM: torch.from_numpy(lam),
        MIX_BOX: torch.from_numpy(mix_box),
    }


def test_erase_touches_only_the_box() -> None:
    batch = train_batch(4)
    images = torch.full((4, 3, 32, 32), 9.0)
    erased = device.erase(images, batch[device.ERASE_BOX], batch[device.ERASE_SEED])
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[4:14, 5:17] = True
    assert (erased[0::2] == 9).all() and (erased[1::2][..., ~inside] == 9).all()
    assert (erased[1::2][..., inside] != 9).all()
    assert abs(erased[1::2][..., inside].std() - 1) < 0.15


def test_train_transform_normalizes_erases_and_then_mixes() -> None:
    batch = train_batch(6)
    result = device.TrainTransform(DEIT, MIXING, num_classes=7)(batch)
    images = device.Normalize(IMAGENET_MEAN, IMAGENET_STD)(batch["image"])
    images = device.erase(images, batch[device.ERASE_BOX], batch[device.ERASE_SEED])
    state = np.random.get_state()
    np.random.seed(3)
    images, target = Mixup(0.8, 0.0, prob=1.0, label_smoothing=0.1, num_classes=7)(images, batch["label"])
    np.random.set_state(state)
    torch.testing.assert_close(result["image"], images, rtol=0, atol=1e-6)
    torch.testing.assert_close(result["target"], target)
    assert set(result) == {"image", "label", "sample_id", "target"}
    assert result["target"].dtype == torch.float32 and device.ERASE_BOX in batch, "the input is left as it was"


def test_train_transform_without_erasing_or_mixing_only_normalizes() -> None:
    batch = {key: value for key, value in train_batch(3).items() if key in ("image", "label", "sample_id")}
    augment = dataclasses.replace(DEIT, random_erasing=0.0)
    result = device.TrainTransform(augment, dataclasses.replace(NO_MIXING, label_smoothing=0.0), num_classes=7)(batch)
    assert torch.equal(result["image"], device.Normalize(IMAGENET_MEAN, IMAGENET_STD)(batch["image"]))
    assert torch.equal(result["target"], torch.nn.functional.one_hot(batch["label"], 7).float())


def test_transforms_survive_pickling() -> None:
    batch = train_batch(4)
    transform = device.TrainTransform(DEIT, MIXING, num_classes=7)
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(batch)["image"], transform(batch)["image"])


def test_train_transform_compiles_without_a_graph_break() -> None:
    """Static shapes and no look at a value: one graph for the whole transform."""
    transform = device.TrainTransform(DEIT, MIXING, num_classes=7)
    batch = train_batch(4)
    traced = torch.compile(transform, backend="eager", fullgraph=True)(batch)
    assert torch.equal(traced["image"], transform(batch)["image"])
