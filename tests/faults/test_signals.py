"""SIGTERM and SIGUSR1: a stop with a checkpoint and a status of its own, and no checkpoint is torn by them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from composer import Callback

from recipes import RECIPES
from tests.conftest import ROOT, run_train
from tests.faults.conftest import Tell
from tests.faults.small_run import DEIT, assert_same, names, saved, tiny, unbroken
from tests.training.test_train import losses
from vitcomposer import config
from vitcomposer.runs.checkpoints import newest_whole
from vitcomposer.training.fit import fit

__all__ = ["unbroken"]

pytestmark = pytest.mark.timeout(120)


def knock(pid: int) -> None:
    """Both signals, hundreds of times a second, for as long as the run is there."""
    end = time.monotonic() + 60
    while os.getppid() == pid and time.monotonic() < end:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
        time.sleep(0.005)
    os._exit(0)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class KnockFrom(Callback):
    """Has the signals come from a step on; begun by the callback, since there is a handler by then."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.process: Any = None

    def batch_start(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == self.step and self.process is None:
            self.process = multiprocessing.get_context("fork").Process(target=knock, args=(os.getpid(),), daemon=True)
            self.process.start()


def test_signals_that_do_not_stop_tear_no_checkpoint(handlers: None, unbroken: Path, tmp_path: Path) -> None:
    argv = [DEIT, *tiny(tmp_path, "run")]
    cfg = config.load(argv[0], argv[1:])
    trainer, knocks = RECIPES[cfg.recipe].build(cfg), KnockFrom(4)
    trainer.state.callbacks.append(knocks)
    try:
        status = fit(trainer, cfg)
        time.sleep(0.1)  # they still come: nothing but 143 may be the end of it
    finally:
        knocks.process.kill()
        knocks.process.join()
    assert status == 143
    assert names(tmp_path / "run")[1].startswith("ep2-ba5") and newest_whole(tmp_path / "run/checkpoints").refused == ()
    assert run_train(argv) == 0
    assert losses(tmp_path / "run") == losses(unbroken)
    assert_same(saved(tmp_path / "run"), saved(unbroken))


@pytest.mark.slow
def test_signal_while_a_run_starts_up_is_no_stop_with_a_checkpoint(tmp_path: Path, tell: Tell) -> None:
    """143 would have schedulers start a run again for ever that its launcher ended because another rank failed."""
    command = [sys.executable, "train.py", DEIT, *tiny(tmp_path, "run")]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipes)
    output = run.stderr
    assert output is not None
    try:
        next(line for line in output if "peak lr" in line)  # Composer is there, the first step is not
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=30) == -signal.SIGTERM
    finally:
        run.kill()
        output.close()
    tell("SIGTERM before the first step", "ends by the signal: nothing was saved", time.monotonic() - began)
