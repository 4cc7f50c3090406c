"""Whole batches: against torchvision's pipelines, and the promise that only (seed, epoch, sample, copy) decide."""

import dataclasses
import io
import pickle
import random
import struct
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms.functional import hflip, pil_to_tensor, resized_crop

from vitcomposer.data.augment import crop as views
from vitcomposer.data.augment.transforms import TrainTransform
from vitcomposer.data.batch import ERASE_BOX, ERASE_SEED, MIX_BOX, MIX_LAM, split_batch
from vitcomposer.data.boxes import random_resized_box
from vitcomposer.data.collate import EvalCollate, TrainCollate
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.random import random_key
from vitcomposer.errors import ConfigError
from vitcomposer.schema import Augment, Mixing

DEIT = Augment(
    crop_scale=(0.08, 1.0),
    interpolation="bicubic",
    flip_prob=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    three_augment=False,
    color_jitter=0.3,
    random_erasing=0.5,
    repeated_augmentation=3,
)
PLAIN = dataclasses.replace(DEIT, rand_augment=None, color_jitter=0.0, random_erasing=0.0)
MIXING = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1)
NO_MIXING = dataclasses.replace(MIXING, mixup_alpha=0.0, cutmix_alpha=0.0)
SIZE, CLASSES = 32, 10


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    made = []
    for i in range(12):
        photo = photos[i % 2].crop((20 * i, 10 * i, 20 * i + 90 + 7 * i, 10 * i + 140 - 5 * i))
        buffer = io.BytesIO()
        photo.save(buffer, "PNG" if i == 4 else "JPEG")
        made.append({"image": buffer.getvalue(), "label": i % CLASSES, "sample_id": 100 + i, "copy": 0, "epoch": 2})
    return made


def train_collate(augment: Augment = DEIT, mixing: Mixing = MIXING, seed: int = 0) -> TrainCollate:
    return TrainCollate(augment, mixing, image_size=SIZE, num_classes=CLASSES, seed=seed)


def eval_collate(**options: Any) -> EvalCollate:
    settings = {"image_size": SIZE, "crop_ratio": 0.875, "interpolation": "bicubic", "num_classes": CLASSES}
    return EvalCollate(**{**settings, **options})


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_train_batch_has_the_promised_tensors(samples: list[dict[str, Any]]) -> None:
    batch = train_collate()(samples)
    expected = {
        "image": (torch.uint8, (12, 3, SIZE, SIZE)),
        "label": (torch.int64, (12,)),
        "sample_id": (torch.int64, (12,)),
        ERASE_BOX: (torch.int32, (12, 4)),
        ERASE_SEED: (torch.int64, (12,)),
        MIX_LAM: (torch.float32, (12,)),
        MIX_BOX: (torch.int32, (12, 4)),
    }
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == expected
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["label"].tolist() == [s["label"] for s in samples]
    assert batch["sample_id"].tolist() == [s["sample_id"] for s in samples]
    assert set(train_collate(PLAIN, NO_MIXING)(samples)) == {"image", "label", "sample_id"}


@pytest.mark.parametrize("flip_prob", [0.0, 1.0])
def test_train_view_is_torchvisions_crop_and_flip_of_the_drawn_box(
    flip_prob: float, samples: list[dict[str, Any]]
) -> None:
    augment = dataclasses.replace(PLAIN, flip_prob=flip_prob)
    batch = train_collate(augment, NO_MIXING, seed=9)(samples)
    for i, sample in enumerate(samples):
        image = Image.open(io.BytesIO(sample["image"])).convert("RGB")
        rng = random.Random(random_key(9, 2, sample["sample_id"], 0, 0))
        box = random_resized_box(rng, image.height, image.width, augment.crop_scale, augment.crop_ratio)
        view = resized_crop(image, *box, [SIZE, SIZE], transforms.InterpolationMode.BICUBIC)
        expected = pil_to_tensor(hflip(view) if flip_prob else view)
        assert torch.equal(batch["image"][i], expected)


