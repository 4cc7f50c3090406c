"""Losses, gradients and weights that are NaN or infinite: the run stops before they do harm, or leaves the step out."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.faults.conftest import Tell
from vitcomposer.runs.metrics import read_metrics
from vitcomposer.schema import Optimizer

ATTENTION = "model.blocks.1.attn"
CLIPPING = "algorithms.GradientClipping={clipping_type: norm, clipping_threshold: 1.0}"


def overrides(runs: Path, name: str, *more: str) -> list[str]:
    """deit_ti on 8 synthetic images a step: every code path, a tenth of a second each."""
    small = ["precision=fp32", "model.num_classes=8", "model.image_size=32", "model.patch_size=8", "model.depth=2"]
    data = ["data.source=synthetic", "data.synthetic_samples=64", "data.num_workers=0", "global_train_batch_size=8"]
    run = [f"run.folder={runs}", f"run.name={name}", "run.log_interval=1ba", "run.eval_interval=100ba"]
    run += ["run.save_interval=1ba", "run.progress_bar=false", "schedule.t_warmup=1ba", "max_duration=4ba"]
    return [str(ROOT / "yamls/deit_ti.yaml"), *small, *data, *run, *more]


def faulty_run(what: str, step: int, tmp_path: Path, argv: list[str]) -> int:
    from tests.faults.faulty import run  # imports train.py, and Composer with it

    return run("never", step, 0, what, tmp_path / "time", argv)


def seconds_since(tmp_path: Path) -> float:
    return time.time() - float((tmp_path / "time").read_text())


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    (path,) = (run / "checkpoints").glob(f"ep*-ba{step}-rank0.pt")
    return torch.load(path, weights_only=False)["state"]


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def test_output_that_is_nan_names_step_module_and_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    argv = overrides(tmp_path, "nan", CLIPPING)
    assert faulty_run(f"output:{ATTENTION}", 3, tmp_path, argv) == 2
    seconds, seen = seconds_since(tmp_path), last_line(capsys.readouterr().err)
    assert "Not finite at step 4: loss nan" in seen and f"the output of {ATTENTION} (SelfAttention)" in seen
    assert f"the last checkpoint is {tmp_path}/nan/checkpoints/ep0-ba3-rank0.pt" in seen and "sample ids" in seen
    assert [line["step"] for line in read_metrics(tmp_path / "nan/metrics.jsonl")] == [1, 2, 3]
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(checkpoint(tmp_path / "nan", 3)["model"]))
    tell("A module gives NaN in one step", seen, seconds)
    # The same command, without the fault, goes on from there.
    assert faulty_run("none", 99, tmp_path, argv) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "nan/metrics.jsonl")] == [1, 2, 3, 4]


def test_gradient_that_is_nan_names_its_parameter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    weight = "model.blocks.0.mlp.fc1.weight"
    assert faulty_run(f"gradient:{weight}", 1, tmp_path, overrides(tmp_path, "grad")) == 2
    seen = last_line(capsys.readouterr().err)
    assert "Not finite at step 2: loss 2." in seen and f"the gradient of {weight}" in seen
    tell("A gradient is NaN under a finite loss", seen, seconds_since(tmp_path))


def test_step_too_long_never_saves_spoilt_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    start = time.time()
    argv = overrides(tmp_path, "long", "optimizer.name=sgd", "schedule.alpha_i=0")
    monkeypatch.setattr(Optimizer, "peak_lr", lambda *_: 3e38)  # no configuration may say so
    assert faulty_run("none", 99, tmp_path, argv) == 2
    seen = last_line(capsys.readouterr().err)
    assert "Not finite after step 2: the weights " in seen and "They are not saved" in seen
    assert "ep0-ba1-rank0.pt" in seen and len(list((tmp_path / "long/checkpoints").glob("ep*.pt"))) == 1
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(checkpoint(tmp_path / "long", 1)["model"]))
    tell("A learning rate of 3e38", seen, time.time() - start)


SKIPS = {"adamw": [CLIPPING], "sam": ["algorithms.SAM={rho: 0.05}"], "lamb": ["optimizer.name=lamb"]}


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sam", "lamb"))])
def test_step_left_out_changes_nothing_and_the_run_goes_on(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, tell: Tell
) -> None:
    argv = overrides(tmp_path, name, *SKIPS[name], "run.skip_nonfinite_steps=1", "run.keep_checkpoints=4")
    assert faulty_run(f"output:{ATTENTION}", 2, tmp_path, argv) == 0
    before, after, end = (checkpoint(tmp_path / name, step) for step in (2, 3, 4))
    for key in ("model", "optimizers"):
        pairs = list(zip(tensors(before[key]), tensors(after[key]), strict=True))
        assert len(pairs) > 30 and all(torch.equal(old, new) for old, new in pairs)
    assert not all(
        torch.equal(old, new) for old, new in zip(*map(tensors, (after["model"], end["model"])), strict=True)
    )
    lines = read_metrics(tmp_path / name / "metrics.jsonl")
    assert [line.get("skipped_steps/count") for line in lines] == [None, None, 1, None]
    (seen,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert seen == "Step 3 is left out, not finite: 1 of 1."
    tell(f"The same with run.skip_nonfinite_steps=1 ({name})", seen, seconds_since(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["swav", "dino"])
def test_step_left_out_keeps_queue_centre_and_batch_norms(method: str, tmp_path: Path) -> None:
    page = "yamls/swav_demo.yaml" if method == "swav" else "tests/self_supervised/dino_digits.yaml"
    argv = [str(ROOT / page), *overrides(tmp_path, method)[1:], "model.num_classes=0", "monitor=null"]
    argv = [each for each in argv if not each.startswith(("run.eval_interval", "model.patch_size"))]
    argv += ["run.skip_nonfinite_steps=1", "run.keep_checkpoints=4", "model.depth=1", "model.image_size=16"]
    argv += ["crops.size_crops=[16,8]", "loss.queue_length=8", "loss.queue_start_epoch=0"] if method == "swav" else []
    assert faulty_run("output:trunk.blocks.0.attn", 2, tmp_path, argv) == 0
    before, after, end = (checkpoint(tmp_path / method, step)["model"] for step in (2, 3, 4))
    averaged = ("teacher",)  # DINO's follows the student in every step, also in one that is left out
    kept = [name for name in before if not name.startswith(averaged)]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert any(not torch.equal(after[name], end[name]) for name in kept if "running_mean" in name or "queue" in name)


@pytest.mark.slow
def test_more_steps_than_may_be_left_out_end_the_run_also_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = overrides(tmp_path, "spent", "run.skip_nonfinite_steps=1")
    assert faulty_run(f"output:{ATTENTION}", 1, tmp_path, [*argv, "max_duration=2ba"]) == 0
    assert faulty_run(f"output:{ATTENTION}", 2, tmp_path, argv) == 2
    assert "1 steps are left out already" in last_line(capsys.readouterr().err)


def test_loss_spike_is_logged_with_its_step(tmp_path: Path, caplog: pytest.LogCaptureFixture, tell: Tell) -> None:
    argv = overrides(tmp_path, "spike", "max_duration=26ba", "run.save_interval=26ba", "run.log_interval=100ba")
    assert faulty_run("large:model.head", 23, tmp_path, argv) == 0
    (line,) = [line for line in read_metrics(tmp_path / "spike/metrics.jsonl") if "loss_spikes/count" in line]
    assert line["step"] == 24 and line["loss_spikes/count"] == 1 and line["loss_spikes/factor"] > 2
    (seen,) = [record.getMessage() for record in caplog.records if "times its median" in record.getMessage()]
    assert "The loss rises at step 24 to" in seen
    tell("A loss spike", seen, seconds_since(tmp_path))
