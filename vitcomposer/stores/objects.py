"""Reads and writes a converted data set in a local folder or at ``s3://bucket/prefix``, by the same five operations.

Names are ``/``-separated and relative to the root. A name holds either nothing or a complete object, never a part of
one, which is what makes a conversion that was killed safe to continue.
"""

import contextlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from vitcomposer.folder_lock import only_writer
from vitcomposer.schema import require_plain_address
from vitcomposer.stores.addresses import masked, s3_endpoint

_PARTIAL = ".partial"
_READS = 4  # of a body that breaks off, which boto3 does not ask for again


def _check_size(where: str, size: int | None, most: int | None) -> None:
    if size is None:
        raise ValueError(f"{where} is no file.")
    if most is not None and size > most:
        raise ValueError(f"{where} has {size} bytes, at most {most} are expected. Do not use this data.")


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe too, that it can be told."""
    return os.open(path, flags | os.O_NONBLOCK)


class LocalStore:
    """A folder. Files are written beside the data set and moved into place."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.url = str(root)

    def check(self) -> None:
        """Raise ValueError unless the folder exists or can be made."""
        with self._explained():
            self.root.mkdir(parents=True, exist_ok=True)

    def one_writer(self, part: str = "") -> contextlib.AbstractContextManager[Any]:
        """Keep other processes from writing here, or from making the same ``part`` of what is written here.

        Raises:
            ConfigError: One does.
            ValueError: The folder cannot be written.
        """
        stack = contextlib.ExitStack()
        with self._explained():
            stack.enter_context(only_writer(self.root / f".lock{part}", self.url, "choose another folder"))
        return stack

    def free_bytes(self) -> int | None:
        """Room left on the disk."""
        return shutil.disk_usage(self.root).free

    def read(self, name: str, start: int = 0, stop: int | None = None, *, most: int | None = None) -> bytes | None:
        """Bytes ``start`` to ``stop`` of an object, or None when there is no such object.

        Raises:
            ValueError: It is no file, or has more than ``most`` bytes.
        """
        try:
            with open(self.root / name, "rb", opener=_without_waiting) as file:
                status = os.fstat(file.fileno())
                _check_size(f"{self.root / name}", status.st_size if stat.S_ISREG(status.st_mode) else None, most)
                file.seek(start)
                return file.read() if stop is None else file.read(stop - start)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Create or replace an object."""
        partial = self.root / _PARTIAL / f"{uuid.uuid4().hex}-{name.replace('/', '-')}"
        target = self.root / name
        with self._explained():
            for folder in (partial.parent, target.parent):
                folder.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a done-marker must never reach the disk before its shard
            os.replace(partial, target)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object whose name starts with ``prefix``, a folder's name with its slash."""
        names = (Path(folder) / name for folder, _, names in os.walk(self.root / prefix) for name in names)
        return {path.relative_to(self.root).as_posix(): path.stat().st_size for path in names}

    def folders(self) -> list[str]:
        """Names of the folders directly below the root."""
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir()) if self.root.is_dir() else []

    def clean(self) -> None:
        """Remove what a killed conversion left half written, and the locks of killed parts."""
        shutil.rmtree(self.root / _PARTIAL, ignore_errors=True)
        for left in self.root.glob(".lock.*"):
            left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.url} cannot be written: {error.strerror}. Make room or choose another folder, then call again: "
                "finished shards are kept."
            ) from error


class S3Store:
    """A prefix of a bucket of S3 or of a server that speaks its protocol (``S3_ENDPOINT_URL``)."""

    def __init__(self, url: str) -> None:
        match = re.fullmatch(r"s3://([^/]+)/*(.*?)/*", url)  # readers leave out slashes before the key too
        if not match:
            raise ValueError(f"An S3 address must read s3://bucket/prefix, got {url!r}.")
        self.url = url.rstrip("/")
        self.bucket = match[1]
        self.prefix = f"{match[2]}/" if match[2] else ""
        self._connection: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}  # a connection belongs to one process

    @property
    def _client(self) -> Any:
        if self._connection is None:
            import boto3.session
            from botocore.config import Config

            retries: Any = {"mode": "standard", "max_attempts": 5}
            endpoint = os.environ.get("S3_ENDPOINT_URL") or None  # the variable that Streaming and Composer read
            config = Config(retries=retries, connect_timeout=20, read_timeout=60, tcp_keepalive=True)
            self._connection = boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
        return self._connection

    def check(self) -> None:
        """Raise ValueError unless the bucket answers."""
        with self._explained("reached"):
            self._client.head_bucket(Bucket=self.bucket)

    def one_writer(self, part: str = "") -> contextlib.AbstractContextManager[Any]:
        """Nothing: a bucket has no lock. Objects are whole, and a plan on record refuses another one."""
        return contextlib.nullcontext()

    def free_bytes(self) -> int | None:
        """None: a bucket has no limit that could be asked for."""
        return None

    def read(self, name: str, start: int = 0, stop: int | None = None, *, most: int | None = None) -> bytes | None:
        """As ``LocalStore.read``."""
        span = {} if start == 0 and stop is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

        with self._explained("read"):
            for again in reversed(range(_READS)):
                try:
                    answer = self._client.get_object(Bucket=self.bucket, Key=self.prefix + name, **span)
                except self._client.exceptions.NoSuchKey:
                    return None
                _check_size(f"{self.url}/{name}", answer["ContentLength"], most)
                try:
                    return answer["Body"].read()
                except (FlexibleChecksumError, HTTPClientError, IncompleteReadError):
                    if not again:
                        raise
        return None

    def write(self, name: str, data: bytes) -> None:
        """Create or replace an object; large ones go up in several parts at once."""
        with self._explained("written"):
            self._client.upload_fileobj(BytesIO(data), self.bucket, self.prefix + name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object whose name starts with ``prefix``."""
        pages = self._pages(Prefix=self.prefix + prefix)
        return {found["Key"][len(self.prefix) :]: found["Size"] for page in pages for found in page.get("Contents", [])}

    def folders(self) -> list[str]:
        """Names of the folders directly below the prefix."""
        pages = self._pages(Prefix=self.prefix, Delimiter="/")
        found = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", [])]
        return sorted(key[len(self.prefix) :].rstrip("/") for key in found)

    def clean(self) -> None:
        """Nothing to do: an upload that was cut off leaves no object."""

    def _pages(self, **request: str) -> list[dict[str, Any]]:
        with self._explained("listed"):
            return list(self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, **request))

    @contextlib.contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error) as error:
            raise ValueError(
                f"{self.url} cannot be {verb} at {s3_endpoint()}: {masked(str(error))}. Check the bucket, the network, "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, then call again: finished shards are kept."
            ) from error


Store = LocalStore | S3Store


def open_store(location: str | Path) -> Store:
    """The store at a path or ``s3://`` address; nothing is read or made yet.

    Raises:
        ValueError: Another kind of address, or one that ``data.remote`` would refuse.
    """
    text = os.fspath(location)
    require_plain_address("The address of a data set", text)
    if text.startswith("s3://"):
        return S3Store(text)
    if "://" in text:
        raise ValueError(f"A data set must be in a local folder or at s3://bucket/prefix, got {text!r}. Copy it there.")
    return LocalStore(text)
