"""What is drawn against timm's and torchvision's draws, and the pixels that come out against theirs."""

import dataclasses
import pickle
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.stats import chi2_contingency, chisquare, kstest
from sklearn.datasets import load_sample_image
from timm.data import auto_augment as timm
from torchvision import transforms

from tests.conftest import ROOT
from vitcomposer import config
from vitcomposer.data.augment import programs as ops
from vitcomposer.data.augment.policies import (
    ColorDistortion,
    ColorJitter,
    Draw,
    Policies,
    RandAugment,
    ThreeAugment,
    build_policies,
    fill_colour,
)
from vitcomposer.data.augment.programs import Step, apply_program
from vitcomposer.errors import ConfigError
from vitcomposer.schema import IMAGENET_MEAN, Augment

SIZE = 32
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
CODE_OF = {
    timm.auto_contrast: ops.AUTO_CONTRAST,
    timm.equalize: ops.EQUALIZE,
    timm.invert: ops.INVERT,
    timm.rotate: ops.ROTATE,
    timm.posterize: ops.POSTERIZE,
    timm.solarize: ops.SOLARIZE,
    timm.solarize_add: ops.SOLARIZE_ADD,
    timm.color: ops.SATURATION,
    timm.desaturate: ops.SATURATION,
    timm.contrast: ops.CONTRAST,
    timm.brightness: ops.BRIGHTNESS,
    timm.sharpness: ops.SHARPNESS,
    timm.shear_x: ops.SHEAR_X,
    timm.shear_y: ops.SHEAR_Y,
    timm.translate_x_rel: ops.TRANSLATE_X,
    timm.translate_y_rel: ops.TRANSLATE_Y,
    timm.gaussian_blur: ops.GAUSSIAN_BLUR,
}
NAMES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m9-mstd0.5",
    "rand-m7-n3-p0.8-mstd101",
    "rand-m15-n4-mmax20-mstd2-tweights",
    "rand-m9-n3-p1-mstd1-t3aw",
    "rand-m4-mstd3-t3a",
    "rand-m10-mmax0-mstd0.1-mstd9-n1-n2",
]


@pytest.fixture
def global_generators() -> Any:
    """timm and torchvision draw from them: seeded here, and left as they were."""
    python, numpy, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    yield
    random.setstate(python), np.random.set_state(numpy), torch.set_rng_state(tensor)


def build(name: str) -> RandAugment:
    return RandAugment(name, image_size=SIZE, interpolation="bicubic")


def build_timm(name: str) -> timm.RandAugment:
    options = {"img_mean": tuple(fill_colour(IMAGENET_MEAN).tolist()), "interpolation": Image.Resampling.BICUBIC}
    return timm.rand_augment_transform(name, options)


def timm_draws(name: str, count: int) -> list[list[Step]]:
    """What timm's transform does to ``count`` images, without doing it."""
    transform, steps = build_timm(name), []

    def recorder(function: Callable[..., Image.Image]) -> Callable[..., object]:
        def record(image: object, *arguments: float, **options: object) -> object:
            value = arguments[0] if arguments else 0.0
            if function is timm.desaturate:
                value = min(1.0, max(0.0, 1.0 - value))
            if function in (timm.translate_x_rel, timm.translate_y_rel):
                value *= SIZE
            steps[-1].append((CODE_OF[function], value))
            return image

        return record

    for operation in transform.ops:
        operation.aug_fn = recorder(operation.aug_fn)
    for _ in range(count):
        steps.append([])
        transform(object())
    return steps


def our_draws(draw: Draw, count: int, seed: int = 0) -> list[list[Step]]:
    return [draw.draw(random.Random(seed * count + i)) for i in range(count)]


def assert_same_frequencies(ours: Counter[Any], theirs: Counter[Any]) -> None:
    keys = sorted(set(ours) | set(theirs), key=str)
    rare = [key for key in keys if ours[key] + theirs[key] < 20]
    table = [[c[key] for key in keys if key not in rare] + [sum(c[key] for key in rare)] for c in (ours, theirs)]
    kept = [column for column in zip(*table, strict=True) if sum(column) > 0]
    if len(kept) > 1:
        assert chi2_contingency(np.array(kept)).pvalue > 1e-3, (ours, theirs)


