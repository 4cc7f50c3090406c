"""The plan of the steps, the loader that follows it, and runs of train.py on growing images."""

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Time
from torch import nn
from torch.utils.data import DataLoader

from tests.conftest import ROOT
from tests.data.mds.test_stream import end_workers, load, open_stream, write_split
from vitcomposer import config
from vitcomposer.algorithms import build_algorithms
from vitcomposer.cost.flops import train_flops
from vitcomposer.curriculum import Curriculum, Plan, build_plan, check_network, split_options
from vitcomposer.data.augment import programs as ops
from vitcomposer.data.augment.policies import RandAugment
from vitcomposer.data.batch import ERASE_BOX, MIX_BOX
from vitcomposer.data.collate import TrainCollate
from vitcomposer.data.synthetic import SyntheticImages
from vitcomposer.errors import ConfigError
from vitcomposer.models import build_model
from vitcomposer.optim import CosineWithWarmup
from vitcomposer.schema import Augment, Mixing, Schedule

SIZES, SHARES = [16, 24, 32, 48], [0.1, 0.2, 0.3, 0.4]
FLOPS = {96: 0.176, 160: 0.493, 192: 0.721, 224: 1.0}  # of a DeiT-S, relative


@pytest.fixture(autouse=True)
def workers_ended():
    yield
    end_workers()


def plan_of(steps: int, sizes=SIZES, shares=SHARES, flops=lambda size: size**2, **options) -> Plan:
    return build_plan(
        Curriculum(image_sizes=sizes, compute=shares, **options),
        nn.Identity(),
        image_size=sizes[-1],
        max_duration=f"{steps}ba",
        steps_per_epoch=10,
        images_per_step=8,
        train_flops=lambda network, size: 3 * flops(size),
    )


# The plan


def test_published_schedule_has_the_accounting_of_its_paper():
    """EfficientTrain++ on DeiT-S for the compute of 200 epochs shows 469 epochs of images."""
    shares = [0.2, 0.4, 0.2, 0.2]
    plan = build_plan(
        Curriculum(image_sizes=list(FLOPS), compute=shares),
        nn.Identity(),
        image_size=224,
        max_duration="469ep",
        steps_per_epoch=1251,
        images_per_step=1024,
        train_flops=lambda network, size: 3 * FLOPS[size],
    )
    assert plan.epochs == 469
    assert plan.equal_compute_epochs == pytest.approx(469 / (0.2 / 0.176 + 0.4 / 0.493 + 0.2 / 0.721 + 0.2), rel=1e-5)
    assert plan.equal_compute_epochs == pytest.approx(195, rel=0.01)
    spent = [stage.steps * stage.train_flops_per_image for stage in plan.stages]
    assert [s / sum(spent) for s in spent] == pytest.approx(shares, abs=1e-5)


def test_published_schedule_with_the_flops_of_our_network():
    network = build_model("deit_small_patch16", num_classes=1000, image_size=224)
    plan = build_plan(
        Curriculum(image_sizes=[96, 160, 192, 224], compute=[0.2, 0.4, 0.2, 0.2]),
        network,
        image_size=224,
        max_duration="469ep",
        steps_per_epoch=1251,
        images_per_step=1024,
        train_flops=train_flops,
    )
    ratios = [stage.train_flops_per_image / plan.full_flops for stage in plan.stages]
    assert ratios == pytest.approx(list(FLOPS.values()), abs=6e-4)
    assert plan.equal_compute_epochs == pytest.approx(193.4, abs=0.3)
    assert plan.full_flops == pytest.approx(27.6e9, rel=0.01)


@pytest.mark.parametrize("steps", [4, 7, 97, 12345])
def test_stages_follow_one_another_and_use_every_step(steps):
    plan = plan_of(steps, SIZES, [0.05, 0.15, 0.3, 0.5])
    assert sum(stage.steps for stage in plan.stages) == plan.steps == steps
    ends = list(itertools.accumulate(stage.steps for stage in plan.stages))
    assert [stage.first_step for stage in plan.stages] == [0, *ends[:-1]]
    expected = [stage.image_size for stage in plan.stages for _ in range(stage.steps)]
    assert [plan.stage_of(step).image_size for step in range(steps)] == expected
    assert plan.stage_of(steps).image_size == SIZES[-1], "asked for after the last step"
    assert [plan.train_flops_per_image(step) for step in range(steps)] == [3 * size**2 for size in expected]
    weights = [share / size**2 for share, size in zip([0.05, 0.15, 0.3, 0.5], SIZES, strict=True)]
    for stage, weight in zip(plan.stages, weights, strict=True):
        assert abs(stage.steps - steps * weight / sum(weights)) < 1