def test_policies_see_the_flipped_crop(samples: list[dict[str, Any]]) -> None:
    """Strength 0.3 of jitter changes the plain view, and by what color_jitter does with the same generator."""
    plain = train_collate(PLAIN, NO_MIXING)(samples)["image"]
    jittered = train_collate(dataclasses.replace(PLAIN, color_jitter=0.3), NO_MIXING)(samples)["image"]
    for a, b in zip(plain, jittered, strict=True):
        correlation = torch.corrcoef(torch.stack([a.float().flatten(), b.float().flatten()]))[0, 1]
        assert 0.8 < correlation < 0.99999


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_gives_the_same_batches(workers: int, samples: list[dict[str, Any]]) -> None:
    collate = train_collate()
    expected = [collate(samples[i : i + 4]) for i in range(0, 12, 4)]
    loader = DataLoader(samples, batch_size=4, num_workers=workers, collate_fn=collate)  # pyright: ignore
    for batch, reference in zip(loader, expected, strict=True):
        assert same(batch, reference)
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "augment",
    [DEIT, dataclasses.replace(DEIT, rand_augment=None, three_augment=True)],
    ids=["rand_augment", "three_augment"],
)
def test_a_sample_is_the_same_in_any_batch(augment: Augment, samples: list[dict[str, Any]]) -> None:
    collate = train_collate(augment, NO_MIXING)
    transform = TrainTransform(augment, NO_MIXING, num_classes=CLASSES)
    whole, part = transform(collate(samples)), transform(collate([samples[7], samples[3]]))
    assert torch.equal(part["image"], whole["image"][[7, 3]])


@pytest.mark.parametrize("change", [{"copy": 1}, {"epoch": 3}, {"sample_id": 7}])
def test_copy_epoch_and_id_each_change_every_draw(change: dict[str, int], samples: list[dict[str, Any]]) -> None:
    a = train_collate()(samples)
    b = train_collate()([{**sample, **change} for sample in samples])
    assert all(not torch.equal(x, y) for x, y in zip(a["image"], b["image"], strict=True))
    assert (a[ERASE_SEED] != b[ERASE_SEED]).all()
    assert not torch.equal(a[MIX_LAM], b[MIX_LAM])


def test_seed_changes_the_batch_and_repeats_it(samples: list[dict[str, Any]]) -> None:
    assert same(train_collate(seed=1)(samples), train_collate(seed=1)(samples))
    assert not same(train_collate(seed=1)(samples), train_collate(seed=2)(samples))


def test_global_generators_neither_matter_nor_move(samples: list[dict[str, Any]]) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = train_collate()(samples)
    drawn = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
    assert same(train_collate()(samples), first)


def test_microbatches_give_the_whole_batchs_images_and_targets(samples: list[dict[str, Any]]) -> None:
    transform = TrainTransform(DEIT, dataclasses.replace(MIXING, mode="elem"), num_classes=CLASSES)
    batch = train_collate(mixing=dataclasses.replace(MIXING, mode="elem"))(samples)
    whole = transform(batch)
    parts = [transform(part) for part in split_batch(batch, 5)]
    order = torch.cat([part["sample_id"] for part in parts]) - 100
    for key in ("image", "target", "label"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key][order]), key


def test_collates_survive_pickling(samples: list[dict[str, Any]]) -> None:
    """As spawned loader workers receive them."""
    assert same(pickle.loads(pickle.dumps(train_collate()))(samples), train_collate()(samples))
    assert same(pickle.loads(pickle.dumps(eval_collate()))(samples), eval_collate()(samples))


def test_odd_batch_with_mixing_raises(samples: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="global_train_batch_size must give every device an even batch.*got 3"):
        train_collate()(samples[:3])
    assert len(train_collate(mixing=NO_MIXING)(samples[:3])["image"]) == 3


def test_bad_rand_augment_raises_at_construction() -> None:
    with pytest.raises(ConfigError, match=r"augment\.rand_augment .*'rand-m9-foo1'.*rand-m9-mstd0\.5-inc1"):
        train_collate(dataclasses.replace(DEIT, rand_augment="rand-m9-foo1"))


@pytest.mark.parametrize("label", [-1, CLASSES, IGNORE_LABEL])
def test_training_label_outside_the_classes_raises(label: int, samples: list[dict[str, Any]]) -> None:
    bad = [samples[0], {**samples[1], "label": label}]
    with pytest.raises(ValueError, match=rf"sample_id 101: .*model\.num_classes=10, got {label}"):
        train_collate()(bad)


