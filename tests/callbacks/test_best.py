"""The best evaluation of a run: its checkpoint stays, and a run that gets no better, or has had its hours, ends."""

import os
from pathlib import Path
from typing import Any

import pytest
from composer import Callback, Trainer

from tests.callbacks import tiny_run
from vitcomposer.callbacks import Best, Checkpoints, Throughput
from vitcomposer.runs.checkpoints import damage

STEPS = tiny_run.STEPS_PER_EPOCH


class Measured(Callback):
    """Has evaluations say what a test wants, before ``Best`` reads it."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def eval_end(self, state: Any, logger: Any) -> None:
        state.eval_metric_values = {**state.eval_metric_values, "top1": self.values.pop(0)}


def build(folder: Path, max_duration: str, values: list[float], **options: Any) -> tuple[Trainer, Best, Throughput]:
    throughput = Throughput(None, "fp32")
    saving = {"interval": options.pop("save_interval", "1ep"), "keep": 1}
    load = options.pop("load_path", None)
    ema = options.pop("ema", False)
    best = Best(folder, throughput, **options)
    saver = Checkpoints(folder / "checkpoints", **saving, throughput=throughput, best=best)
    callbacks = [throughput, Measured(*values), best, saver]
    return tiny_run.build(max_duration, callbacks=callbacks, ema=ema, load_path=load), best, throughput


def fit(folder: Path, max_duration: str, values: list[float], **options: Any) -> tuple[Trainer, Best, Throughput]:
    made = build(folder, max_duration, values, **options)
    made[0].fit()
    made[0].close()
    return made


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "best").iterdir())


def test_checkpoint_of_the_best_evaluation_stays_beside_the_newest(tmp_path: Path) -> None:
    _, best, throughput = fit(tmp_path, "4ep", [0.1, 0.8, 0.3, 0.8])
    assert kept(tmp_path) == ["ep2-ba8-rank0.pt"] and damage(tmp_path / "best/ep2-ba8-rank0.pt") is None
    assert best.found == {"step": 8, "epoch": 2, "measure": "top1", "value": 0.8, "weights": "raw"}, (
        "a tie is not better"
    )
    newest = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert newest == ["ep4-ba16-rank0.pt", "latest-rank0.pt"]
    assert throughput.saving_seconds > 0 and throughput.evaluation_seconds > 0


def test_step_that_the_interval_leaves_out_is_saved_when_it_is_the_best(tmp_path: Path) -> None:
    fit(tmp_path, "3ep", [0.1, 0.8, 0.3], save_interval="9ep")
    assert kept(tmp_path) == ["ep2-ba8-rank0.pt"]


def test_last_evaluation_that_comes_after_the_last_checkpoint_counts(tmp_path: Path) -> None:
    fit(tmp_path, "6ba", [0.1, 0.8])
    assert kept(tmp_path) == ["ep1-ba6-rank0.pt"]
    newest = tmp_path / "checkpoints/ep1-ba6-rank0.pt"
    assert os.path.samefile(tmp_path / "best/ep1-ba6-rank0.pt", newest), "its bytes are there once"


def test_average_counts_where_it_is_better_and_the_loss_where_it_is_chosen(tmp_path: Path) -> None:
    _, best, _ = fit(tmp_path / "a", "2ep", [0.1, 0.2, 0.3, 0.1], ema=True)
    assert best.found is not None and (best.found["weights"], best.found["value"]) == ("raw", 0.3)
    _, best, _ = fit(tmp_path / "b", "2ep", [0.1, 0.4, 0.3, 0.1], ema=True)
    assert best.found is not None and (best.found["weights"], best.found["value"]) == ("ema", 0.4)
    _, best, _ = fit(tmp_path / "c", "2ep", [0.1, 0.1], measure="loss")
    assert best.found is not None and best.found["step"] == 8, "it falls"


def test_nothing_is_kept_unless_it_is_wanted(tmp_path: Path) -> None:
    _, best, _ = fit(tmp_path, "2ep", [0.1, 0.2], keep=False)
    assert not (tmp_path / "best").exists() and best.found is not None


def test_run_that_gets_no_better_ends_with_a_checkpoint(tmp_path: Path) -> None:
    trainer, best, _ = fit(tmp_path, "9ep", [0.1, 0.5, 0.4, 0.5], patience=2, save_interval="5ep")
    assert trainer.state.timestamp.batch.value == 4 * STEPS and best.stopped_by == "patience"
    assert (tmp_path / "checkpoints/ep4-ba16-rank0.pt").is_file() and kept(tmp_path) == ["ep2-ba8-rank0.pt"]
    latest = str((tmp_path / "checkpoints/latest-rank0.pt").resolve())
    _, again, _ = build(tmp_path, "9ep", [], patience=2, load_path=latest)
    assert again.stopped_by == "patience" and again.found == best.found
    _, longer, _ = build(tmp_path, "9ep", [], patience=3, load_path=latest)
    assert longer.stopped_by is None


def test_run_that_has_had_its_hours_ends_measured_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Throughput, "wall_seconds", property(lambda self: 3600.0 * (self.images + 1)))
    trainer, best, _ = fit(tmp_path, "9ep", [0.5, 0.6], max_hours=2.5 * tiny_run.BATCH)
    steps = trainer.state.timestamp.batch.value
    assert steps == 5 and best.stopped_by == "max_hours"  # two of which are warm-up
    assert (tmp_path / f"checkpoints/ep1-ba{steps}-rank0.pt").is_file() and kept(tmp_path) == [
        f"ep1-ba{steps}-rank0.pt"
    ]


def test_disk_that_does_not_take_it_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitcomposer.callbacks.best.keep_as_best", full)
    trainer, _, _ = fit(tmp_path, "2ep", [0.1, 0.2])
    assert trainer.state.timestamp.batch.value == 2 * STEPS
    assert caplog.text.count("is not kept: [Errno 28] No space left on device. Training goes on.") == 1
