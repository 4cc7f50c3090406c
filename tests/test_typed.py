"""What a run says when it ends early: the command as it was typed, and only a checkpoint that is there."""

import os
import signal
import sys
from pathlib import Path

import pytest

from vitcomposer import config
from vitcomposer.data.mds.shared_memory import ignore_interrupt
from vitcomposer.runs import typed
from vitcomposer.runs.failures import INTERRUPTED, explain, status_of_rank

ARGUMENTS = ["yamls/demo.yaml", "run.name=a b"]


@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        (None, "python3 train.py yamls/demo.yaml 'run.name=a b'"),
        (["bash", "-c", "make demo"], "python3 train.py yamls/demo.yaml 'run.name=a b'"),
        (["/x/bin/python", "/x/bin/composer", "-n", "2", "train.py", *ARGUMENTS], "/x/bin/composer -n 2 train.py"),
        (["/x/bin/python3.11", "/x/bin/torchrun", "--standalone", "train.py", *ARGUMENTS], "torchrun --standalone"),
        (
            ["python", "-m", "torch.distributed.run", "./train.py", *ARGUMENTS],
            "python -m torch.distributed.run ./train",
        ),
    ],
)
def test_command_is_that_of_the_launcher_as_it_was_typed(
    launcher: list[str] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *ARGUMENTS])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "train.py", *ARGUMENTS])
    monkeypatch.setattr(typed, "_arguments_of", lambda pid: launcher or [])
    monkeypatch.setattr(typed, "_is_found", lambda name, path: name == "torchrun")
    if launcher is not None:
        monkeypatch.setenv("RANK", "0")
    found = typed.typed_command()
    assert found.startswith(command) and found.endswith("train.py yamls/demo.yaml 'run.name=a b'")


def test_command_of_a_module_is_that_of_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/lib/vitcomposer/train.py", *ARGUMENTS])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "vitcomposer.train", *ARGUMENTS])
    launcher = ["python", "/x/composer", "-n", "2", "-m", "vitcomposer.train", *ARGUMENTS]
    monkeypatch.setattr(typed, "_arguments_of", lambda pid: launcher)
    monkeypatch.setenv("RANK", "0")
    assert typed.typed_command() == "/x/composer -n 2 -m vitcomposer.train yamls/demo.yaml 'run.name=a b'"


def test_own_command_is_read_from_the_system() -> None:
    assert Path(typed._arguments_of(os.getpid())[0]).name == Path(sys.orig_argv[0]).name
    assert typed._arguments_of(0) == []


def test_interrupt_is_none_of_a_worker_and_promises_what_is_there(tmp_path: Path) -> None:
    cfg = config.load("yamls/demo.yaml", [f"run.folder={tmp_path}", "run.name=run"])
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("DataLoader worker (pid(s) 17) exited unexpectedly") from None
    except RuntimeError as error:
        interrupted = error
    report = explain(interrupted, cfg)
    assert report is not None and report["status"] == INTERRUPTED
    assert report["text"].startswith("Interrupted before the first checkpoint. Start again: ")
    fault = explain(OSError(28, "No space left on device"), cfg)
    assert fault is not None and fault["text"].endswith("it begins anew, for there is no checkpoint yet.")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name in ("ep0-ba900-rank0.pt", "ep1-ba1250-rank0.pt"):
        (tmp_path / "run/checkpoints" / name).touch()
    report, fault = explain(interrupted, cfg), explain(OSError(28, "No space left on device"), cfg)
    assert report is not None and report["text"].startswith("Interrupted. Go on after step 1,250: ")
    assert fault is not None and fault["text"].endswith("it goes on after step 1,250.")


def test_first_rank_of_a_node_speaks_for_all_after_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, statuses in (("0", [0, 2, 130, 143]), ("1", [0, 2, 0, 143])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert [status_of_rank(status) for status in (0, 2, 130, 143)] == statuses


def test_loader_worker_leaves_ctrl_c_to_its_parent() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        ignore_interrupt(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