def test_evaluation_takes_the_padding_label_and_no_other(samples: list[dict[str, Any]]) -> None:
    batch = eval_collate()([samples[0], {**samples[1], "label": IGNORE_LABEL}])
    assert batch["label"].tolist() == [0, IGNORE_LABEL]
    with pytest.raises(ValueError, match="sample_id 101: .*got 10"):
        eval_collate()([{**samples[1], "label": CLASSES}])


@pytest.mark.parametrize("make", [train_collate, eval_collate])
@pytest.mark.parametrize(("keep", "cause"), [(0.5, "truncated"), (0.0, "no image format that Pillow knows")])
def test_broken_image_raises_with_its_id(make: Any, keep: float, cause: str, samples: list[dict[str, Any]]) -> None:
    image = samples[2]["image"]
    broken = {**samples[2], "image": image[: int(len(image) * keep)]}
    with pytest.raises(ValueError, match=f"sample_id 102: the image .* cannot be read: .*{cause}"):
        make()([samples[0], broken])


@pytest.mark.parametrize("shape", [(90, 140), (140, 90), (20, 33), (36, 36), (32, 32), (5, 60), (300, 301)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
@pytest.mark.parametrize(("interpolation", "crop_ratio"), [("bicubic", 0.875), ("bilinear", 1.0)])
def test_evaluation_equals_torchvision(
    shape: tuple[int, int], mode: str, interpolation: str, crop_ratio: float
) -> None:
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((shape[1], shape[0])).convert(mode)
    buffer = io.BytesIO()
    photo.save(buffer, "PNG" if mode == "P" else "JPEG")
    reference = transforms.Compose(
        [
            transforms.Resize(int(SIZE / crop_ratio), transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(SIZE),
            transforms.PILToTensor(),
        ]
    )
    expected = reference(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
    collate = eval_collate(crop_ratio=crop_ratio, interpolation=interpolation)
    batch = collate([{"image": buffer.getvalue(), "label": 1, "sample_id": 5, "copy": 0, "epoch": 0}])
    assert (batch["image"][0].int() - expected.int()).abs().max() <= 2
    assert set(batch) == {"image", "label", "sample_id"}


def test_numpy_integers_in_a_sample_change_nothing(samples: list[dict[str, Any]]) -> None:
    fields = ("label", "sample_id", "copy", "epoch")
    as_numpy = [{**sample, **{key: np.int64(sample[key]) for key in fields}} for sample in samples]
    assert same(train_collate()(as_numpy), train_collate()(samples))


def test_random_key_spreads_consecutive_ids_uniformly() -> None:
    for place in range(4):
        parts = [[0, 0, 0, 0, 0] for _ in range(3000)]
        for i, part in enumerate(parts):
            part[place] = i
        keys = [random_key(*part) for part in parts]
        assert len(set(keys)) == 3000
        assert kstest(np.array(keys, dtype=np.float64) / 2.0**64, "uniform").pvalue > 0.01
        first = np.array([random.Random(key).random() for key in keys])
        assert kstest(first, "uniform").pvalue > 0.01
        assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.06
    assert random_key(1, 2) != random_key(2, 1)


def test_neighbouring_copies_give_the_views_that_separate_decodes_give(
    samples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [{**sample, "copy": copy} for sample in samples[:4] for copy in range(3)]
    apart = [copies[i] for i in (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)]
    decoded = []
    decode = views.decode_region
    monkeypatch.setattr(views, "decode_region", lambda *args: (decoded.append(args), decode(*args))[1])
    together = train_collate(mixing=NO_MIXING)(copies)
    assert len(decoded) == 4, "three copies in a row are one decode"
    separate = train_collate(mixing=NO_MIXING)(apart)
    assert len(decoded) == 4
    order = [copies.index(sample) for sample in apart]
    assert same({key: value[order] for key, value in together.items()}, separate)
    assert not torch.equal(together["image"][0], together["image"][1]), "copies are different views"


def test_raw_sample_gives_the_views_of_the_same_pixels_in_a_file(samples: list[dict[str, Any]]) -> None:
    png = samples[4]
    pixels = np.asarray(Image.open(io.BytesIO(png["image"])).convert("RGB"))
    raw = {**png, "image": memoryview(struct.pack("<4s3I", b"\0RAW", *pixels.shape[:2], 0) + pixels.tobytes())}
    assert same(train_collate(mixing=NO_MIXING)([png]), train_collate(mixing=NO_MIXING)([raw]))
    assert same(eval_collate()([png]), eval_collate()([raw]))
