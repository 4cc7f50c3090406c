"""The schedule of patch dropout: its plan, what a run shows the network at each step, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import run_train, tiny_photo_overrides
from tests.launch.test_launch import DEIT
from tests.training.test_train import losses, weights
from vitcomposer.cost.flops import forward_flops, train_flops
from vitcomposer.curriculum import Plan, build_plan, check_network, split_options
from vitcomposer.errors import ConfigError
from vitcomposer.models import build_model

GOOD = {"keep_rates": [0.25, 0.5, 1.0], "until": [0.3, 0.6, 1.0]}


def plan_of(steps: int, network, image_size: int = 32, **given) -> Plan:
    options, _ = split_options({"PatchDropout": {**GOOD, **given}})
    check_network(options, network, image_size=image_size, rand_augment=None)
    return build_plan(
        options,
        network,
        image_size=image_size,
        max_duration=f"{steps}ba",
        steps_per_epoch=10,
        images_per_step=8,
        train_flops=train_flops,
    )


def tiny(name: str = "deit_tiny_patch16", **options):
    return build_model(name, num_classes=3, image_size=32, patch_size=8, **{"depth": 1, **options})


def test_levels_end_at_their_share_of_the_steps():
    plan = plan_of(10, tiny())
    assert [(s.first_step, s.steps, s.num_patches_kept) for s in plan.stages] == [(0, 3, 4), (3, 3, 8), (6, 4, None)]
    assert [plan.view(step) for step in (0, 9)] == [(32, 1.0)] * 2, "the loader's images stay as they are"
    assert sum(stage.steps for stage in plan_of(997, tiny()).stages) == 997


def test_flops_of_a_level_are_those_of_the_tokens_it_keeps():
    """Published for a ViT-S at 224 px: a quarter, half, three quarters of the patches cost 0.249, 0.489, 0.740."""
    network = build_model("deit_small_patch16", num_classes=1000, image_size=224)
    plan = plan_of(100, network, 224, keep_rates=[0.25, 0.5, 0.75, 1.0], until=[0.25, 0.5, 0.75, 1.0])
    shares = [stage.train_flops_per_image / plan.full_flops for stage in plan.stages]
    assert shares == pytest.approx([0.249, 0.489, 0.740, 1.0], abs=5e-3)
    assert plan.equal_compute_epochs == pytest.approx(10 * sum(shares) / 4)
    assert " 49 " in plan.table() and "all" in plan.table()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_rates": [0.5, 0.25, 1.0]}, "algorithms.PatchDropout.keep_rates must be 1 to 4 shares .*ascending"),
        ({"keep_rates": [0.0, 0.5, 1.0]}, "keep_rates must be"),
        ({"keep_rates": [0.5, 0.7, 1.5]}, "keep_rates must be"),
        ({"keep_rates": [0.1, 0.2, 0.3, 0.4, 0.5]}, "keep_rates must be 1 to 4"),
        ({"keep_rates": 0.5}, "keep_rates must be"),
        ({"until": [0.5, 1.0]}, "algorithms.PatchDropout.until must be 3 shares of the run"),
        ({"until": [0.3, 0.6, 0.9]}, "until must be .*ascending to 1"),
        ({"until": [0.6, 0.3, 1.0]}, "until must be"),
        ({"untill": [1.0]}, r"PatchDropout.untill must be one of .* Did you mean 'until'"),
    ],
)
def test_bad_patch_dropout_is_refused_with_its_key(given, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(10, tiny(), **given)


@pytest.mark.parametrize("name", ["convit_tiny", "mean_color"])
def test_networks_that_cannot_drop_patches_are_refused_with_the_reason(name):
    network = build_model(name, num_classes=3, image_size=32)
    with pytest.raises(ConfigError, match=r"algorithms.PatchDropout must be left out where .* Use algorithms.Curr"):
        plan_of(10, network)


def test_a_run_too_short_for_its_levels_is_refused():
    with pytest.raises(ConfigError, match="max_duration must be long enough for a step of each of the 3 stages"):
        plan_of(10, tiny(), until=[0.01, 0.6, 1.0])


BLOCK = "algorithms.PatchDropout={keep_rates: [0.25, 0.5, 1.0], until: [0.3, 0.6, 1.0]}"


def synthetic(folder: Path) -> list[str]:
    data = ["data.local=null", "data.source=synthetic", "data.synthetic_samples=100", "max_duration=12ba"]
    saved = ["run.save_interval=1ba", "run.keep_checkpoints=20"]
    return [DEIT, *tiny_photo_overrides(Path("unused"), folder, "run"), *data, *saved, BLOCK]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("patches")
    assert run_train(synthetic(folder)) == 0
    return folder / "run"


def test_run_shows_the_planned_patches_and_counts_their_flops(unbroken):
    rows = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    kept = [row.get("patch_dropout/patches") for row in rows]
    assert kept == [4] * 4 + [8] * 3 + [None] * 5
    network = build_model("deit_tiny_patch16", num_classes=8, image_size=32, patch_size=8, depth=2)
    flops = [forward_flops(network, 32, patch_keep_rate=(k or 16) / 16) for k in kept]
    assert json.loads((unbroken / "summary.json").read_text())["train_flops"] == 3 * 16 * sum(flops)


@pytest.mark.parametrize("step", [2, 7])
def test_resumed_run_drops_the_same_patches(unbroken, tmp_path, step):
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    latest = tmp_path / "run/checkpoints/latest-rank0.pt"
    latest.unlink()
    (checkpoint,) = latest.parent.glob(f"ep*-ba{step}-rank0.pt")
    latest.symlink_to(checkpoint.name)
    assert run_train(synthetic(tmp_path)) == 0
    assert losses(tmp_path / "run") == losses(unbroken)
    theirs = weights(unbroken)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(tmp_path / "run").items())
