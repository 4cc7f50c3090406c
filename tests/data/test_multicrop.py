"""Multi-crop against a per-image reference on Pillow with the same draws, and what a batch promises."""

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from vitcomposer.data import MultiCrop
from vitcomposer.data.augment.policies import ColorDistortion
from vitcomposer.data.batch import CROPS, OP_CODES, OP_VALUES
from vitcomposer.data.boxes import random_resized_box
from vitcomposer.data.multicrop import MultiCropTransform
from vitcomposer.data.random import random_key
from vitcomposer.errors import ConfigError

GROUPS: dict[str, Any] = {
    "num_crops": (2, 4),
    "size_crops": (40, 24),
    "crop_scales": ((0.14, 1.0), (0.05, 0.14)),
    "seed": 3,
}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    made = []
    for i in range(6):
        buffer = io.BytesIO()
        photos[i % 2].crop((30 * i, 20 * i, 30 * i + 160 + 9 * i, 20 * i + 200 - 7 * i)).save(buffer, "JPEG")
        made.append({"image": buffer.getvalue(), "label": i, "sample_id": 10 + i, "copy": 0, "epoch": 1})
    return made


def distorting(strength: float = 1.0) -> list[ColorDistortion]:
    return [ColorDistortion(strength, blur_prob=p, solarize_prob=0.2) for p in (0.9, 0.3)]


def test_crops_are_pillows_bilinear_resize_of_the_drawn_boxes(samples: list[dict[str, Any]]) -> None:
    crops = MultiCrop(**GROUPS, flip_prob=0.0)(samples)[CROPS]
    assert [tuple(group.shape) for group in crops] == [(12, 3, 40, 40), (24, 3, 24, 24)]
    for i, sample in enumerate(samples):
        image = Image.open(io.BytesIO(sample["image"])).convert("RGB")
        rng = random.Random(random_key(3, 1, sample["sample_id"], 0))
        for group, (count, size, scale) in enumerate(((2, 40, (0.14, 1.0)), (4, 24, (0.05, 0.14)))):
            for crop in range(count):
                top, left, height, width = random_resized_box(rng, image.height, image.width, scale, (3 / 4, 4 / 3))
                cut = image.crop((left, top, left + width, top + height))
                expected = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR))
                ours = crops[group][crop * len(samples) + i].permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(ours, expected)


def test_flip_mirrors_every_crop(samples: list[dict[str, Any]]) -> None:
    plain = MultiCrop(**GROUPS, flip_prob=0.0)(samples)[CROPS]
    flipped = MultiCrop(**GROUPS, flip_prob=1.0)(samples)[CROPS]
    assert all(torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True))


def test_worker_and_device_make_the_same_pixels(samples: list[dict[str, Any]]) -> None:
    here = MultiCrop(**GROUPS, distortions=distorting())(samples)
    there = MultiCrop(**GROUPS, distortions=distorting(), augment_on_device=True)(samples)
    assert OP_CODES not in here
    assert [codes.shape[0] for codes in there[OP_CODES]] == [12, 24]
    transform = MultiCropTransform(MEAN, STD)
    for a, b in zip(transform(here)[CROPS], transform(there)[CROPS], strict=True):
        assert a.dtype == torch.float32
        levels = (a - b).abs() * torch.tensor(STD).view(3, 1, 1) * 255
        assert levels.max() <= 1.01
        assert (levels > 0.5).float().mean() < 1e-3
    assert set(transform(there)) == {CROPS, "label", "sample_id"}
    assert set(there) == {CROPS, "label", "sample_id", OP_CODES, OP_VALUES}, "the transform must not change its input"


def test_every_crop_has_draws_of_its_own(samples: list[dict[str, Any]]) -> None:
    distortions = [ColorDistortion(1.0, blur_prob=1.0)] * 2
    batch = MultiCrop(**GROUPS, distortions=distortions, augment_on_device=True)(samples)
    programs = np.concatenate(batch[OP_VALUES])
    assert len(np.unique(programs, axis=0)) == len(programs) == 36


@pytest.mark.parametrize("others", [[], [0], [5, 4, 0]])
def test_a_samples_crops_do_not_depend_on_its_batch(others: list[int], samples: list[dict[str, Any]]) -> None:
    collate = MultiCrop(**GROUPS, distortions=distorting())
    alone = collate([samples[2]])[CROPS]
    together = collate([*(samples[i] for i in others), samples[2]])[CROPS]
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[len(others) :: len(others) + 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_crops": (40,)}, "size_crops must be as long as num_crops, 2, got 1"),
        ({"crop_scales": ((0.1, 1.0), (0.2, 0.1))}, "crop_scales must be pairs"),
        ({"num_crops": (2, 0)}, "num_crops must be one or more"),
        ({"distortions": [None]}, "distortions must be as long as num_crops"),
    ],
)
def test_groups_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultiCrop(**{**GROUPS, **changes})


def test_damaged_image_is_named(samples: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="sample_id 10: the image .* cannot be read"):
        MultiCrop(**GROUPS)([{**samples[0], "image": samples[0]["image"][:400]}])
