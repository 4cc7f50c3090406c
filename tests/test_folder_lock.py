"""One writer of a folder: who holds it, and how a lock is known for stale here and on another machine."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from vitcomposer import folder_lock
from vitcomposer.cli import main
from vitcomposer.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from vitcomposer import folder_lock
from vitcomposer.cli import main
folder_lock.acquire(Path(sys.argv[1]), "runs/demo", "set run.name=demo_2")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "runs/.demo.lock"
    yield path
    folder_lock.release(path)


def take(path: Path) -> bool:
    return folder_lock.acquire(path, "runs/demo", "set run.name=demo_2")


def hold_elsewhere(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def write_lock(path: Path, **changed: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**dataclasses.asdict(folder_lock.this_process()), **changed}))


def hold_by_parent(path: Path) -> None:
    """The lock of a process that is alive and is not this one."""
    write_lock(path, pid=os.getppid(), ticks=folder_lock._start_of(os.getppid()))


def test_second_process_is_refused_and_a_killed_one_keeps_nobody_out(lock: Path) -> None:
    process = hold_elsewhere(lock)
    try:
        with pytest.raises(ConfigError) as refused:
            take(lock)
    finally:
        process.kill()
    text = (
        rf"runs/demo is being written by pid {process.pid} on {re.escape(socket.gethostname())} \(since \d\d:\d\d\)\. "
        r"Wait, stop it, or set run\.name=demo_2\."
    )
    assert re.fullmatch(text, str(refused.value))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and nobody has asked for its status
    assert take(lock), "a zombie writes nothing"
    process.wait()
    assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_killed_process_that_still_gives_its_memory_back_is_waited_for(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = hold_elsewhere(lock)
    real, asked = folder_lock._was_killed, []

    def dies_slowly(pid: int) -> bool:
        asked.append(real(pid))
        if len(asked) == 3:
            process.kill()
        return True

    monkeypatch.setattr(folder_lock, "_was_killed", dies_slowly)
    assert take(lock)
    assert len(asked) >= 3 and asked[:3] == [False] * 3
    process.wait()


@pytest.mark.parametrize(
    ("flags", "pending", "killed"),
    [("4194560", "0", False), ("4194564", "0", True), ("4194560", "100", True), ("4194560", "4000", False)],
    ids=["running", "exiting", "SIGKILL waits", "SIGTERM waits"],
)
def test_what_the_system_says_of_a_killed_process(
    flags: str, pending: str, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "/proc/7/stat": f"7 (a (b) c) R 1 7 7 0 -1 {flags} 0",
        "/proc/7/status": f"SigPnd:\t0000000000000000\nShdPnd:\t{int(pending, 16):016x}\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: texts[str(path)])
    assert folder_lock._was_killed(7) is killed


def test_end_of_the_process_gives_the_lock_back_with_its_folder(lock: Path) -> None:
    code = HOLD.replace("time.sleep(60)", "")
    subprocess.run([sys.executable, "-c", code, str(lock)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert not lock.parent.exists()


def test_process_may_take_what_it_holds_and_gives_it_back_once(lock: Path) -> None:
    assert take(lock) and not take(lock)
    folder_lock.release(lock)
    assert not lock.parent.exists()
    folder_lock.release(lock)


def test_folder_that_is_not_empty_stays(lock: Path) -> None:
    assert take(lock)
    (lock.parent / "demo").mkdir()
    folder_lock.release(lock)
    assert [path.name for path in lock.parent.iterdir()] == ["demo"]


@pytest.mark.parametrize("changed", [{"ticks": 1}, {"ticks": None}, {"pid": 2**22 - 1}, {"pid": "x"}])
def test_number_that_came_to_another_process_is_stale(lock: Path, changed: dict[str, Any]) -> None:
    write_lock(lock, **{"pid": os.getppid(), **changed})
    assert take(lock)


def test_same_process_by_number_and_start_is_alive(lock: Path) -> None:
    parent = os.getppid()
    write_lock(lock, pid=parent, ticks=folder_lock._start_of(parent), since="2020-03-01T08:04:00+00:00")
    with pytest.raises(ConfigError, match=rf"pid {parent} on .* \(since 2020-0[23]-\d\d \d\d:04\)"):
        take(lock)


OTHERS = [{"host": "node7"}, {"machine": "another boot pid:[1]"}, {"machine": None}]


@pytest.mark.parametrize("other", OTHERS)
def test_lock_of_another_machine_that_is_touched_is_alive(
    lock: Path, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "STALE", 5.0)
    write_lock(lock, **other)
    touch = threading.Timer(0.2, os.utime, [lock])
    touch.start()
    with pytest.raises(ConfigError, match="is being written by pid"):
        take(lock)
    touch.join()


@pytest.mark.parametrize("other", OTHERS)
def test_lock_of_another_machine_that_is_not_touched_is_stale(
    lock: Path, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder_lock, "STALE", 0.3)
    write_lock(lock, **other)
    began = time.monotonic()
    assert take(lock) and time.monotonic() - began >= 0.3
    assert "a wait of 0.3 s shows whether that still runs." in capsys.readouterr().out


def test_old_lock_of_another_machine_is_stale_at_once(lock: Path) -> None:
    write_lock(lock, host="node7")
    os.utime(lock, (time.time() - 400, time.time() - 400))
    began = time.monotonic()
    assert take(lock) and time.monotonic() - began < 5


def test_holder_touches_its_lock(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT", 0.02)
    assert take(lock)
    os.utime(lock, (1.0, 1.0))
    end = time.monotonic() + 20
    while lock.stat().st_mtime == 1.0:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_holder_whose_lock_is_taken_over_ends(lock: Path) -> None:
    code = HOLD.replace("folder_lock.acquire", "folder_lock.BEAT = 0.05\nfolder_lock.acquire", 1)
    command = [sys.executable, "-c", code, str(lock)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    write_lock(lock, host="node7")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and errors.startswith("error: runs/demo was taken over by another start")
    assert json.loads(lock.read_text())["host"] == "node7"
    lock.unlink()


@pytest.mark.parametrize("content", [b"", b'{"host": "no', b"\xff\xfe", b"[]", b'{"host": 1}'])
def test_damaged_lock_is_that_of_a_process_without_a_name(
    lock: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "STALE", 0.1)
    lock.parent.mkdir()
    lock.write_bytes(content)
    assert take(lock)


def test_fork_gives_nothing_back(lock: Path) -> None:
    assert take(lock)
    child = multiprocessing.get_context("fork").Process(target=folder_lock.release, args=(lock,))
    child.start()
    child.join()
    assert child.exitcode == 0 and lock.exists()


def race(path: Path, ready: Barrier, over: Barrier, results: Any) -> None:
    ready.wait()
    try:
        results.put(take(path))
    except ConfigError:
        results.put(False)
    over.wait()


def test_one_of_many_gets_a_stale_lock(lock: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        write_lock(lock, pid=os.getppid(), ticks=1)
        ready, over, results = context.Barrier(6), context.Barrier(6), context.Queue()
        racers = [context.Process(target=race, args=(lock, ready, over, results)) for _ in range(6)]
        for racer in racers:
            racer.start()
        assert sorted(results.get(timeout=60) for _ in racers) == [False] * 5 + [True]
        for racer in racers:
            racer.join()
    # Forks end without a word, but for Pythons that let them give back what they hold themselves (3.13.0).
    assert [path.name for path in lock.parent.iterdir()] in ([lock.name], [])


def test_lock_that_another_start_made_meanwhile_keeps_its_name(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an instant without it a third start could take the folder too."""
    write_lock(lock, pid=os.getppid(), ticks=1)
    other = json.dumps(dataclasses.asdict(folder_lock.this_process())).encode()
    touched: list[str] = []

    def take_over(path: Path, writer: Any) -> bool:
        if not touched:
            path.unlink()
            path.write_bytes(other)
            for name in ("unlink", "rename"):
                monkeypatch.setattr(Path, name, lambda self, *args, name=name, **options: touched.append(name))
        return False

    monkeypatch.setattr(folder_lock, "_is_alive", take_over)
    folder_lock._remove_stale(lock, "runs/demo", "set run.name=demo_2")
    assert touched == [] and lock.read_bytes() == other


