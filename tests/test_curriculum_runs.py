"""Runs of train.py on growing images: sizes, FLOPs, resuming, two ranks."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import error_of, run_train, tiny_photo_overrides
from tests.launch.test_launch import BIN, DEIT, launch
from tests.test_curriculum import SHARES, SIZES
from tests.training.test_train import losses, weights
from vitcomposer.cli import main
from vitcomposer.cost.flops import forward_flops
from vitcomposer.models import build_model
from vitcomposer.optim import cosine_with_warmup
from vitcomposer.runs.identity import read_identity, write_identity

# Runs

SCHEDULE = ["schedule.t_warmup=0.2dur", "schedule.alpha_i=0", "schedule.alpha_f=0.01", "schedule.cosine_from=warmup"]
RUN = [
    *SCHEDULE,
    "schedule.progress=compute",
    "max_duration=2ep",
    "model.image_size=48",
    "run.save_interval=1ba",
    "run.keep_checkpoints=20",
]
BLOCK = f"algorithms.Curriculum={{image_sizes: {SIZES}, compute: {SHARES}, rand_augment_from: 0.0}}"


def synthetic(folder: Path, *overrides: str) -> list[str]:
    """Six steps an epoch."""
    tiny = tiny_photo_overrides(Path("unused"), folder, "run")
    return [DEIT, *tiny, "data.local=null", "data.source=synthetic", "data.synthetic_samples=100", *RUN, *overrides]


def factor(share: float) -> float:
    return cosine_with_warmup(share, 1.0, 0.2, alpha_i=0.0, alpha_f=0.01, cosine_from="warmup")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curriculum")
    assert run_train(synthetic(folder, BLOCK)) == 0
    return folder / "run"


def test_run_visits_the_four_sizes_and_counts_their_flops(unbroken):
    network = build_model("deit_tiny_patch16", num_classes=8, image_size=48, patch_size=8, depth=2)
    flops = {size: 3 * forward_flops(network, size) for size in SIZES}
    weights = [share / flops[size] for size, share in zip(SIZES, SHARES, strict=True)]
    rows = lines(unbroken)
    sizes = [row["curriculum/image_size"] for row in rows]
    assert sorted(set(sizes)) == SIZES and sizes == sorted(sizes) and len(sizes) == 12
    for size, weight in zip(SIZES, weights, strict=True):
        assert abs(sizes.count(size) - 12 * weight / sum(weights)) < 1
    costs = [flops[size] for size in sizes]
    shares = [sum(costs[:step]) / sum(costs) for step in range(13)]
    levels = [int(5 * (low + high)) for low, high in itertools.pairwise(shares)]  # ten levels, by the middle of a step
    assert [row["curriculum/rand_augment"] for row in rows] == pytest.approx([level / 9 for level in levels])
    lrs = [row["lr"] for row in rows]
    peak, shape = max(lrs) / max(factor(share) for share in shares[:12]), [factor(share) for share in shares[:12]]
    assert lrs == pytest.approx([peak * value for value in shape], rel=1e-9)
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["train_flops"] == 16 * sum(flops[size] for size in sizes)
    assert summary["finished"] and summary["top1"] is not None


@pytest.mark.parametrize(("step", "workers"), [("boundary", 0), (6, 0), (8, 2)])
def test_resumed_run_goes_on_bitwise(unbroken, tmp_path, step, workers):
    """At a change of the size, between the epochs, and within one on other workers."""
    if step == "boundary":
        sizes = [row["curriculum/image_size"] for row in lines(unbroken)]
        step = sizes.index(SIZES[1])
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    latest = tmp_path / "run/checkpoints/latest-rank0.pt"
    latest.unlink()
    (checkpoint,) = latest.parent.glob(f"ep*-ba{step}-rank0.pt")
    latest.symlink_to(checkpoint.name)
    assert run_train(synthetic(tmp_path, BLOCK, f"data.num_workers={workers}")) == 0
    assert losses(tmp_path / "run") == losses(unbroken)
    assert [row["step"] for row in lines(tmp_path / "run")] == list(range(1, 13))
    theirs = weights(unbroken)
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, theirs[name]), name
    ours, reference = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", unbroken))
    assert ours["train_flops"] == reference["train_flops"]


def test_a_resumed_run_with_epochs_of_another_length_is_refused(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run/identity.json").unlink()  # as in a run of an older version
    with pytest.raises(ValueError, match="data must give .* 6 steps before epoch 1, got 5 steps an epoch"):
        run_train(synthetic(tmp_path, BLOCK, "max_duration=3ep", "data.synthetic_samples=80"))


@pytest.fixture(scope="module")
def small_mds(photo_folder, tmp_path_factory) -> Path:
    """With images of a shorter side of 40 pixels beside those of 80 to 140: for views of at most 24."""
    out = tmp_path_factory.mktemp("small") / "mds"
    assert main(["convert", "folder", str(photo_folder), str(out), "--workers", "1", "--raw-below", "40"]) == 0
    return out


TWO = "algorithms.Curriculum={image_sizes: [24, 48], compute: [0.2, 0.8]}"


def staged(mds: Path, folder: Path, *overrides: str) -> list[str]:
    return [DEIT, *tiny_photo_overrides(mds, folder, "run"), *RUN, TWO, "max_duration=8ba", *overrides]


def test_a_stage_reads_the_small_column_and_resumes_bitwise_over_its_end(small_mds, tmp_path, capsys):
    assert run_train(staged(small_mds, tmp_path / "a")) == 0
    unbroken = tmp_path / "a/run"
    said = "crops are cut from image_small (shorter side 40) at 24 px, where "
    assert said in (printed := capsys.readouterr().out) and "% are enlarged; from image at 48 px" in printed
    boundary = [row["curriculum/image_size"] for row in lines(unbroken)].index(48)
    assert 1 < boundary < 7
    assert json.loads((unbroken / "identity.json").read_text())["images"]["train"]["image_small"] == 24
    for step in (boundary - 1, boundary):  # the one before reads two columns after the resume
        shutil.copytree(unbroken, tmp_path / f"b{step}/run")
        again = tmp_path / f"b{step}/run"
        (again / "summary.json").unlink()
        (again / "checkpoints/latest-rank0.pt").unlink()
        (checkpoint,) = (again / "checkpoints").glob(f"ep*-ba{step}-rank0.pt")
        (again / "checkpoints/latest-rank0.pt").symlink_to(checkpoint.name)
        assert run_train(staged(small_mds, tmp_path / f"b{step}", "data.num_workers=2")) == 0
        assert losses(again) == losses(unbroken)
        theirs = weights(unbroken)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(again).items())
    capsys.readouterr()
    # Without the column the first stage sees other pixels.
    assert run_train(staged(small_mds, tmp_path / "c", "augment.low_resolution_stages=false")) == 0
    assert losses(tmp_path / "c/run")[0] != losses(unbroken)[0]
    assert "image_small" not in capsys.readouterr().out


def test_a_run_that_began_with_another_rule_for_the_column_is_refused(small_mds, tmp_path, capsys):
    assert run_train(staged(small_mds, tmp_path)) == 0
    path = tmp_path / "run/identity.json"
    content = read_identity(tmp_path / "run")
    assert content is not None
    content["images"]["train"]["image_small"] = 20
    write_identity(path.parent, content)
    assert run_train(staged(small_mds, tmp_path, "max_duration=9ba")) == 2
    error = error_of(capsys.readouterr().err)
    assert "augment.low_resolution_stages" in error and "20 pixels cut from image_small, got" in error


def test_bad_curriculum_stops_train_before_the_first_batch(tmp_path, capsys):
    assert run_train(synthetic(tmp_path, "algorithms.Curriculum={image_sizes: [16, 48], compute: [0.5, 0.6]}")) == 2
    assert "algorithms.Curriculum.compute must be 2 shares" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_see_the_planned_sizes_before_and_after_a_resume(photo_mds, tmp_path):
    """The algorithm compares every batch with the plan on each rank; the plan grows with max_duration."""
    tiny = [*tiny_photo_overrides(photo_mds, tmp_path, "run"), "run.eval_interval=9ep", "data.num_workers=1"]
    overrides = [*tiny, "model.image_size=48", BLOCK]
    for duration in ("5ba", "2ep"):
        launch([str(BIN / "composer"), "-n", "2"], ["train.py", DEIT, *overrides, f"max_duration={duration}"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == 24 and summary["finished"]
    assert len(losses(tmp_path / "run")) == 24
