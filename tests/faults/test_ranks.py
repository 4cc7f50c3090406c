"""A rank that dies, hangs or fails alone, a loader worker that dies, Ctrl-C: all end in time, with one line on it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.faults.conftest import Tell
from tests.faults.test_numbers import overrides
from vitcomposer.runs.metrics import read_metrics

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "composer": [str(BIN / "composer"), "-n", "2"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"],
    "python": [sys.executable],
}
TIMEOUT = 10  # run.dist_timeout
GRACE = 50  # launchers leave a rank 30 s to answer SIGTERM, and a busy machine is slow


def processes_of(folder: Path) -> list[psutil.Process]:
    """Launcher, ranks and loader workers of a run, whose command names its folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        named = any(str(folder) in part for part in process.info["cmdline"] or ())
        if named and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_left_running(tmp_path: Path) -> Iterator[None]:
    yield
    for process in processes_of(tmp_path):
        process.kill()


def faulty_launch(launcher: str, fault: list[str], tmp_path: Path, *more: str) -> tuple[int, str, float]:
    """Status and printed text of a run with a fault, and the seconds from the fault to the end of all its processes.

    Args:
        fault: WHEN, STEP, RANK and WHAT of tests/faults/faulty.py.
    """
    when = tmp_path / "time"
    argv = overrides(tmp_path / "runs", "run", f"run.dist_timeout={TIMEOUT}", "run.save_interval=2ba", *more)
    command = [*LAUNCHERS[launcher], "tests/faults/faulty.py", *fault, str(when), *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env, start_new_session=True)
        status = run.wait(timeout=560)
    deadline = time.time() + 15
    while processes_of(tmp_path) and time.time() < deadline:
        time.sleep(0.1)
    seconds = time.time() - float(when.read_text())
    text = (tmp_path / "log").read_text()
    assert not processes_of(tmp_path), text[-3000:]
    return status, text, seconds


def error_line(text: str) -> str:
    """The one line that begins with error:, which a launcher may print again with a rank's log."""
    # Torch ends what it says about a bus error with a zero byte.
    lines = {line for line in text.replace("\0", "").splitlines() if line.startswith("error: ")}
    assert len(lines) == 1, text[-6000:]
    return lines.pop()


FAULTS = {
    "dies at start-up": ["start", "0", "1", "kill"],
    "dies while it is built": ["build", "0", "1", "kill"],
    "dies in a step": ["before_forward", "2", "1", "kill"],
    "dies in the evaluation": ["eval_batch_start", "4", "1", "kill"],
    "dies in a checkpoint": ["batch_checkpoint", "2", "1", "kill"],
    "hangs at start-up": ["start", "0", "1", "hang"],
    "hangs in a step": ["before_forward", "2", "1", "hang"],
    "hangs in the evaluation": ["eval_batch_start", "4", "1", "hang"],
    "hangs in a checkpoint": ["batch_checkpoint", "2", "1", "hang"],
}
BY_TORCHRUN = ("dies in a step", "dies in a checkpoint", "hangs in a step")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "launcher"),
    [*((fault, "composer") for fault in FAULTS), *((fault, "torchrun") for fault in BY_TORCHRUN)],
)
def test_rank_that_dies_or_hangs_ends_all_in_time(fault: str, launcher: str, tmp_path: Path, tell: Tell) -> None:
    status, text, seconds = faulty_launch(launcher, FAULTS[fault], tmp_path, "run.eval_interval=4ba")
    assert status not in (0, 143), text[-6000:]
    assert seconds < (TIMEOUT if "hangs" in fault else 0) + GRACE + 10
    if "start-up" in fault and "dies" in fault:  # the other rank is ended before it has anything to say
        (seen,) = [line for line in text.splitlines() if "Rank 1 crashed with exit code -9" in line]
    else:
        seen = error_line(text)
        assert "rank 1 " in seen or "start-up" in fault
    tell(f"Rank 1 {fault} ({launcher} -n 2)", seen, seconds)


ALONE = {
    "refuses its configuration": (["build", "0", "1", "refuse"], 2, "rank 1: run.name must be another one on this"),
    "fails in a step": (["before_forward", "2", "1", "raise"], 1, "rank 1: RuntimeError: the fault of the test"),
    "alone gets NaN": (["never", "2", "1", "output:model.blocks.1.attn"], 2, "of model.blocks.1.attn (SelfAttention)"),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ALONE)
