"""``run.remote``: a run whose machine is taken away goes on from its copy on a real S3 server, which is never torn."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from tests.conftest import ROOT, run_train
from tests.faults.conftest import Tell
from tests.faults.object_store import BUCKET, SECRET, Proxy, free_ports
from vitcomposer.callbacks import mirror
from vitcomposer.errors import ConfigError
from vitcomposer.runs.checkpoints import keep_as_best
from vitcomposer.runs.layout import REMOTE_POINTER
from vitcomposer.runs.remote import RunStore
from vitcomposer.stores.objects import open_store

pytestmark = pytest.mark.timeout(120)

SLOW = pytest.mark.slow


def tiny(runs: Path, name: str, *more: str) -> list[str]:
    """A run of 8 steps that takes a second or two, with a checkpoint after every second step."""
    return [
        f"run.folder={runs}",
        f"run.name={name}",
        "run.save_interval=2ba",
        "run.eval_interval=1ep",
        "run.log_interval=1ba",
        "run.progress_bar=false",
        "data.source=synthetic",
        "data.synthetic_samples=32",
        "data.num_workers=0",
        "evaluation.global_batch_size=8",
        "precision=fp32",
        "model.num_classes=4",
        "model.image_size=32",
        "model.patch_size=8",
        "model.depth=1",
        "global_train_batch_size=8",
        "max_duration=2ep",
        "schedule.t_warmup=1ba",
        *more,
    ]


def train(runs: Path, name: str, *more: str) -> int:
    return run_train([str(ROOT / "yamls/deit_ti.yaml"), *tiny(runs, name, *more)])


def stored(prefix: str) -> dict[str, bytes]:
    store = open_store(f"s3://{BUCKET}/{prefix}")
    return {name: store.read(name) or b"" for name in store.sizes()}


def files(folder: Path) -> dict[str, bytes]:
    """What of a run folder belongs on the store: its finished files."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
    return {name: content for name, content in names.items() if not name.startswith(".")}


def is_copy(kept: dict[str, bytes], folder: dict[str, bytes]) -> bool:
    """All but the older checkpoints: a store that was slow or down has not got one, and holds an older one for it."""
    older = set(sorted(name for name in folder if name.startswith("checkpoints/"))[:-1])
    missing = {name for name in folder if kept.get(name) != folder[name]}
    more = {name for name in kept.keys() - folder.keys() if not name.startswith("checkpoints/ep")}
    return REMOTE_POINTER in kept and missing <= older and more <= {REMOTE_POINTER}


def weights(folder: Path) -> dict[str, Any]:
    import torch

    return torch.load(folder / "checkpoints/latest-rank0.pt", weights_only=False)["state"]["model"]


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all((left[key] == right[key]).all() for key in left)


def stop_after(folder: Path, step: int) -> None:
    """SIGUSR1 to this process once the run has logged a step, as a machine that is about to be taken away sends it."""

    def watch() -> None:
        path, deadline = folder / "metrics.jsonl", time.monotonic() + 60
        while time.monotonic() < deadline:
            if path.exists() and path.read_text().count("\n") >= step:
                os.kill(os.getpid(), signal.SIGUSR1)
                return
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()


