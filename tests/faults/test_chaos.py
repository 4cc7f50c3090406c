"""Ten kills of every command at moments drawn from a seed leave what an undisturbed one leaves, and no more."""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import PHOTOS, run_train, tiny_photo_overrides
from tests.data.conversion.conversion import tree, write_images
from tests.faults.conftest import Tell
from tests.faults.object_store import BUCKET, Proxy, Server, client
from tests.faults.small_run import DEIT, tiny
from tests.faults.started_runs import ReadyRanks, finish, ready
from tests.teacher.test_cache_teacher import YAML as CACHED
from tests.teacher.test_cache_teacher import overrides as overrides
from tests.teacher.test_cache_teacher import weights as weights
from tests.training.test_train import losses
from vitcomposer.data.mds import shared_memory as start

__all__ = ["overrides", "ready", "weights"]

OFTEN = 10

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def kill_often(
    arguments: Callable[[str], list[str]], ready: ReadyRanks, log: Path, *, seed: int, ranks: int = 1
) -> tuple[int, float]:
    """Run a command undisturbed into ``whole``, then into ``killed`` with OFTEN kills and once to its end.

    Returns:
        How many kills met the command before its end, and the seconds of the last start.
    """
    rng = random.Random(seed)
    began = time.monotonic()
    assert finish(ready.start(arguments("whole"), log, ranks=ranks)) == 0, log.read_text()[-3000:]
    seconds, met = time.monotonic() - began, 0
    for _ in range(OFTEN):
        run = ready.start(arguments("killed"), log, ranks=ranks)
        time.sleep(rng.uniform(0.05, seconds))
        met += run.poll() is None
        run.kill()
    began = time.monotonic()
    assert finish(ready.start(arguments("killed"), log, ranks=ranks)) == 0, log.read_text()[-3000:]
    return met, time.monotonic() - began


def left_over(folder: Path) -> list[str]:
    """Files of a work that was not finished, in a folder and beside it."""
    return [str(path) for path in folder.parent.rglob("*") if "partial" in path.name or path.name.endswith(".tmp")]


def test_ten_kills_of_convert_change_no_byte(ready: ReadyRanks, tmp_path: Path, tell: Tell) -> None:
    write_images(tmp_path / "photos", {"ant": 300, "bee": 300}, size=120)
    (tmp_path / "out").mkdir()

    def arguments(name: str) -> list[str]:
        source, out = str(tmp_path / "photos"), str(tmp_path / "out" / name)
        options = ["--val-fraction", "0.1", "--shard-size", "200kb", "--workers", "2"]
        return ["vitcomposer", "convert", "folder", source, out, *options]

    met, seconds = kill_often(arguments, ready, tmp_path / "log", seed=1)
    assert tree(tmp_path / "out/killed") == tree(tmp_path / "out/whole") and met > 0
    assert left_over(tmp_path / "out/killed") == []
    tell(f"kill -9 of convert, {met} times", "the same bytes as without", seconds)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_kills_of_cache_teacher_change_no_byte(
    ranks: int, overrides: list[str], ready: ReadyRanks, tmp_path: Path, tell: Tell
) -> None:
    (tmp_path / "out").mkdir()

    def arguments(name: str) -> list[str]:
        cache = f"cache.local={tmp_path / 'out' / name}"
        return ["vitcomposer", "cache-teacher", CACHED, *overrides, cache, "--crop-sets", "8", "--shard-images", "16"]

    met, seconds = kill_often(arguments, ready, tmp_path / "log", seed=2 + ranks, ranks=ranks)
    assert tree(tmp_path / "out/killed") == tree(tmp_path / "out/whole") and met > 0
    assert left_over(tmp_path / "out/killed") == []
    tell(f"kill -9 of cache-teacher on {ranks} ranks, {met} times", "the same bytes as without", seconds)


def test_ten_kills_of_export_leave_a_whole_one(
    trained_run: Path, ready: ReadyRanks, tmp_path: Path, tell: Tell
) -> None:
    (tmp_path / "out").mkdir()

    def arguments(name: str) -> list[str]:
        return ["vitcomposer", "export", str(trained_run), "--out", str(tmp_path / "out" / name), "--force"]

    met, seconds = kill_often(arguments, ready, tmp_path / "log", seed=5)
    assert tree(tmp_path / "out/killed") == tree(tmp_path / "out/whole") and met > 0
    assert left_over(tmp_path / "out/killed") == []
    tell(f"kill -9 of export, {met} times", "a whole export, nothing beside it", seconds)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_kills_while_the_report_is_written_lose_none(
    ranks: int, ready: ReadyRanks, tmp_path: Path, tell: Tell
) -> None:
    """A finished run whose report is gone: `already done` writes it."""
    assert finish(ready.start([DEIT, *tiny(tmp_path, "run")], tmp_path / "log", ranks=ranks)) == 0
    expected = (tmp_path / "run/report.html").read_bytes()

    def arguments(_: str) -> list[str]:
        (tmp_path / "run/report.html").unlink(missing_ok=True)
        return [DEIT, *tiny(tmp_path, "run")]

    met, seconds = kill_often(arguments, ready, tmp_path / "log", seed=7 + ranks, ranks=ranks)
    assert (tmp_path / "run/report.html").read_bytes() == expected and met > 0
    assert left_over(tmp_path / "run/checkpoints") == []
    tell(f"kill -9 at the report on {ranks} ranks, {met} times", "written by the next start", seconds)


