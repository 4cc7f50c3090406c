"""One run and another: the same seed, other workers, a kill and a resume, a signal, a finished run started again."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

from recipes import RECIPES
from tests.conftest import ROOT, run_train, tiny_photo_overrides
from vitcomposer import config
from vitcomposer.training.fit import fit

DEIT = str(ROOT / "yamls/deit_ti.yaml")
STEPS = 24  # two epochs of 192 photographs, 16 a batch


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss/train/total"] for row in rows if "loss/train/total" in row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    # Our own checkpoint, just written by this test: Composer's format needs full unpickling.
    state = torch.load(run / "checkpoints/latest-rank0.pt", map_location="cpu", weights_only=False)["state"]
    return state["model"]


@pytest.fixture(scope="module")
def reference(photo_mds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert run_train([DEIT, *tiny_photo_overrides(photo_mds, folder, "reference")]) == 0
    return folder / "reference"


def test_run_folder_tells_the_whole_story(reference: Path) -> None:
    summary = json.loads((reference / "summary.json").read_text())
    expected = "recipe model top1 top5 loss epochs steps images_seen seconds images_per_sec data_wait_fraction"
    expected += " train_flops mfu peak_memory_bytes world_size device seed git_commit"
    assert set(expected.split()) <= summary.keys()
    assert summary["recipe"] == "supervised" and summary["model"] == "deit_tiny_patch16" and summary["seed"] == 0
    assert summary["steps"] == STEPS and summary["images_seen"] == STEPS * 16 and summary["epochs"] == 2
    assert summary["device"] == "cpu" and summary["mfu"] is None and summary["world_size"] == 1
    assert summary["images_per_sec"] > 0 and 0 <= summary["data_wait_fraction"] <= 1
    assert summary["lr_peak"] == pytest.approx(5e-4 * 16 / 512)
    assert summary["top1"] is not None and summary["top1_ema"] is not None
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "report.html"):
        assert (reference / name).stat().st_size > 0
    assert len(losses(reference)) == STEPS


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_same_seed_gives_identical_losses_with_any_number_of_workers(
    reference: Path, photo_mds: Path, tmp_path: Path, workers: int
) -> None:
    overrides = [*tiny_photo_overrides(photo_mds, tmp_path, "again"), f"data.num_workers={workers}"]
    assert run_train([DEIT, *overrides]) == 0
    assert losses(tmp_path / "again") == losses(reference)


def test_run_that_is_over_leaves_nothing_in_memory(photo_mds: Path, tmp_path: Path) -> None:
    """Of several in one process, such as a search over settings."""
    cfg = config.load(DEIT, [*tiny_photo_overrides(photo_mds, tmp_path, "gone"), "max_duration=2ba"])
    trainer = RECIPES[cfg.recipe].build(cfg)
    model, optimizer = (weakref.ref(part) for part in (trainer.state.model, trainer.state.optimizers[0]))
    assert fit(trainer, cfg) == 0
    del trainer
    gc.collect()
    assert model() is None and optimizer() is None


@pytest.mark.parametrize("chosen", [True, False])
def test_deterministic_run_allows_torch_no_other_algorithms(chosen: bool, photo_mds: Path, tmp_path: Path) -> None:
    cfg = config.load(DEIT, [*tiny_photo_overrides(photo_mds, tmp_path, "run"), f"run.deterministic={chosen}"])
    try:
        RECIPES[cfg.recipe].build(cfg).close()
        assert torch.are_deterministic_algorithms_enabled() is chosen
    finally:
        torch.use_deterministic_algorithms(False)


def test_another_seed_gives_other_losses(reference: Path, photo_mds: Path, tmp_path: Path) -> None:
    assert run_train([DEIT, *tiny_photo_overrides(photo_mds, tmp_path, "other"), "seed=1"]) == 0
    assert losses(tmp_path / "other") != losses(reference)


def test_microbatches_give_the_losses_of_the_whole_batch(reference: Path, photo_mds: Path, tmp_path: Path) -> None:
    overrides = [*tiny_photo_overrides(photo_mds, tmp_path, "micro"), "run.device_train_microbatch_size=4"]
    assert run_train([DEIT, *overrides, "model.drop_path_rate=0"]) == 0
    whole = [*tiny_photo_overrides(photo_mds, tmp_path, "whole"), "model.drop_path_rate=0"]
    assert run_train([DEIT, *whole]) == 0
    assert losses(tmp_path / "micro") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


@pytest.mark.parametrize("stop", ["kill", "term"])
def test_interrupted_run_goes_on_as_if_nothing_had_happened(
    reference: Path, photo_mds: Path, tmp_path: Path, stop: str
) -> None:
    overrides = [*tiny_photo_overrides(photo_mds, tmp_path, "resumed"), "run.save_interval=5ba"]
    command = [sys.executable, "train.py", DEIT, *overrides]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    run = tmp_path / "resumed"
    wait_for_step(run, 8, process)
    process.send_signal(signal.SIGKILL if stop == "kill" else signal.SIGTERM)
    status = process.wait(timeout=60)
    assert status == (-signal.SIGKILL if stop == "kill" else 143)
    assert len(losses(run)) < STEPS, "the run was over before it could be stopped"
    assert run_train([DEIT, *overrides]) == 0
    assert losses(run) == losses(reference)
    theirs = weights(reference)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, theirs[name]), name


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        assert process.poll() is None, "the run ended early"
        time.sleep(0.01)
    raise AssertionError(f"step {step} not reached in two minutes")


def test_finished_run_started_again_says_so_and_trains_nothing(
    reference: Path, photo_mds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (reference / "metrics.jsonl").read_text()
    assert run_train([DEIT, *tiny_photo_overrides(photo_mds, reference.parent, "reference")]) == 0
    assert "already done" in capsys.readouterr().out
    assert (reference / "metrics.jsonl").read_text() == before


def test_other_configuration_in_the_same_folder_is_refused(
    reference: Path, photo_mds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*tiny_photo_overrides(photo_mds, reference.parent, "reference"), "optimizer.weight_decay=0.1"]
    assert run_train([DEIT, *overrides]) == 2
    error = capsys.readouterr().err
    assert "optimizer.weight_decay must be 0.05" in error and "run.name" in error