def test_run_goes_on_from_its_store_on_another_machine(
    bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], tell: Tell
) -> None:
    remote = f"run.remote={bucket}/runs"
    assert train(tmp_path / "unbroken", "run") == 0
    stop_after(tmp_path / "first" / "run", 3)
    assert train(tmp_path / "first", "run", remote) == 143
    left = files(tmp_path / "first" / "run")
    shutil.rmtree(tmp_path / "first")
    assert is_copy(stored("runs/run"), left)
    began = time.monotonic()
    assert train(tmp_path / "second", "run", remote) == 0
    seconds = time.monotonic() - began
    assert same(weights(tmp_path / "second/run"), weights(tmp_path / "unbroken/run"))
    best = [next((tmp_path / name / "run/best").iterdir()) for name in ("unbroken", "second")]
    assert len({path.name.partition("-")[2] for path in best}) == 1, "of the same step"
    steps = [json.loads(line)["step"] for line in (tmp_path / "second/run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))
    kept = stored("runs/run")
    assert is_copy(kept, files(tmp_path / "second/run"))
    out, err = capfd.readouterr()
    said = next(line for line in out.splitlines() if "came from" in line)
    tell("the machine of a run is taken away, its disk too", said, seconds)
    # Another machine again: the run is done, which its store knows too.
    assert train(tmp_path / "third", "run", remote) == 0
    assert "already done" in capfd.readouterr().out
    texts = [out, err, *(content.decode("latin-1") for content in kept.values())]
    assert not any(SECRET in text for text in texts), "the key of the store is nowhere"


@SLOW
def test_store_that_fails_stops_no_run_and_catches_up(
    bucket: str,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tell: Tell,
) -> None:
    monkeypatch.setattr(mirror, "_AT_THE_END", 2.0)
    proxy.rules({"fault": "reset", "methods": ["PUT", "POST"], "path": "/down/.*checkpoints/"})
    remote = f"run.remote={bucket}/down"
    assert train(tmp_path, "run", remote) == 74, "finished, but not all of it has arrived"
    said = [
        record.getMessage() for record in caplog.records if "run.remote" in record.message or bucket in record.message
    ]
    assert len([text for text in said if "cannot be written" in text]) == 1, "once, not for every try"
    assert REMOTE_POINTER not in stored("down/run")
    proxy.rules()
    began = time.monotonic()
    assert train(tmp_path, "run", remote) == 0
    assert is_copy(stored("down/run"), files(tmp_path / "run"))
    tell("the store of run.remote is down until the end of the run", said[-1], time.monotonic() - began)


@pytest.mark.parametrize("fault", ["a key that the store does not know", "a server that is gone"])
def test_store_that_cannot_be_used_is_an_error_before_the_first_step(
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
    tell: Tell,
) -> None:
    if fault == "a server that is gone":
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    else:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    began = time.monotonic()
    assert train(tmp_path, "run", f"run.remote={bucket}/runs") == 2
    seconds, said = time.monotonic() - began, capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: run.remote must be a place that this machine can read and write, got 's3://")
    assert seconds < 20
    tell(f"run.remote with {fault}", said, seconds)


def fake_run(folder: Path, step: int, **others: str) -> None:
    """Files as a run leaves them; the store does not look into them."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / f"checkpoints/ep0-ba{step}-rank0.pt").write_bytes(os.urandom(1000) + str(step).encode())
    for name, text in others.items():
        (folder / name.replace("_", ".")).write_text(text)


def test_store_keeps_what_the_folder_keeps(bucket: str, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    store = RunStore(f"{bucket}/unit", folder, keep=2)
    store.check()
    for step in (2, 4, 6):
        fake_run(folder, step, config_yaml="a", summary_json="{}")
        store.sync()
    assert store.sync() == 0, "nothing goes up twice"
    assert {name for name in stored("unit/kept")} == {
        "checkpoints/ep0-ba4-rank0.pt",
        "checkpoints/ep0-ba6-rank0.pt",
        REMOTE_POINTER,
        "config.yaml",
        "summary.json",
    }
    (folder / "summary.json").unlink()  # the run goes on for longer
    RunStore(f"{bucket}/unit", folder, keep=2).sync()
    assert "summary.json" not in stored("unit/kept"), "it would say that the run is finished"
    assert store.behind() == []


def test_best_checkpoint_is_on_the_store_and_comes_back(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, remote = tmp_path / "good", open_store(f"{bucket}/unit/good")
    store = RunStore(f"{bucket}/unit", folder, keep=1)
    for step in (2, 4):
        fake_run(folder, step)
        keep_as_best(folder / f"checkpoints/ep0-ba{step}-rank0.pt", folder / "best")
        store.sync()
    fake_run(folder, 6)
    store.sync()
    content = (folder / "best/ep0-ba4-rank0.pt").read_bytes()
    assert store.sync() == 0 and store.behind() == []
    kept = {"checkpoints/ep0-ba6-rank0.pt", "best/ep0-ba4-rank0.pt", REMOTE_POINTER}
    assert stored("unit/good").keys() == kept and remote.read("best/ep0-ba4-rank0.pt") == content
    shutil.rmtree(folder)
    again = RunStore(f"{bucket}/unit", folder, keep=1)
    assert again.fetch(None) is not None and (folder / "best/ep0-ba4-rank0.pt").read_bytes() == content
    assert again.sync() == 0, "what came is not sent back"
    remote.write("best/ep0-ba4-rank0.pt", b"torn")
    came = RunStore(f"{bucket}/unit", tmp_path / "elsewhere/good", keep=1).fetch(None)
    assert came is not None and not (tmp_path / "elsewhere/good/best/ep0-ba4-rank0.pt").exists()
    assert "best/ep0-ba4-rank0.pt is not whole: 4 bytes" in caplog.text


def test_checkpoint_that_is_damaged_on_the_store_is_passed_over(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, tell: Tell
) -> None:
    folder, began = tmp_path / "torn", time.monotonic()
    store = RunStore(f"{bucket}/unit", folder, keep=2)
    for step in (2, 4):
        fake_run(folder, step, config_yaml="a")
        store.sync()
    older = (folder / "checkpoints/ep0-ba2-rank0.pt").read_bytes()
    remote = open_store(f"{bucket}/unit/torn")
    remote.write("checkpoints/ep0-ba4-rank0.pt", b"torn")
    remote.write("checkpoints/ep0-ba6-rank0.pt", b"an upload that the pointer does not name yet")
    shutil.rmtree(folder)
    came = RunStore(f"{bucket}/unit", folder, keep=2).fetch(None)
    assert came is not None and came.read_bytes() == older and (came.parent / "latest-rank0.pt").samefile(came)
    assert (folder / "config.yaml").read_text() == "a"
    tell("the newest checkpoint is damaged on the store", caplog.messages[-1], time.monotonic() - began)
    remote.write("checkpoints/ep0-ba2-rank0.pt", b"torn too")
    with pytest.raises(ConfigError, match="run.remote .*no checkpoint on it is whole .*ep0-ba4.*ep0-ba2"):
        RunStore(f"{bucket}/unit", tmp_path / "elsewhere" / "torn", keep=2).fetch(None)


def test_machine_with_an_older_state_keeps_it_aside(bucket: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here" / "run", tmp_path / "there" / "run"
    for folder, step in ((here, 2), (there, 4)):
        fake_run(folder, step, config_yaml=str(step))
        RunStore(f"{bucket}/unit", folder, keep=2).sync()
    came = RunStore(f"{bucket}/unit", here, keep=2).fetch("ep0-ba2-rank0.pt")
    assert came == here / "checkpoints/ep0-ba4-rank0.pt" and (here / "config.yaml").read_text() == "4"
    (aside,) = tmp_path.glob("here/run.older-*")
    assert (aside / "checkpoints/ep0-ba2-rank0.pt").exists()
    assert RunStore(f"{bucket}/unit", here, keep=2).fetch("ep0-ba4-rank0.pt") is None, "it is as far"


def test_checkpoint_that_is_damaged_here_comes_back_from_the_store(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote, run = f"run.remote={bucket}/damaged", tmp_path / "run"
    assert train(tmp_path, "run", remote) == 0
    before, newest = weights(run), (run / "checkpoints/latest-rank0.pt").resolve()
    whole = newest.read_bytes()
    for path in (run / "checkpoints").glob("ep*.pt"):  # none is left here
        path.write_bytes(whole[:999] + b"x" + whole[1000:])
    capsys.readouterr()
    assert train(tmp_path, "run", remote) == 0
    assert f"{newest.name} came from {bucket}/damaged/run." in capsys.readouterr().out
    assert newest.read_bytes() == whole and same(weights(run), before)


def start(runs: Path, remote: str, ranks: int) -> subprocess.Popen[bytes]:
    """A run of its own process group, on its own ranks."""
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", str(ranks), "--master_port", str(free_ports(1)[0])]
    arguments = [str(ROOT / "yamls/deit_ti.yaml"), *tiny(runs, "run"), f"run.remote={remote}"]
    with open(runs.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, str(ROOT / "train.py"), *arguments],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


@SLOW
@pytest.mark.timeout(1200)
def test_kill_in_the_middle_of_an_upload_loses_only_that_checkpoint(
    bucket: str, proxy: Proxy, tmp_path: Path, tell: Tell
) -> None:
    """Two ranks are killed while one of the last two checkpoints goes up; the disk goes with them."""
    unbroken = start(tmp_path / "unbroken", f"{bucket}/unbroken", 2)
    assert unbroken.wait(400) == 0
    proxy.rules({"fault": "hang", "value": 300, "methods": ["PUT"], "path": "killed/.*ba[68]-"})
    run = start(tmp_path / "first", f"{bucket}/killed", 2)
    deadline = time.monotonic() + 300
    while not proxy.report()["faults"].get("hang"):
        assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "first.log").read_text()[-3000:]
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    shutil.rmtree(tmp_path / "first")
    proxy.rules()
    began = time.monotonic()
    again = start(tmp_path / "second", f"{bucket}/killed", 2)
    assert again.wait(400) == 0, (tmp_path / "second.log").read_text()[-3000:]
    seconds = time.monotonic() - began
    said = next(line for line in (tmp_path / "second.log").read_text().splitlines() if "came from" in line)
    assert "ep0-ba4" in said or "ep0-ba2" in said
    assert same(weights(tmp_path / "second/run"), weights(tmp_path / "unbroken/run"))
    assert is_copy(stored("killed/run"), files(tmp_path / "second/run"))
    tell("kill -9 of 2 ranks in the middle of an upload, and the disk is lost", said, seconds)


def test_uploads_catch_up_during_the_run(
    bucket: str, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture, tell: Tell
) -> None:
    folder, nothing = tmp_path / "later", cast(Any, None)  # neither state nor logger is looked at
    keeper = mirror.MirrorRun(RunStore(f"{bucket}/unit", folder, keep=2))
    proxy.rules({"fault": "status", "value": 503, "methods": ["PUT"]})
    began = time.monotonic()
    keeper.fit_start(nothing, nothing)
    for step in (2, 4):
        fake_run(folder, step)
        link = folder / "checkpoints/latest-rank0.pt"
        link.unlink(missing_ok=True)
        link.symlink_to(f"ep0-ba{step}-rank0.pt")
        before = time.perf_counter()
        keeper.batch_start(nothing, nothing)
        assert time.perf_counter() - before < 0.05, "a step does not wait"
    wait_for(lambda: any("cannot be written" in message for message in caplog.messages))
    proxy.rules()
    wait_for(lambda: any("is up to date again" in message for message in caplog.messages))
    keeper.close(nothing, nothing)
    assert {"checkpoints/ep0-ba4-rank0.pt", REMOTE_POINTER} <= stored("unit/later").keys()
    assert len(caplog.messages) == 2
    tell("the store of run.remote answers 503 for some seconds", caplog.messages[0], time.monotonic() - began)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