def streamed(mds: str, folder: Path, name: str) -> list[str]:
    """Each shard is asked for when its turn comes, epochs of 24 steps."""
    photo_run = tiny_photo_overrides(folder / f"cache_{name}", folder, name)
    slow = ["data.predownload=16", "data.shuffle_block_size=16", "data.num_workers=1", "run.save_interval=2ba"]
    return [DEIT, *photo_run, f"data.remote={mds}", *slow, "run.progress_bar=false"]


@pytest.fixture
def photos(photo_mds: Path, bucket: str, proxy: Proxy) -> str:
    connection = client(proxy.endpoint)
    for path in sorted(photo_mds.glob("*/*.*")):
        connection.upload_file(str(path), BUCKET, f"chaos/{path.relative_to(photo_mds)}")
    return f"{bucket}/chaos"


def test_an_s3_server_that_restarts_in_mid_epoch_changes_nothing(
    photos: str, photo_mds: Path, server: Server, proxy: Proxy, ready: ReadyRanks, tmp_path: Path, tell: Tell
) -> None:
    log = tmp_path / "log"
    # The address of the proxy stays the same; its rule slows the run, so that the restart meets it.
    proxy.rules({"fault": "latency", "value": 0.5, "path": r"\.mds"})
    run = started(streamed(photos, tmp_path, "run"), proxy, log)
    wait_for_shard(proxy, run, log)
    server.kill()
    time.sleep(3)
    began = time.monotonic()
    server.start()
    assert finish(run) == 0, log.read_text()[-3000:]
    seconds = time.monotonic() - began
    assert run_train(streamed(str(photo_mds), tmp_path, "whole")) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(losses(tmp_path / "run")) == 24
    tell("the S3 server restarts in mid-epoch", "the same losses", seconds)


def test_credentials_that_expire_in_mid_epoch_end_the_run_with_one_line_and_new_ones_go_on(
    photos: str, photo_mds: Path, proxy: Proxy, tmp_path: Path, tell: Tell
) -> None:
    log = tmp_path / "log"
    proxy.rules({"fault": "latency", "value": 0.5, "path": r"\.mds"})
    run = started(streamed(photos, tmp_path, "run"), proxy, log)
    wait_for_shard(proxy, run, log)
    began = time.monotonic()
    proxy.rules({"fault": "status", "value": 400, "path": r"\.mds"})
    assert finish(run) == 1
    seen = log.read_text().splitlines()[-1]
    assert seen.startswith("error: ") and "ExpiredToken" in seen and "Traceback" not in log.read_text()
    seconds = time.monotonic() - began
    proxy.rules()
    assert finish(started(streamed(photos, tmp_path, "run"), proxy, log)) == 0, log.read_text()[-3000:]
    assert run_train(streamed(str(photo_mds), tmp_path, "whole")) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    tell("credentials expire in mid-epoch", seen, seconds)


def started(arguments: list[str], proxy: Proxy, log: Path) -> "Started":
    return Started(arguments, proxy.endpoint, log)


class Started:
    """train.py in a process of its own: one that was forked earlier has another address of the store."""

    def __init__(self, arguments: list[str], endpoint: str, log: Path) -> None:
        import subprocess
        import sys

        from tests.conftest import ROOT

        variables = {**os.environ, "OMP_NUM_THREADS": "1", "S3_ENDPOINT_URL": endpoint}
        with log.open("a") as file:
            command = [sys.executable, "train.py", *arguments]
            self.process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=file)
        self.poll = self.process.poll


def wait_for_shard(proxy: Proxy, run: "Started", log: Path) -> None:
    """Until a shard of the training split has come."""
    deadline = time.monotonic() + 200
    while not any(request["path"].endswith(".mds") for request in proxy.requests()):
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def test_twenty_runs_in_a_row_leave_no_file(ready: ReadyRanks, photo_mds: Path, tmp_path: Path, tell: Tell) -> None:
    def listing() -> set[str]:
        """Without what other runs of this machine hold."""
        blocks = {
            str(path) for path in start._belongings() if not start._is_held(path.with_name(f"{path.name[:6]}_locals"))
        }
        return blocks | {f"{ready.temporary}/{name}" for name in os.listdir(ready.temporary)}

    arguments = [DEIT, *tiny_photo_overrides(photo_mds, tmp_path, "run"), "max_duration=2ba", "model.depth=1"]
    more = ["data.num_workers=2", "run.progress_bar=false", f"model.num_classes={len(PHOTOS)}"]
    began, before = time.monotonic(), None
    for ranks in (1, 2) * 10:
        assert finish(ready.start([*arguments, *more], tmp_path / "log", ranks=ranks)) == 0
        shutil.rmtree(tmp_path / "run")
        before = listing() if before is None else before  # after the first, which makes what all of them use
    assert listing() <= (before or set())
    tell("twenty runs in a row", "no file more in /dev/shm and the temporary folder", time.monotonic() - began)