def test_rand_augment_rises_by_the_share_of_the_compute():
    plan = plan_of(25, [16, 32], [0.5, 0.5], rand_augment_from=0.2, rand_augment_levels=5)
    assert [stage.steps for stage in plan.stages] == [20, 5]
    expected = [0.2] * 8 + [0.4] * 8 + [0.6] * 5 + [0.8] * 2 + [1.0] * 2
    assert [plan.rand_augment(step) for step in range(25)] == pytest.approx(expected)
    assert plan.rand_augment(25) == 1.0, "asked for after the last step"
    assert {plan_of(21).rand_augment(step) for step in range(22)} == {1.0}


def test_share_of_the_compute_is_that_of_the_flops_before_a_step():
    plan = plan_of(30)
    costs = [plan.train_flops_per_image(step) for step in range(30)]
    shares = [sum(costs[:step]) / sum(costs) for step in range(31)]
    assert [plan.compute_share(step) for step in range(31)] == pytest.approx(shares, rel=1e-12)
    assert plan.compute_share(7.5) == pytest.approx((shares[7] + shares[8]) / 2)
    assert plan.compute_share(40) == 1.0


# What each tenth of the compute begins with in the study (LeapLabTHU/EfficientTrain, _ET_pp_main_deitS.py: pixels,
# rand-m{index}-mstd0.5-inc1 and a warm-up over 0.2 of the run; utils.py: a cosine after it, to 1e-6 of 4e-3).
STUDY = [
    *((96, 0, 0.0), (96, 1, 0.5)),
    *((160, 2, 1.0), (160, 3, 0.96194), (160, 4, 0.85359), (160, 5, 0.69143)),
    *((192, 6, 0.50013), (192, 7, 0.30883)),
    *((224, 8, 0.14666), (224, 9, 0.03830)),
]


@pytest.mark.parametrize(("name", "epochs", "drop_path"), [("vit_s_medium", 200, 0.1), ("vit_s_hot", 300, 0.15)])
def test_yaml_has_the_size_strength_and_learning_rate_of_the_study_at_each_tenth_of_the_compute(
    name, epochs, drop_path
):
    cfg = config.load(ROOT / f"yamls/{name}.yaml")
    pixels = sum((224 / size) ** 2 for size, _, _ in STUDY) / 10
    assert cfg.max_duration == f"{epochs * pixels:.0f}ep" and cfg.model.drop_path_rate == drop_path
    options, _ = split_options(cfg.algorithms)
    steps_per_epoch = 1_281_167 // cfg.global_train_batch_size
    plan = build_plan(
        options,
        build_model("deit_small_patch16", num_classes=1000, image_size=224),
        image_size=224,
        max_duration=cfg.max_duration,
        steps_per_epoch=steps_per_epoch,
        images_per_step=cfg.global_train_batch_size,
        train_flops=train_flops,
    )
    begins = [next(step for step in range(plan.steps) if plan.compute_share(step + 0.5) >= i / 10) for i in range(10)]
    sizes = [plan.stage_of(step).image_size for step in begins]
    magnitudes = [9 * plan.rand_augment(step) for step in begins]
    lrs = [learning_rate(cfg.schedule, plan, steps_per_epoch, step) for step in begins]
    assert list(zip(sizes, map(round, magnitudes), strict=True)) == [(size, m) for size, m, _ in STUDY]
    assert magnitudes == pytest.approx([m for _, m, _ in STUDY]) and cfg.augment.rand_augment == "rand-m9-mstd0.5-inc1"
    assert lrs == pytest.approx([lr for _, _, lr in STUDY], abs=1e-4)
    last = learning_rate(cfg.schedule, plan, steps_per_epoch, plan.steps)
    assert last * cfg.optimizer.peak_lr(cfg.global_train_batch_size) == pytest.approx(1e-6)


def learning_rate(schedule: Schedule, plan: Plan, steps_per_epoch: int, step: int) -> float:
    """The factor of the peak that the Trainer trains a step at."""
    factor = CosineWithWarmup(
        schedule.t_warmup,
        alpha_i=schedule.alpha_i,
        alpha_f=schedule.alpha_f,
        cosine_from=schedule.cosine_from,
        global_train_batch_size=plan.images_per_step,
        compute_share=plan.compute_share if schedule.progress == "compute" else None,
    )
    state: Any = SimpleNamespace(
        max_duration=Time(plan.steps, "ba"),
        dataloader_len=steps_per_epoch,
        timestamp=SimpleNamespace(batch=step),
        schedulers=[],
    )
    return factor(state)