def values_of(draws: list[list[Step]]) -> dict[int, list[float]]:
    values = defaultdict(list)
    for steps in draws:
        for code, value in steps:
            values[code].append(float(value))
    return values


@pytest.mark.parametrize("name", NAMES)
def test_rand_augment_draws_as_timm(name: str, global_generators: None) -> None:
    ours, theirs = our_draws(build(name), 6000), timm_draws(name, 6000)
    assert_same_frequencies(Counter(map(len, ours)), Counter(map(len, theirs)))
    assert_same_frequencies(
        Counter(code for steps in ours for code, _ in steps), Counter(code for steps in theirs for code, _ in steps)
    )
    pairs = [Counter(tuple(code for code, _ in steps[:2]) for steps in draws) for draws in (ours, theirs)]
    assert_same_frequencies(*pairs)
    our_values, their_values = values_of(ours), values_of(theirs)
    for code, values in our_values.items():
        if len(set(values)) > 30:
            assert kstest(values, their_values[code]).pvalue > 1e-3, code
        assert_same_frequencies(Counter(np.round(values, 1)), Counter(np.round(their_values[code], 1)))


@pytest.mark.parametrize("direction", ["", "-inc1", "-t3a", "-t3aw", "-tweights"])
@pytest.mark.parametrize("magnitude", ["m0", "m3", "m9", "m10", "m12-mmax20", "m15-mmax30"])
def test_rand_augment_values_equal_timm_in_closed_form(magnitude: str, direction: str, global_generators: None) -> None:
    """Without noise an operation has one value, or one for each sign; all of them are met in this many draws."""
    name = f"rand-{magnitude}-p1-n9{direction}" if direction != "-t3a" else f"rand-{magnitude}-p1{direction}"
    ours = {step for steps in our_draws(build(name), 1500) for step in steps}
    theirs = {step for steps in timm_draws(name, 1500) for step in steps}
    assert sorted(code for code, _ in ours) == sorted(code for code, _ in theirs)
    np.testing.assert_allclose(sorted(ours), sorted(theirs), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "name",
    ["rand", "randaugment", "augmix-m3", "rand-m9-mstd", "rand-m9-tfoo", "rand-mm9", "rand-m9_inc1", "rand-p1.5", ""],
)
def test_rand_augment_that_timm_would_not_read_raises(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"augment\.rand_augment must be .* got .*Write it like rand-m9-mstd0\.5-inc1"
    ):
        build(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rand-m15-n2-p1.0", "of at most 10, .*got 'rand-m15-n2-p1.0'. Write m15-mmax30 there, or m10"),
        ("rand-m9-mmax8", "of at most 8, .*got 'rand-m9-mmax8'"),
        ("rand-m40-mmax30", "of at most 30, .* Write m40-mmax40 there, or m30"),
    ],
)
def test_magnitude_that_timm_would_cut_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"augment\.rand_augment must be a magnitude {message}"):
        build(name)


@pytest.mark.parametrize("name", ["vit_b", "vit_l"])
def test_yaml_of_augreg_rotates_by_half_as_much_again_as_that_of_vit_s(name: str) -> None:
    """Medium2 of AugReg (arXiv:2106.10270) has magnitude 15 where light2 has 10: 45 degrees, not 30."""
    angles = {}
    for yaml in ("vit_s", name):
        rand_augment = config.load(ROOT / f"yamls/{yaml}.yaml").augment.rand_augment
        angles[yaml] = {abs(value) for value in values_of(our_draws(build(rand_augment), 300))[ops.ROTATE]}
    assert angles == {"vit_s": {30.0}, name: {45.0}}


def test_interpolation_is_part_of_the_code() -> None:
    draw = RandAugment("rand-m9-n9-p1", image_size=SIZE, interpolation="bilinear")
    codes = {code for steps in our_draws(draw, 200) for code, _ in steps}
    assert {code for code in codes if code >= ops.ROTATE} == {c for c in ops.CODES if c >= ops.BILINEAR}


