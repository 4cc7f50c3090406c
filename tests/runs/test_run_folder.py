"""The folder of a run as a whole: who may write it, what a refused start leaves, what is mended in it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.conftest import ROOT, error_of, run_train
from tests.faults.small_run import DEIT, rows, tiny
from tests.faults.started_runs import ComposerRun, finish
from vitcomposer import config, folder_lock
from vitcomposer.errors import NonFiniteError

ONE_STEP = ["max_duration=1ba", "run.eval_interval=2ba", "model.depth=1"]


def overrides(runs: Path, *more: str) -> list[str]:
    return [DEIT, *tiny(runs, "demo"), *ONE_STEP, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert run_train(overrides(runs)) == 0
    return runs / "demo"


def test_run_leaves_no_lock(finished: Path) -> None:
    assert [path.name for path in finished.parent.iterdir()] == ["demo"]


def assert_is_refusal(error: str, run: Path, pid: int, free: str) -> None:
    text = (
        rf"error: {re.escape(str(run))} is being written by pid {pid} on {re.escape(socket.gethostname())} "
        rf"\(since \d\d:\d\d\)\. Wait, stop it, or set run\.name={free}\.\n"
    )
    assert re.fullmatch(text, error)


@pytest.mark.parametrize("more", [[], ["optimizer.lr=0.1"], ["max_duration=2ba"]])
def test_folder_that_another_process_writes_is_refused(
    finished: Path, more: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    lock = folder_lock.beside(finished)
    parent = folder_lock._start_of(os.getppid())
    lock.write_text(json.dumps({**asdict(folder_lock.this_process()), "pid": os.getppid(), "ticks": parent}))
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert run_train(overrides(finished.parent, *more)) == 2
    assert_is_refusal(error_of(capfd.readouterr().err), finished, os.getppid(), "demo_2")
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    lock.unlink()


@pytest.mark.slow
def test_all_ranks_are_refused_with_one_line(finished: Path, tmp_path: Path) -> None:
    lock = folder_lock.beside(finished)
    lock.write_text(json.dumps(asdict(folder_lock.this_process())))
    run = ComposerRun(overrides(finished.parent), tmp_path / "log", tmp_path)
    try:
        assert finish(run) == 2
    finally:
        run.kill()
        lock.unlink()
    errors = [line for line in (tmp_path / "log").read_text().splitlines() if "error: " in line]
    assert len(errors) == 1, errors
    assert_is_refusal(errors[0] + "\n", finished, os.getpid(), "demo_2")


@pytest.mark.slow
def test_two_starts_at_once_are_one_run_and_a_refusal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "train.py", *overrides(tmp_path, "max_duration=1000ba", "run.log_interval=1ba")]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = tmp_path / "demo"
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        (tmp_path / "demo_2").mkdir()
        for more in ([], ["optimizer.lr=0.1"]):
            assert run_train(overrides(tmp_path, *more)) == 2
            assert_is_refusal(error_of(capfd.readouterr().err), run, first.pid, "demo_3")
            assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / ".demo.lock").is_file()
    assert run_train(overrides(tmp_path, "max_duration=1ba")) == 0, "a kill keeps nobody out"
    assert not (tmp_path / ".demo.lock").exists()


def test_other_configuration_is_refused_without_a_checkpoint_too(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "demo"
    run.mkdir()
    cfg = config.load(finished / "config.yaml", [f"run.folder={tmp_path}"])
    (run / "config.yaml").write_text(config.to_yaml(cfg))
    before = (run / "config.yaml").read_text()
    assert run_train(overrides(tmp_path, "optimizer.weight_decay=0.1")) == 2
    error = error_of(capsys.readouterr().err)
    assert error.startswith(f"error: optimizer.weight_decay must be 0.05 to go on with the run in {run}, got 0.1.")
    assert [path.name for path in run.iterdir()] == ["config.yaml"] and (run / "config.yaml").read_text() == before
    assert run_train(overrides(tmp_path)) == 0
    assert rows(run) == rows(finished)


def test_unlocked_run_goes_on_where_its_disk_takes_no_lock(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder_lock, "acquire", refuse)
    assert run_train(overrides(tmp_path)) == 0
    assert rows(tmp_path / "demo") == rows(finished)


def test_report_that_a_kill_cost_comes_with_the_next_start(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = [*overrides(finished.parent)]
    for damage in (
        lambda: (finished / "report.html").unlink(),
        lambda: os.utime(finished / "report.html", (1, 1)),  # of the run before max_duration was raised
    ):
        damage()
        (finished / ".report.partial.html").write_text("half of it")
        assert run_train(again) == 0
        assert "is already done: 1ba" in capsys.readouterr().out
        assert (finished / "report.html").read_text().endswith("</html>\n")
        assert not list(finished.glob(".*"))
    before = (finished / "report.html").stat().st_mtime_ns
    assert run_train(again) == 0
    assert (finished / "report.html").stat().st_mtime_ns == before, "a whole one stays"


REFUSED = [
    ["schedule.t_warmup=2ba"],  # longer than the run
    ["schedule.t_warmup=2ep"],
    ["schedule.t_warmup=0.5x"],
    ["global_train_batch_size=64"],  # of 32 images
    ["model.name=deit_tinny"],
    ["model.num_heads=5"],
    ["init.weights=nowhere.pt"],
    ["init.train_blocks=1"],
    ["optimizer.name=adamwww"],
    ["optimizer.options={momentumm: 1}"],
    ["optimizer.name=adamw_schedulefree"],
    ["algorithms.Emma={}"],
    ["algorithms.EMA.smoothing=foo"],
    ["precision=amp_bf16"],
    ["run.parallelism=fsdp2"],
    ["run.eval_interval=foo"],
    ["run.save_interval=foo"],
    ["run.log_interval=foo"],
    ["run.attention_interval=foo"],
    ["run.loggers=[tensorboard, wandb]"],
    ["data.source=mds", "data.local=nowhere"],
    ["augment.std=[1e-40,1e-40,1e-40]"],  # not finite at the first step
]


@pytest.mark.parametrize("more", REFUSED, ids=lambda more: " ".join(more))
def test_refused_start_leaves_nothing(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(ValueError, NonFiniteError):  # which train.py as a command says on one line
        assert run_train(overrides(tmp_path / "new/runs", *more)) == 2, capsys.readouterr()
    assert list(tmp_path.iterdir()) == []


def test_refused_start_leaves_a_run_as_it_was(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.parent.rglob("*") if path.is_file()}
    assert run_train(overrides(finished.parent, "max_duration=9ba", "run.loggers=[tensorboard, wandb]")) == 2
    assert {path: path.read_bytes() for path in finished.parent.rglob("*") if path.is_file()} == before


def test_refused_start_leaves_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"data.local={tmp_path}/cache", f"data.remote={tmp_path}/nowhere", "data.source=mds"]
    assert run_train(overrides(tmp_path / "runs", *data)) == 2
    assert "nowhere/train/index.json cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["''", ".", "..", "a/b", "/a", "a/", "x" * 201])
def test_name_that_is_not_that_of_one_folder_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(overrides(tmp_path, f"run.name={name}")) == 2
    assert capsys.readouterr().err.startswith("error: run.name must be the name of one folder")
    assert list(tmp_path.iterdir()) == []
