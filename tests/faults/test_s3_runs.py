"""Streaming from a real S3 server into a cache that is too small, and into a run that is killed in the middle of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_train, tiny_photo_overrides
from tests.faults.conftest import Tell
from tests.faults.object_store import BUCKET, IMAGES, PER_SHARD, SECRET, Proxy, client
from tests.faults.test_remote_runs import stored
from tests.faults.test_s3 import SHARDS, open_loader
from tests.training.test_train import losses

DEIT = str(ROOT / "yamls/deit_ti.yaml")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_cache_that_holds_a_third_of_the_shards_gives_the_same_batches(
    images: Path, bucket: str, proxy: Proxy, tmp_path: Path, workers: int, tell: Tell
) -> None:
    """Two epochs through faults; what was evicted comes again, and the folder stays within its limit."""
    kilobytes, shards = 400, IMAGES // PER_SHARD
    expected = open_loader(images, workers, shuffle_block_size=2 * PER_SHARD)
    proxy.rules(
        {"fault": "status", "value": 503, "times": 2, "path": SHARDS},
        {"fault": "cut", "times": 2, "path": SHARDS},
        {"fault": "reset", "after": 0.5, "times": 1, "path": SHARDS},
    )
    limited = open_loader(
        tmp_path / "cache", workers, f"{bucket}/images", cache_limit=f"{kilobytes}kb", shuffle_block_size=2 * PER_SHARD
    )
    began = time.monotonic()
    for _ in range(2):
        assert list(limited) == list(expected)
    happened = proxy.report()["faults"]
    assert happened == {"status": 2, "cut": 2, "reset": 1}
    kept = [path.stat().st_size for path in (tmp_path / "cache/train").glob("*.mds")]
    assert 0 < sum(kept) <= 1024 * kilobytes and len(kept) < shards
    came = [request for request in proxy.requests() if request["path"].endswith(".mds")]
    assert len(came) > shards + sum(happened.values()), "some of them twice"
    tell(
        f"data.cache_limit of a third of the shards, and faults, {workers} workers", "nothing", time.monotonic() - began
    )


def start(mds: str, folder: Path, more: list[str]) -> subprocess.Popen[bytes]:
    overrides = [*tiny_photo_overrides(folder / "cache", folder, "run"), f"data.remote={mds}", *more]
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "train.py", DEIT, *overrides], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_kill_in_the_middle_of_a_shard_changes_nothing_and_no_secret_is_left(
    photo_mds: Path, bucket: str, proxy: Proxy, tmp_path: Path, tell: Tell
) -> None:
    connection = client(proxy.endpoint)
    for path in sorted(photo_mds.glob("*/*.*")):
        connection.upload_file(str(path), BUCKET, f"photos/{path.relative_to(photo_mds)}")
    last = sorted((photo_mds / "train").glob("*.mds"))[-1].name
    common = ["run.progress_bar=false", "run.save_interval=2ba", "data.predownload=16", "data.shuffle_block_size=16"]
    more = [*common, "data.num_workers=2", f"run.remote={bucket}/killed_runs", "augment.repeated_augmentation=1"]
    proxy.rules({"fault": "hang", "value": 300, "after": 0.5, "path": f"photos/train/{last}"})
    folder = tmp_path / "killed"
    run = start(f"{bucket}/photos", folder, more)
    try:
        deadline = time.monotonic() + 120
        while not proxy.report()["faults"].get("hang"):
            assert run.poll() is None and time.monotonic() < deadline, folder.with_suffix(".log").read_text()[-3000:]
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    halves = [path for path in (folder / "cache/train").iterdir() if path.name.startswith(f"{last}.")]
    assert halves and not (folder / "cache/train" / last).exists()
    proxy.rules()
    began = time.monotonic()
    assert start(f"{bucket}/photos", folder, more).wait(200) == 0, folder.with_suffix(".log").read_text()[-3000:]
    seconds = time.monotonic() - began
    whole = [*tiny_photo_overrides(photo_mds, tmp_path, "whole"), *common, "augment.repeated_augmentation=1"]
    assert run_train([DEIT, *whole]) == 0
    assert losses(folder / "run") == losses(tmp_path / "whole") and len(losses(folder / "run")) == 24
    for path in (photo_mds / "train").glob("*.mds"):
        assert (folder / "cache/train" / path.name).read_bytes() == path.read_bytes()
    kept = {f"copy/{name}": content for name, content in stored("killed_runs/run").items()}
    left = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".mds"}
    assert len(kept) > 5 and json.loads(left[str(folder / "run/environment.json")])
    assert not [name for name, content in {**kept, **left}.items() if SECRET.encode() in content]
    tell("kill -9 in the middle of a shard from S3", "the same losses", seconds)
