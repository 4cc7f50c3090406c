"""What killed runs leave on a machine, and runs that share it: none blocks or changes another."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.conftest import ROOT, run_train, tiny_photo_overrides
from tests.faults.conftest import Tell
from tests.training.test_train import losses, wait_for_step
from vitcomposer.data.mds import shared_memory as start
from vitcomposer.data.mds.stream import ImageStream

pytestmark = pytest.mark.timeout(120)

DEIT = str(ROOT / "yamls/deit_ti.yaml")
MEMORY = Path("/dev/shm")


def arguments(runs: Path, name: str, local: Path, *more: str) -> list[str]:
    run = ["run.eval_interval=9ep", "run.save_interval=3ba", "run.progress_bar=false"]
    return [DEIT, *tiny_photo_overrides(local, runs, name), "model.depth=1", *run, *more]


def hold(run: Path, rank: subprocess.Popen) -> None:
    """Keep a run from ending: it stands still in the middle, with all that it holds."""
    wait_for_step(run, 20, rank)
    rank.send_signal(signal.SIGSTOP)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_runs_share_a_cache_and_a_killed_one_blocks_nobody(photo_mds: Path, tmp_path: Path, tell: Tell) -> None:
    """A run whose rank alone is killed, as the kernel does when memory is short: its workers outlive it for seconds."""
    cache = [tmp_path / "cache", f"data.remote={photo_mds}"]
    first = arguments(tmp_path, "first", *cache, "data.num_workers=2", "max_duration=4ep")
    other = arguments(tmp_path, "other", *cache, "seed=1", "max_duration=4ba")
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    rank = subprocess.Popen([sys.executable, "train.py", *first], cwd=ROOT, env=variables, start_new_session=True)
    try:
        wait_for_step(tmp_path / "first", 2, rank)
        holding = threading.Thread(target=hold, args=(tmp_path / "first", rank))
        holding.start()
        assert run_train(other) == 0
        holding.join()
        workers = psutil.Process(rank.pid).children(recursive=True)
        rank.kill()
        rank.wait()
        began = time.monotonic()
        assert any(worker.is_running() for worker in workers)
        assert run_train(first) == 0
        seconds = time.monotonic() - began
    finally:
        with suppress(ProcessLookupError):  # where its workers have gone too
            os.killpg(rank.pid, signal.SIGKILL)
    for name, more in (("first", ["max_duration=4ep"]), ("other", ["seed=1", "max_duration=4ba"])):
        assert run_train(arguments(tmp_path, f"{name}_alone", photo_mds, *more)) == 0
        assert losses(tmp_path / name) == losses(tmp_path / f"{name}_alone")
    tell("kill -9 of a rank alone, its workers still hold the cache", "goes on with the same losses", seconds)
    tell("two runs at once on one cache", "each has the losses that it has alone", 0.0)


@pytest.mark.skipif(not MEMORY.is_dir(), reason="shared memory is not listed on this system")
def test_memory_and_locks_of_killed_runs_go_and_those_of_living_ones_stay(photo_mds: Path, tell: Tell) -> None:
    free = start._free_number(0)
    # Half of what a data set has: killed in the middle of its start.
    left = [MEMORY / f"{free:06}_{kind}" for kind in ("barrier", "barrier_filelock", "cache_filelock")]
    for path in left:
        path.touch()
    try:
        living = ImageStream(local=str(photo_mds), split="train", batch_size=8, shuffle=True, seed=0)
        next(iter(living))
        assert living._shm_prefix_int > free
        began = time.monotonic()
        start.clear_stale_memory()
        seconds = time.monotonic() - began
        assert not any(path.exists() for path in left)
        for kind in ("locals", "barrier", "barrier_filelock"):
            assert (MEMORY / f"{living._shm_prefix_int:06}_{kind}").exists(), kind
    finally:
        for path in left:
            path.unlink(missing_ok=True)
    tell("shared memory and locks of a run killed at its start", "removed by the next start", seconds)


@pytest.mark.skipif(not MEMORY.is_dir(), reason="shared memory is not listed on this system")
def test_memory_of_a_run_in_another_container_stays_until_it_is_killed(
    photo_mds: Path, monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    """Containers that share /dev/shm need not see each other's processes."""
    forks = multiprocessing.get_context("fork")
    number, stop = forks.Value("i", -1), forks.Event()

    def live() -> None:
        torch.distributed.is_initialized = lambda: False
        stream = ImageStream(local=str(photo_mds), split="train", batch_size=8, shuffle=True, seed=0)
        number.value = stream._shm_prefix_int
        stop.wait()

    monkeypatch.setattr(start, "_mapped_files", lambda: "")
    other = forks.Process(target=live)
    other.start()
    try:
        deadline = time.monotonic() + 60
        while number.value < 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        blocks = [MEMORY / f"{number.value:06}_{kind}" for kind in ("locals", "barrier", "next_epoch")]
        start.clear_stale_memory()
        assert all(block.exists() for block in blocks)
        other.kill()
        other.join()
        began = time.monotonic()
        start.clear_stale_memory()
        assert not any(block.exists() for block in blocks)
    finally:
        other.kill()
    tell("a run in another container on the same /dev/shm", "its memory stays until it ends", time.monotonic() - began)


def of_another_user(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    monkeypatch.setattr(os, "getuid", lambda: int(lock.name.split("-")[1]))  # who did not make it


def a_link(lock: Path, _: pytest.MonkeyPatch) -> None:
    victim = lock.with_name("victim")
    victim.write_text("precious")
    lock.symlink_to(victim)


def a_folder(lock: Path, _: pytest.MonkeyPatch) -> None:
    lock.mkdir()


@pytest.mark.parametrize("plant", [of_another_user, a_link, a_folder])
def test_a_planted_lock_does_not_stop_a_start(
    plant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "_MEMORY", tmp_path)
    lock = tmp_path / f"vitcomposer-{os.getuid() + (plant is of_another_user)}-0.lock"
    plant(lock, monkeypatch)
    began = time.monotonic()
    with start.one_start_at_a_time():
        pass
    assert time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {lock} ") and said.count("\n") == 1
    if plant is a_link:
        assert lock.with_name("victim").read_text() == "precious"


def enter(folder: Path, entered: Any) -> None:
    tempfile.tempdir = str(folder)
    torch.distributed.is_initialized = lambda: False  # what a test before this one began does not outlive a fork
    with start.one_start_at_a_time():
        entered.value = time.monotonic()


@pytest.mark.skipif(not MEMORY.is_dir(), reason="shared memory is not listed on this system")
def test_starts_wait_for_each_other_also_with_temporary_folders_of_their_own(tmp_path: Path, tell: Tell) -> None:
    """Two that look for a free number at the same moment find the same: FileExistsError '/000003_locals'."""
    forks = multiprocessing.get_context("fork")
    entered = forks.Value("d", 0.0)
    with start.one_start_at_a_time():
        other = forks.Process(target=enter, args=(tmp_path, entered))
        other.start()
        time.sleep(0.5)
        left = time.monotonic()
    other.join(30)
    other.kill()
    assert other.exitcode == 0 and entered.value >= left
    tell("two starts at the same moment", "the second waits for the first", entered.value - left)
