"""The device side of a batch against timm's loader and against the worker's; the noise by its statistics."""

import dataclasses
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest
from sklearn.datasets import load_sample_image
from timm.data.mixup import Mixup

from vitcomposer.data.augment import transforms as device
from vitcomposer.data.augment.mixing import draw_mixing
from vitcomposer.data.batch import ERASE_BOX, ERASE_SEED, MIX_BOX, MIX_LAM, OP_CODES, UNMIXED, split_batch
from vitcomposer.data.collate import TrainCollate
from vitcomposer.schema import IMAGENET_MEAN, IMAGENET_STD, Augment, Mixing

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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalize_equals_timm(layout: torch.memory_format) -> None:
    images = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8).contiguous(memory_format=layout)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255, torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255
    result = device.EvalTransform(IMAGENET_MEAN, IMAGENET_STD)({"image": images, "label": torch.zeros(2)})
    torch.testing.assert_close(result["image"], images.float().sub(mean).div(std), rtol=1e-6, atol=1e-6)
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
        ERASE_BOX: torch.tensor(boxes, dtype=torch.int32),
        ERASE_SEED: torch.arange(count),
        MIX_LAM: torch.from_numpy(lam),
        MIX_BOX: torch.from_numpy(mix_box),
    }


def test_erase_touches_only_the_box() -> None:
    batch = train_batch(4)
    images = torch.full((4, 3, 32, 32), 9.0)
    erased = device.erase(images, batch[ERASE_BOX], batch[ERASE_SEED])
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[4:14, 5:17] = True
    assert (erased[0::2] == 9).all() and (erased[1::2][..., ~inside] == 9).all()
    assert (erased[1::2][..., inside] != 9).all()
    assert abs(erased[1::2][..., inside].std() - 1) < 0.15


def test_train_transform_normalizes_erases_and_then_mixes() -> None:
    batch = train_batch(6)
    result = device.TrainTransform(DEIT, MIXING, num_classes=7)(batch)
    images = device.Normalize(IMAGENET_MEAN, IMAGENET_STD)(batch["image"])
    images = device.erase(images, batch[ERASE_BOX], batch[ERASE_SEED])
    state = np.random.get_state()
    np.random.seed(3)
    images, target = Mixup(0.8, 0.0, prob=1.0, label_smoothing=0.1, num_classes=7)(images, batch["label"])
    np.random.set_state(state)
    torch.testing.assert_close(result["image"], images, rtol=0, atol=1e-6)
    torch.testing.assert_close(result["target"], target)
    assert set(result) == {"image", "label", "sample_id", "target", MIX_LAM}
    assert result["target"].dtype == torch.float32 and ERASE_BOX in batch, "the input is left as it was"


def test_train_transform_keeps_the_images_that_it_mixes() -> None:
    batch = train_batch(6)
    kept = device.TrainTransform(DEIT, MIXING, num_classes=7, keep_unmixed=True)(batch)
    alone = device.TrainTransform(DEIT, NO_MIXING, num_classes=7)(
        {key: value for key, value in batch.items() if key not in (MIX_LAM, MIX_BOX)}
    )
    assert torch.equal(kept[UNMIXED], alone["image"]) and not torch.equal(kept["image"], alone["image"])
    assert torch.equal(kept[MIX_LAM], batch[MIX_LAM])


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


@pytest.mark.parametrize("microbatch", [16, 6])
def test_device_runs_the_programs_that_the_worker_would_have_run(microbatch: int) -> None:
    augment = dataclasses.replace(DEIT, color_jitter=0.4)
    samples = [{"image": photo_jpeg(i), "label": i % 5, "sample_id": i, "copy": 0, "epoch": 0} for i in range(16)]
    transform = device.TrainTransform(augment, MIXING, num_classes=5)
    batches = {}
    for on_device in (False, True):
        collate = TrainCollate(augment, MIXING, image_size=48, num_classes=5, seed=1, augment_on_device=on_device)
        batch = collate(samples)
        assert (OP_CODES in batch) is on_device
        parts = [transform(part) for part in split_batch(batch, microbatch)]
        batches[on_device] = {int(i): image for p in parts for i, image in zip(p["sample_id"], p["image"], strict=True)}
    assert batches[True].keys() == batches[False].keys() == set(range(16))
    differences = torch.stack([(batches[True][i] - batches[False][i]).abs() for i in range(16)])
    one_level = 1 / 255 / min(augment.std)
    assert differences.max() <= 1.01 * one_level
    assert (differences > 0.01 * one_level).float().mean() < 2e-3


def photo_jpeg(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(load_sample_image("flower.jpg")[20 * i : 20 * i + 120, 25 * i : 25 * i + 150]).save(buffer, "JPEG")
    return buffer.getvalue()