def test_rank_that_fails_alone_tells_the_other(fault: str, tmp_path: Path, tell: Tell) -> None:
    given, expected, said = ALONE[fault]
    status, text, seconds = faulty_launch("composer", given, tmp_path)
    assert status == expected and seconds < 30, text[-6000:]
    seen = error_line(text)
    assert said in seen and "rank 1" in seen
    tell(f"Rank 1 {fault} (composer -n 2)", seen, seconds)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "how", [["run.parallelism=fsdp2"], ["run.parallelism=ddp", "algorithms.SAM={rho: 0.05}"]], ids=["fsdp2", "sam"]
)
def test_nan_of_one_rank_is_found_and_left_out_by_both(how: list[str], tmp_path: Path, tell: Tell) -> None:
    """SAM's first pass is not reduced over the ranks, and FSDP2 has each of them keep a share of the gradients."""
    fault = ["never", "1", "1", "output:model.blocks.1.attn"]
    status, text, seconds = faulty_launch("composer", fault, tmp_path, *how, "run.skip_nonfinite_steps=1")
    assert status == 0, text[-6000:]
    lines = read_metrics(tmp_path / "runs/run/metrics.jsonl")
    assert [line.get("skipped_steps/count") for line in lines] == [None, 1, None, None]
    assert [line["loss/train/total"] is None for line in lines] == [False, True, False, False]
    (seen,) = {line for line in text.splitlines() if "is left out, not finite" in line}
    tell(f"One rank alone gets NaN with {how[-1]}, run.skip_nonfinite_steps=1", seen, seconds)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_loader_worker_killed_for_memory_is_named(tmp_path: Path, tell: Tell) -> None:
    status, text, seconds = faulty_launch(
        "python", ["before_forward", "1", "0", "worker"], tmp_path, "data.num_workers=1", "max_duration=40ba"
    )
    assert status == 1 and seconds < 30, text[-6000:]
    seen = error_line(text)
    assert "Loader worker" in seen and "memory" in seen and "data.num_workers (now 1)" in seen
    tell("A loader worker is killed", seen, seconds)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_ends_both_ranks_with_one_line_and_no_traceback_of_theirs(tmp_path: Path, tell: Tell) -> None:
    """As a terminal sends it: to launcher, ranks and workers at once."""
    status, text, seconds = faulty_launch(
        "composer", ["batch_start", "3", "0", "ctrl_c"], tmp_path, "data.num_workers=1", "max_duration=400ba"
    )
    assert status == 130 and seconds < 30, text[-6000:]
    (seen,) = [line for line in text.splitlines() if line.startswith("saved step ")]
    assert seen.startswith("saved step 4 (epoch 0.5). Go on: ") and "composer -n 2 tests/faults/faulty.py" in seen
    assert "error:" not in text and "rank 1" not in text  # whose log the launcher would print
    frames = [line for line in text.splitlines() if line.startswith('  File "')]
    assert all("/composer/cli/" in line or "/composer/core/engine.py" in line for line in frames)  # the launcher's own
    assert list((tmp_path / "runs/run/checkpoints").glob("ep*-ba4-rank0.pt"))
    tell("Ctrl-C (composer -n 2)", seen.partition(" Go on: ")[0] + " Go on: ...", seconds)


IN_PROCESS = {
    "memory": (2, "run.device_train_microbatch_size is 8. Set it to 4"),
    "interrupt": (130, "saved step 2 (epoch "),
}


@pytest.mark.parametrize("what", IN_PROCESS)
def test_error_in_a_step_says_what_to_do(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    from tests.faults.faulty import run  # imports train.py, and Composer with it

    expected, said = IN_PROCESS[what]
    composers = signal.signal(signal.SIGINT, signal.default_int_handler)  # as a process that runs train.py has it
    try:
        assert run("before_forward", 1, 0, what, tmp_path / "time", overrides(tmp_path, what)) == expected
    finally:
        signal.signal(signal.SIGINT, composers)
    seconds = time.time() - float((tmp_path / "time").read_text())
    printed = capsys.readouterr()
    saved = [line.partition(" Go on: ")[0] for line in printed.out.splitlines() if line.startswith("saved step ")]
    seen = error_line(printed.err) if what == "memory" else saved[0]
    assert said in seen
    tell({"memory": "The device is out of memory", "interrupt": "SIGINT"}[what], seen, seconds)
