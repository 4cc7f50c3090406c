import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback

from tests.callbacks import tiny_run
from vitcomposer.callbacks import Preemption

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(folder: Path, *, workers: int = 0, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """tiny_run.py for 16 steps of 0.3 s in a process group of its own."""
    command = [sys.executable, "-W", "ignore", tiny_run.__file__, str(folder), "4ep", "0.3", str(workers)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=variables, start_new_session=True, **pipes)


def wait_for(process: subprocess.Popen, line: str) -> None:
    assert process.stdout is not None
    seen = []
    for text in process.stdout:
        seen.append(text)
        if text.strip() == line:
            return
    raise AssertionError(f"{line!r} never came:\n{''.join(seen)}")


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    return output


def checkpointed_steps(folder: Path) -> list[int]:
    return sorted(int(re.findall(r"-ba(\d+)-", p.name)[0]) for p in (folder / "checkpoints").glob("ep*.pt"))


def test_sigterm_saves_the_step_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(tmp_path / "broken", workers=2)
    wait_for(process, "step 5")
    os.killpg(process.pid, signal.SIGTERM)  # as Slurm does: the workers of the loader get it too
    output = finish(process)
    assert process.returncode == 143, output
    assert "Stopped by SIGTERM after step 6." in output
    assert checkpointed_steps(tmp_path / "broken") == [6]
    assert (tmp_path / "broken/checkpoints/latest-rank0.pt").resolve().name == "ep1-ba6-rank0.pt"

    assert tiny_run.main(tmp_path / "broken", "4ep") == 0
    assert tiny_run.main(tmp_path / "unbroken", "4ep") == 0
    assert "resumed at 6\nstep 6" in capsys.readouterr().out
    a, b = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("broken", "unbroken"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_signal_on_one_rank_stops_all_ranks_at_one_step(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    ranks = [start(tmp_path, environment={**common, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    try:
        wait_for(ranks[1], "step 2")
        ranks[1].send_signal(signal.SIGUSR1)
        outputs = [finish(process) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [143, 143], outputs
    assert "Stopped by a signal on another rank after step 3." in outputs[0]
    assert "step 3" not in outputs[1].replace("step 3.", "")
    assert checkpointed_steps(tmp_path) == [3]


class SignalAt(Callback):
    """Signals in the step of a number from 1, or in the evaluation behind it."""

    def __init__(self, step: int, numbers: tuple[signal.Signals, ...], in_evaluation: bool) -> None:
        self.step, self.numbers, self.in_evaluation = step, numbers, in_evaluation
        self.evaluations: list[int] = []
        self.batches = 0  # of evaluations

    def batch_start(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == self.step - 1 and not self.in_evaluation:
            self.send()

    def send(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)

    def eval_start(self, state: Any, logger: Any) -> None:
        self.evaluations.append(state.timestamp.batch.value)

    def eval_batch_end(self, state: Any, logger: Any) -> None:
        self.batches += 1
        if state.timestamp.batch.value == self.step and self.in_evaluation and state.eval_timestamp.batch == 1:
            self.send()


def run(  # noqa: PLR0913 (named at the call)
    max_duration: str,
    step: int,
    folder: Path | None = None,
    *,
    numbers: tuple[signal.Signals, ...] = (signal.SIGTERM,),
    in_evaluation: bool = False,
    **options: Any,
) -> tuple[Any, Preemption, SignalAt]:
    preemption, signals = Preemption(), SignalAt(step, numbers, in_evaluation)
    save = {} if folder is None else {"save_folder": str(folder), "save_interval": "100ep", "save_overwrite": True}
    trainer = tiny_run.build(max_duration, callbacks=[preemption, signals], **save, **options)
    trainer.fit()
    trainer.close()
    return trainer, preemption, signals


def test_stop_skips_the_evaluation_and_has_later_signals_ignored() -> None:
    """A launcher ends the ranks that leave last with a SIGTERM, which must not change their 143."""
    trainer, preemption, signals = run("2ep", step=3)
    assert preemption.stopped and trainer.state.timestamp.batch == 3
    assert signals.evaluations == []
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == 2 * [signal.SIG_IGN]


@pytest.mark.parametrize("max_duration", ["2ep", "8ba", "64sp"])
def test_signal_in_the_last_step_lets_the_run_end_with_its_evaluation(max_duration: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer, preemption, signals = run(max_duration, step=8)
    assert not preemption.stopped and trainer.state.timestamp.batch == 8
    assert signals.evaluations[-1] == 8
    assert signal.getsignal(signal.SIGTERM) == before


def test_signal_at_the_end_of_an_epoch_resumes_with_the_next(tmp_path: Path) -> None:
    stopped, preemption, signals = run("3ep", step=4, folder=tmp_path)
    assert preemption.stopped and stopped.state.timestamp.batch == 4
    assert signals.evaluations == []
    latest = str(tmp_path / "latest-rank0.pt")
    resumed, _, signals = run("3ep", step=99, folder=tmp_path, load_path=latest)
    whole, _, _ = run("3ep", step=99)
    assert signals.evaluations == [4, 8, 12], "the evaluation that the stop left out is made up for"
    assert resumed.state.timestamp.epoch == 3 and resumed.state.timestamp.batch == 12
    for a, b in zip(resumed.state.model.parameters(), whole.state.model.parameters(), strict=True):
        assert torch.equal(a, b)


CTRL_C = signal.SIGINT


@pytest.mark.parametrize("numbers", [(CTRL_C,), (CTRL_C, signal.SIGTERM), (signal.SIGTERM, CTRL_C)])
@pytest.mark.parametrize("step", [3, 4, 8])
def test_ctrl_c_finishes_the_step_saves_it_and_evaluates_nothing(
    step: int, numbers: tuple[signal.Signals, ...], tmp_path: Path
) -> None:
    """In the last step too, unlike SIGTERM; a launcher's SIGTERM behind it, or before it, changes nothing."""
    before = signal.signal(CTRL_C, signal.default_int_handler)
    try:
        trainer, preemption, signals = run("2ep", step, tmp_path, numbers=numbers)
        assert signal.getsignal(CTRL_C) == signal.default_int_handler
    finally:
        signal.signal(CTRL_C, before)
    assert preemption.status == 130 and trainer.state.timestamp.batch == step
    assert signals.evaluations == ([4] if step == 8 else [])
    assert (tmp_path / "latest-rank0.pt").resolve().name.endswith(f"-ba{step}-rank0.pt")


def test_second_ctrl_c_ends_the_run_at_once() -> None:
    preemption, signals = Preemption(), SignalAt(3, (CTRL_C, CTRL_C), False)
    trainer = tiny_run.build("2ep", callbacks=[preemption, signals])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.engine.close()
    assert trainer.state.timestamp.batch == 2 and not preemption.stopped


def test_ctrl_c_in_an_evaluation_stops_behind_it_before_another_step(tmp_path: Path) -> None:
    trainer, preemption, signals = run("3ep", 4, tmp_path, numbers=(CTRL_C,), in_evaluation=True)
    assert preemption.status == 130 and trainer.state.timestamp.batch == 4
    assert signals.evaluations == [4] and signals.batches == 4, "the evaluation is whole"
    assert (tmp_path / "latest-rank0.pt").resolve().name.endswith("-ba4-rank0.pt")


def test_ctrl_c_where_nothing_would_be_lost_ends_the_run_at_once(tmp_path: Path) -> None:
    """The evaluation at the end comes after the last checkpoint."""
    preemption, signals = Preemption(), SignalAt(6, (CTRL_C,), True)
    save = {"save_folder": str(tmp_path), "save_interval": "6ba", "save_overwrite": True}
    trainer = tiny_run.build("6ba", callbacks=[preemption, signals], eval_interval="9ep", **save)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.engine.close()
    assert signals.batches == 1 and trainer.state.timestamp.batch == 6


def test_handlers_come_back_when_training_fails() -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer = tiny_run.build("1ep", callbacks=[Preemption()], fail_at=2)
    with pytest.raises(RuntimeError, match="the loss went away"):
        trainer.fit()
    assert signal.getsignal(signal.SIGTERM) != before
    trainer.engine.close()
    assert signal.getsignal(signal.SIGTERM) == before