@pytest.mark.parametrize(("duration", "steps"), [("3ep", 30), ("17ba", 17), ("33sp", 5), ("1e2ba", 100)])
def test_duration_keeps_the_meaning_it_has_for_composer(duration, steps):
    plan = build_plan(
        None,
        nn.Identity(),
        image_size=32,
        max_duration=duration,
        steps_per_epoch=10,
        images_per_step=8,
        train_flops=lambda network, size: 15,
    )
    assert (plan.steps, len(plan.stages), plan.train_flops_per_image(0), plan.view(3)) == (steps, 1, 15, (32, 1.0))
    assert plan.equal_compute_epochs == plan.epochs


def test_table_states_images_and_flops_of_each_stage():
    lines = plan_of(20, [16, 32], [0.5, 0.5]).table().splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["16", "all", "0", "16", "1.60", "128", "0.0000", "9.8304e+04", "50.00%"]
    assert lines[2].split()[:6] == ["32", "all", "16", "4", "0.40", "32"]
    assert "2.00 epochs of images for the training FLOPs of 0.80 at full size: 2.50x cheaper" in lines[3]


# What a user gets wrong

GOOD = {"image_sizes": [16, 24, 32], "compute": [0.3, 0.3, 0.4]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_sizes": [32]}, r"algorithms.Curriculum.image_sizes must be 2 to 4 whole .*ascending, got \[32\]"),
        ({"image_sizes": [8, 16, 24, 32, 40]}, "image_sizes must be 2 to 4"),
        ({"image_sizes": [24, 16, 32]}, "image_sizes must be .*ascending"),
        ({"image_sizes": [16, 16, 32]}, "image_sizes must be .*ascending"),
        ({"image_sizes": [16.5, 24, 32]}, "image_sizes must be .*whole"),
        ({"image_sizes": [0, 16, 32]}, "image_sizes must be"),
        ({"image_sizes": "32"}, "image_sizes must be"),
        ({"image_sizes": [16, 24, 48]}, r"image_sizes must be ending at model.image_size=32, got .* End it with 32"),
        ({"image_sizes": [12, 24, 32]}, r"image_sizes must be multiples of the patch of 8 .* Use \[16, 24, 32\]"),
        ({"compute": [0.5, 0.5]}, "algorithms.Curriculum.compute must be 3 shares"),
        ({"compute": [0.5, 0.5, 0.0]}, "compute must be 3 shares above 0"),
        ({"compute": [0.5, 0.5, 0.5]}, "compute must be .* whose sum is 1"),
        ({"compute": None}, "compute must be 3 shares"),
        ({"rand_augment_from": 1.5}, r"algorithms.Curriculum.rand_augment_from must be in \[0, 1\], got 1.5"),
        ({"rand_augment_from": 0.0}, "rand_augment_from must be 1 unless augment.rand_augment is .* inc1"),
        ({"rand_augment_levels": 1}, "algorithms.Curriculum.rand_augment_levels must be a whole number above 1, got 1"),
        ({"image_size": 3}, r"algorithms.Curriculum.image_size must be one of .* Did you mean 'image_sizes'"),
    ],
)
def test_bad_curriculum_is_refused_with_its_key(given, message):
    network = build_model("deit_tiny_patch16", num_classes=3, image_size=32, patch_size=8, depth=1)
    with pytest.raises(ConfigError, match=message):
        options, _ = split_options({"Curriculum": {**GOOD, **given}})
        check_network(options, network, image_size=32, rand_augment="rand-m9-mstd0.5")


def test_a_curriculum_that_fits_is_taken_by_every_network():
    for name in ("deit_tiny_patch16", "convit_tiny"):
        network = build_model(name, num_classes=3, image_size=32, patch_size=8)
        options, others = split_options({"EMA": {}, "Curriculum": {**GOOD, "rand_augment_from": 0.5}})
        check_network(options, network, image_size=32, rand_augment="rand-m9-mstd0.5-inc1")
        assert list(others) == ["EMA"]
    options, _ = split_options({"Curriculum": {"image_sizes": [17, 32], "compute": [0.5, 0.5]}})
    check_network(options, build_model("mean_color", num_classes=3, image_size=32), image_size=32, rand_augment=None)


def test_missing_arguments_and_two_ways_of_saving_are_refused():
    with pytest.raises(ConfigError, match=r"algorithms.Curriculum.compute must be given"):
        split_options({"Curriculum": {"image_sizes": [16, 32]}})
    both = {"Curriculum": GOOD, "PatchDropout": {"keep_rates": [1.0], "until": [1.0]}}
    with pytest.raises(ConfigError, match=r"algorithms.PatchDropout must be left out with algorithms.Curriculum"):
        split_options(both)
    with pytest.raises(ConfigError, match=r"algorithms.Curriculum must be left out of this recipe"):
        build_algorithms({"Curriculum": GOOD}, loss="soft_target_cross_entropy", precision="fp32", label_smoothing=0.0)


