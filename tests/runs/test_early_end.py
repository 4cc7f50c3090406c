"""A run that run.patience ends: it is measured, saved and done, and goes on when it is allowed more."""

import json
from pathlib import Path

import pytest

from tests.conftest import run_train
from tests.faults.small_run import DEIT, tiny
from vitcomposer import config
from vitcomposer.errors import ConfigError


def test_run_out_of_patience_is_done_until_it_is_allowed_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    still = ["optimizer.lr=1e-9", "run.eval_interval=1ep", "run.best_by=class_top1", "run.log_interval=2ba"]
    argv = [DEIT, *tiny(tmp_path, "run"), *still, "run.output=json"]
    assert run_train([*argv, "run.patience=1"]) == 0
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["stopped_by"], summary["finished"]) == (4, "patience", True)
    assert summary["best"]["step"] == 2 and summary["best"]["measure"] == "class_top1"
    assert [event["event"] for event in events] == ["start", "end"] and events[-1]["top1"] == summary["top1"]
    assert [path.name for path in (tmp_path / "run/best").iterdir()] == ["ep1-ba2-rank0.pt"]
    assert run_train([*argv, "run.patience=1"]) == 0
    assert "is already done" in capfd.readouterr().err
    assert run_train([*argv, "run.patience=2", "run.keep_best=false"]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["steps"], summary["stopped_by"]) == (6, "patience")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("run.patience=0", "run.patience must be 1 or more, got 0"),
        ("run.max_hours=0", "run.max_hours must be null, or a number of hours above 0 and at most 100000, got 0.0"),
        ("run.best_by=accuracy", "run.best_by must be one of"),
    ],
)
def test_what_cannot_be_used_is_refused(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load("deit_s", [change])