def test_three_augment_draws_each_operation_with_a_third() -> None:
    draws = [steps[0] for steps in our_draws(ThreeAugment(), 3000)]
    counts = Counter(code for code, _ in draws)
    assert chisquare([counts[code] for code in (ops.GRAYSCALE, ops.SOLARIZE, ops.GAUSSIAN_BLUR)]).pvalue > 1e-3
    assert {value for code, value in draws if code == ops.SOLARIZE} == {128.0}
    radii = [value for code, value in draws if code == ops.GAUSSIAN_BLUR]
    assert kstest(radii, "uniform", (0.1, 1.9)).pvalue > 1e-3 and sum(counts.values()) == 3000


@pytest.mark.parametrize("strengths", [(0.3, 0.3, 0.3, 0.0), (0.8, 1.4, 0.2, 0.2), (0.0, 0.4, 0.0, 0.5)])
def test_color_jitter_draws_as_torchvision(strengths: tuple[float, ...], global_generators: None) -> None:
    reference, jitter = transforms.ColorJitter(*strengths), ColorJitter(*strengths)
    codes = (ops.BRIGHTNESS, ops.CONTRAST, ops.SATURATION, ops.HUE)
    ranges = (reference.brightness, reference.contrast, reference.saturation, reference.hue)
    theirs = []
    for _ in range(3000):
        order, *factors = reference.get_params(*ranges)
        theirs.append([(codes[i], factors[i]) for i in order.tolist() if factors[i] is not None])
    ours = our_draws(jitter, 3000)
    assert_same_frequencies(*(Counter(tuple(code for code, _ in steps) for steps in d) for d in (ours, theirs)))
    their_values = values_of(theirs)
    for code, values in values_of(ours).items():
        assert kstest(values, their_values[code]).pvalue > 1e-3
        low, high = ranges[codes.index(code)]
        assert min(values) >= low and max(values) <= high
    assert all(len(steps) == jitter.length for steps in ours)


def test_color_distortion_draws_with_its_probabilities() -> None:
    draw = ColorDistortion(0.5, blur_prob=0.1, solarize_prob=0.3)
    draws = our_draws(draw, 4000)
    counts = Counter(code for steps in draws for code, _ in steps)
    chances = {ops.HUE: 0.8, ops.CONTRAST: 0.8, ops.GRAYSCALE: 0.2, ops.GAUSSIAN_BLUR: 0.1, ops.SOLARIZE: 0.3}
    for code, chance in chances.items():
        assert abs(counts[code] - 4000 * chance) < 4 * (4000 * chance * (1 - chance)) ** 0.5, code
    values = values_of(draws)
    assert kstest(values[ops.HUE], "uniform", (-0.1, 0.2)).pvalue > 1e-3
    assert kstest(values[ops.SATURATION], "uniform", (0.6, 0.8)).pvalue > 1e-3
    assert kstest(values[ops.GAUSSIAN_BLUR], "uniform", (0.1, 1.9)).pvalue > 1e-3
    assert max(map(len, draws)) <= draw.length
    after_jitter = [ops.GRAYSCALE, ops.GAUSSIAN_BLUR, ops.SOLARIZE]
    for steps in draws:
        tail = [code for code, _ in steps if code in after_jitter]
        assert tail == sorted(tail, key=after_jitter.index) == [code for code, _ in steps][len(steps) - len(tail) :]


def test_policies_flip_first_and_keep_the_order_of_the_schema() -> None:
    policies = build_policies(dataclasses.replace(DEIT, color_jitter=0.3), SIZE)
    assert [type(draw) for draw in policies.draws] == [RandAugment, ColorJitter] and policies.length == 6
    deit3 = build_policies(dataclasses.replace(DEIT, rand_augment=None, three_augment=True, color_jitter=0.3), SIZE)
    assert [type(draw) for draw in deit3.draws] == [ThreeAugment, ColorJitter] and deit3.length == 5
    flips = 0
    for seed in range(2000):
        codes, values = deit3.draw(random.Random(seed))
        assert codes.shape == values.shape == (5,) and codes.dtype == np.int8 and values.dtype == np.float32
        steps = codes[codes != ops.IDENTITY].tolist()
        flips += steps[0] == ops.FLIP
        assert ops.FLIP not in steps[1:] and len(steps) == 4 + (steps[0] == ops.FLIP)
    assert abs(flips - 1000) < 90
    assert policies.fill.tolist() == [124, 116, 104]
    without = build_policies(dataclasses.replace(DEIT, rand_augment=None, flip_prob=0.0), SIZE)
    assert without.draw(random.Random(0))[0].tolist() == [ops.IDENTITY]