def test_a_run_too_short_for_its_stages_is_refused():
    with pytest.raises(ConfigError, match=r"max_duration must be long enough for a step of each of the 4 stages"):
        plan_of(4, shares=[0.01, 0.01, 0.01, 0.97])


# The loader

AUGMENT = Augment(
    crop_scale=(0.3, 1.0),
    interpolation="bilinear",
    flip_prob=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    three_augment=False,
    color_jitter=0.0,
    random_erasing=1.0,
    repeated_augmentation=1,
)
MIXING = Mixing(mixup_alpha=0.0, cutmix_alpha=1.0, prob=1.0, switch_prob=1.0, mode="elem", label_smoothing=0.1)


def steps_of(loader: DataLoader) -> list[int]:
    steps = []
    for batch in loader:
        (step,) = {sample["step"] for sample in batch}
        steps.append(step)
    return steps


@pytest.fixture(scope="module")
def stream_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    write_split(root / "train", 62)
    return root


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("seen", [0, 4, 28, 56, 60])
def test_samples_know_their_step_after_a_resume_at_any_batch(stream_root, workers, seen):
    stream = open_stream(stream_root)
    state = stream.state_dict(0, True)
    stream.load_state_dict({**state, "epoch": 3, "sample_in_epoch": seen})
    loader = load(stream, workers)
    assert len(loader) == 15
    assert steps_of(loader) == list(range(3 * 15 + seen // 4, 4 * 15))
    assert steps_of(loader) == list(range(4 * 15, 5 * 15))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_synthetic_samples_know_their_step_on_every_rank(monkeypatch, workers, ranks):
    for rank in range(ranks):
        for name, value in {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        images = SyntheticImages(num_samples=61, num_classes=3, batch_size=8 // ranks, shuffle=True, seed=0)
        loader = load(images, workers)
        assert [steps_of(loader) for _ in range(2)] == [list(range(7)), list(range(7, 14))]
        end_workers()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_has_the_size_and_boxes_of_its_step(workers):
    plan = plan_of(14, rand_augment_from=0.0)
    collate = TrainCollate(AUGMENT, MIXING, image_size=48, num_classes=3, seed=0)
    collate.view = plan.view
    images = SyntheticImages(num_samples=63, num_classes=3, batch_size=8, shuffle=True, seed=0)
    loader = DataLoader(images, batch_size=8, collate_fn=collate, drop_last=True, num_workers=workers)
    batches = [batch for _ in range(2) for batch in loader] if workers == 0 else list(loader)
    for step, batch in enumerate(batches):
        size = plan.stage_of(step).image_size
        assert batch["image"].shape == (8, 3, size, size)
        for boxes in (batch[ERASE_BOX], batch[MIX_BOX]):
            assert ((boxes[:, :2] + boxes[:, 2:]) <= size).all()
            assert boxes.max() > size // 4


def test_pixels_of_a_step_are_those_of_a_loader_at_its_size():
    """A collate made for the size gives the same bytes: nothing else depends on the stage."""
    plan = plan_of(14)
    growing = TrainCollate(AUGMENT, MIXING, image_size=48, num_classes=3, seed=0)
    growing.view = plan.view
    samples = list(SyntheticImages(num_samples=63, num_classes=3, batch_size=8, shuffle=True, seed=0))
    for step in (0, 6):
        size = plan.stage_of(step).image_size
        fixed = TrainCollate(AUGMENT, MIXING, image_size=size, num_classes=3, seed=0)
        ours, theirs = (collate(samples[8 * step : 8 * step + 8]) for collate in (growing, fixed))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_strength_scales_the_magnitude_that_is_drawn():
    def rotations(strength: float) -> list[float]:
        policy = RandAugment("rand-m9-inc1-n1-p1", image_size=32, interpolation="bilinear", strength=strength)
        steps = [policy.draw(random.Random(seed))[0] for seed in range(300)]
        return [value for code, value in steps if code == ops.ROTATE + ops.BILINEAR]

    assert len(rotations(1.0)) > 5
    assert {abs(value) for value in rotations(1.0)} == {27.0}
    assert [abs(value) for value in rotations(0.5)] == pytest.approx([13.5] * len(rotations(1.0)))
    assert {abs(value) for value in rotations(0.0)} == {0.0}
