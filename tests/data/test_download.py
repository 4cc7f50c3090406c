"""How often and for how long a store is asked for what a data set begins with."""

import logging
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError

from tests.data.mds.test_stream import open_stream, write_split
from vitcomposer.data.mds.stream import StreamOptions
from vitcomposer.errors import ConfigError
from vitcomposer.stores import download

REMOTE = "s3://bucket/photos"


class Asked:
    """What was asked for, and the pauses between; requests go through or are answered by ``answer``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Any = None) -> None:
        self.names: list[str] = []
        self.pauses: list[float] = []
        copy = download.OneTryS3._copy

        def ask(downloader: Any, client: Any, remote: str, local: str, timeout: float) -> None:
            self.names.append(urlsplit(remote).path.rpartition("/")[2])
            (answer or copy.__get__(downloader))(client, remote, local, timeout)

        monkeypatch.setattr(download.OneTryS3, "_copy", ask)
        # In this module alone: other threads sleep too.
        monkeypatch.setattr(download, "time", SimpleNamespace(**{**vars(download.time), "sleep": self.pauses.append}))


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("retries", [0, 5])
def test_server_that_is_not_there_is_asked_once_for_each_try(
    retries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch)
    often = r" \(6 tries in" if retries else r"\. Check"
    with pytest.raises(ConfigError, match=rf"class_names.json cannot be read: no connection to http://127\S+{often}"):
        open_stream(tmp_path / "cache", remote=REMOTE, options=StreamOptions(download_retry=retries))
    assert asked.names == ["class_names.json"] * (retries + 1)
    assert len(asked.pauses) == retries and sum(asked.pauses) <= 1.25 * 31


def answered(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize(("status", "code"), [(404, "NoSuchKey"), (403, "AccessDenied")])
def test_data_set_without_class_names_is_read(
    status: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bucket that may not be listed answers 403 for what is not there."""
    write_split(tmp_path / "data/train")

    def answer(client: Any, remote: str, local: str, timeout: float) -> None:
        if remote.endswith("class_names.json"):
            raise answered(status, code)
        shutil.copy(tmp_path / "data/train" / os.path.basename(remote), local)

    asked = Asked(monkeypatch, answer)
    with caplog.at_level(logging.INFO):
        open_stream(tmp_path / "cache", remote=REMOTE)
    assert asked.names == ["class_names.json", "index.json"] and not asked.pauses
    assert f"answered {status} {code}" in caplog.text