def test_a_program_depends_on_its_generator_alone() -> None:
    policies = build_policies(DEIT, SIZE)
    before = random.getstate(), np.random.get_state()[1].copy()
    first = [policies.draw(random.Random(seed)) for seed in range(50)]
    assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1])
    copy = pickle.loads(pickle.dumps(policies))
    second = [copy.draw(random.Random(seed)) for seed in range(50)]
    assert all(
        np.array_equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert len({codes.tobytes() + values.tobytes() for codes, values in first}) > 30


class Reference:
    """torchvision's and timm's transforms of a Pillow image for the draws that have no class of theirs."""

    @staticmethod
    def three_augment(image: Image.Image) -> Image.Image:
        return random.choice([transforms.Grayscale(3), transforms.RandomSolarize(128, 1.0), Reference.blur])(image)

    @staticmethod
    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


REFERENCES: dict[str, tuple[list[Draw], Callable[[Image.Image], Image.Image]]] = {
    "rand_augment": ([build("rand-m9-mstd0.5-inc1")], build_timm("rand-m9-mstd0.5-inc1")),
    "three_augment": (
        [ThreeAugment(), ColorJitter(0.3, 0.3, 0.3)],
        transforms.Compose([Reference.three_augment, transforms.ColorJitter(0.3, 0.3, 0.3)]),
    ),
    "color_distortion": (
        [ColorDistortion(1.0, solarize_prob=0.2)],
        transforms.Compose(
            [
                transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
                transforms.RandomGrayscale(0.2),
                transforms.RandomApply([transforms.Lambda(Reference.blur)], 0.5),
                transforms.RandomSolarize(128, 0.2),
            ]
        ),
    ),
}


def statistics(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of every image: mean and deviation of each channel, share of each of 16 levels, mean difference to the right."""
    shares = [(images // 16 == level).mean((1, 2, 3)) for level in range(16)]
    edges = np.abs(np.diff(images.astype(np.float64), axis=2)).mean((1, 2, 3))
    return np.column_stack([images.mean((1, 2)), images.std((1, 2)), *shares, edges])


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("name", REFERENCES)
def test_images_are_distributed_as_those_of_timm_and_torchvision(
    name: str, global_generators: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, black = timm.ImageOps.posterize, Image.new("RGB", (SIZE, SIZE))  # timm draws 0 bits too: see test_ops
    monkeypatch.setattr(
        timm.ImageOps, "posterize", lambda image, bits: whole(image, bits) if bits > 0 else black.copy()
    )
    count = 2500
    draws, reference = REFERENCES[name]
    policies = Policies(0.0, draws, fill_colour(IMAGENET_MEAN))
    photo = Image.fromarray(load_sample_image("flower.jpg")).resize((SIZE, SIZE))
    theirs = np.stack([np.asarray(reference(photo)) for _ in range(count)])
    ours = np.repeat(np.asarray(photo)[None], count, axis=0)
    for seed, pixels in enumerate(ours):
        apply_program(pixels, *policies.draw(random.Random(seed)), policies.fill)
    ours, theirs = statistics(ours), statistics(theirs)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= 4 * error + 1e-12).all()
    assert (np.abs(ours.std(0) / theirs.std(0) - 1) < 0.12).all()
    assert min(kstest(a, b).pvalue for a, b in zip(ours.T, theirs.T, strict=True)) > 1e-4


def test_these_statistics_tell_apart_a_slightly_different_recipe() -> None:
    """What the test above would miss would be worth nothing: magnitude 8 instead of 9 has to fail it."""
    photo = np.asarray(Image.fromarray(load_sample_image("flower.jpg")).resize((SIZE, SIZE)))
    results = []
    for name in ("rand-m9-mstd0.5-inc1", "rand-m8-mstd0.5-inc1"):
        policies = Policies(0.0, [build(name)], fill_colour(IMAGENET_MEAN))
        images = np.repeat(photo[None], 2500, axis=0)
        for seed, pixels in enumerate(images):
            apply_program(pixels, *policies.draw(random.Random(len(results) * 2500 + seed)), policies.fill)
        results.append(statistics(images))
    assert min(kstest(a, b).pvalue for a, b in zip(results[0].T, results[1].T, strict=True)) < 1e-4