def test_lock_of_a_folder_follows_links(tmp_path: Path) -> None:
    (tmp_path / "disk/run").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(tmp_path / "disk/run")
    assert folder_lock.beside(tmp_path / "runs/demo") == tmp_path / "disk/.run.lock"


def test_kill_while_locks_come_and_go_leaves_none_that_keeps_out(lock: Path) -> None:
    code = HOLD.replace("time.sleep(60)", "while True: folder_lock.release(Path(sys.argv[1])); take()").replace(
        'folder_lock.acquire(Path(sys.argv[1]), "runs/demo", "set run.name=demo_2")',
        'take = lambda: folder_lock.acquire(Path(sys.argv[1]), "runs/demo", "x")\ntake()',
    )
    for pause in (0.01, 0.03):
        process = subprocess.Popen([sys.executable, "-c", code, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        take(lock)
        folder_lock.release(lock)


@pytest.mark.parametrize("part", [[], ["--part", "0", "--parts", "2"]], ids=["whole", "part"])
def test_folder_of_a_conversion_has_one_writer(tmp_path: Path, part: list[str], capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lock = out / (".lock.00000.00002" if part else ".lock")
    hold_by_parent(lock)
    assert main(["convert", "digits", str(out), *part]) == 2
    text = rf"error: {out} is being written by pid {os.getppid()} on .* Wait, stop it, or choose another folder\.\n"
    assert re.fullmatch(text, capsys.readouterr().err)
    assert list(out.iterdir()) == [lock]
    lock.unlink()
    (out / ".partial").mkdir()
    (out / ".partial/shard").write_bytes(b"of a process that was killed")
    assert main(["convert", "digits", str(out), *part]) == 0
    assert not list(out.glob(".lock*")) and (part or not (out / ".partial").exists())


def test_refused_conversion_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert main(["convert", "folder", str(tmp_path / "images"), str(tmp_path / "new/out")]) == 2
    assert main(["convert", "digits", str(tmp_path / "new/out"), "--shard-size", "7 parsecs"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
