"""Keeps a copy of a run folder on an object store: what is new goes up, and the newest whole checkpoint comes back."""

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash
from composer.utils import (
    GCSObjectStore,
    LibcloudObjectStore,
    ObjectStore,
    OCIObjectStore,
    S3ObjectStore,
    maybe_create_object_store_from_uri,
    parse_uri,
)

from vitcomposer.errors import ConfigError
from vitcomposer.foundations import delete_from_libcloud
from vitcomposer.runs import layout
from vitcomposer.stores.addresses import masked
from vitcomposer.whole_files import PARTIAL

log = logging.getLogger(__name__)

DOWNLOADED = ".part"  # ends the name of what has not arrived here
_LAST = (layout.SUMMARY, layout.REPORT)  # they say that a run is finished: never beside an older checkpoint
_FOLDER = f"{layout.CHECKPOINTS}/"
_CHECKPOINT = re.compile(re.escape(_FOLDER) + layout.CHECKPOINT.pattern)
_BEST_FOLDER = f"{layout.BEST}/"
_BEST = re.compile(re.escape(_BEST_FOLDER) + layout.CHECKPOINT.pattern)
_PASSING = (DOWNLOADED, PARTIAL, ".tmp", ".lock")
_ATTEMPTS = 3
# Bounded, since boto3's own time-outs and retries add up to minutes without a word.
_S3_CLIENT = {
    "connect_timeout": 10,
    "read_timeout": 30,
    "retries": {"mode": "standard", "total_max_attempts": 2},
    "tcp_keepalive": True,
}


@dataclass(frozen=True)
class Whole:
    """A checkpoint that has arrived."""

    name: str  # in the run folder
    bytes: int
    xxh64: str


@dataclass(frozen=True)
class _Pointer:
    """What ``layout.REMOTE_POINTER`` names: the checkpoints that have arrived, newest first, and the best one."""

    checkpoints: list[Whole]
    best: Whole | None = None


class RunStore:
    """The copy of one run folder below ``uri``, under the folder's name.

    A checkpoint is named by ``layout.REMOTE_POINTER`` only after all of it has arrived, so an upload that was cut off
    is never found. Not safe in several processes at a time: rank 0 sends.
    """

    def __init__(self, uri: str, folder: Path, *, keep: int) -> None:
        """``keep`` is how many checkpoints stay on the store.

        Raises:
            ConfigError: The store cannot be reached, or its package is not installed.
        """
        self.uri, self.folder, self._keep = f"{uri.rstrip('/')}/{folder.name}", folder, keep
        with self._explained():
            self._store = _open(uri)
        self._prefix = "/".join(part for part in (parse_uri(uri)[2].strip("/"), folder.name) if part)
        self._sent: dict[str, list[int]] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # then all is sent again
            state = json.loads((folder / layout.REMOTE_STATE).read_bytes())
            if state["uri"] == self.uri:
                self._sent = {name: [int(size), int(time)] for name, (size, time) in state["sent"].items()}

    def check(self) -> None:
        """Raise ConfigError unless this machine may write and delete here."""
        probe = self.folder / layout.REMOTE_HELD / "access"
        with self._explained():
            shutil.rmtree(probe.parent, ignore_errors=True)  # what a killed run has held
            probe.parent.mkdir(parents=True)
            probe.write_text("Written to see whether it can be.\n")
            self._upload(".access", probe)
            self._delete(".access")
        probe.unlink()

    def fetch(self, here: str | None) -> Path | None:
        """Make the run folder that of the newest whole checkpoint on the store, unless this machine is as far.

        A folder of an older state of the run is moved aside.

        Args:
            here: File name of the newest whole checkpoint on this machine.

        Returns:
            The checkpoint that came, or None.

        Raises:
            ConfigError: The store cannot be read, or no checkpoint on it is whole.
        """
        with self._explained():
            pointer = self._read_pointer()
            known = pointer.checkpoints
            if not known or (here is not None and _place(here) >= _place(known[0].name)):
                return None
            if here is not None:
                aside = self.folder.with_name(f"{self.folder.name}.older-{int(time.time())}")
                self.folder.rename(aside)
                log.warning("%s is further than %s, which is now %s.", self.uri, self.folder, aside)
            names = self._names()
            for name in names:
                if not name.startswith((_FOLDER, _BEST_FOLDER)):
                    self._download(name)
            came = self._fetch_checkpoint(known)
            self._fetch_best(pointer.best)
            return came

    def behind(self) -> list[str]:
        """Files that are not on the store as they are here."""
        return [name for name, version in self._files().items() if self._sent.get(name) != version]

    def sync(self) -> int:
        """Send what has changed since the last call; returns the number of files.

        Raises:
            Exception: Whatever the store raises; what went up before is remembered.
        """
        files = self._files()
        for name in [name for name in self._sent if name not in files and not _is_checkpoint(name)]:
            self._delete(name)
            self._remember(name, None)
        changed = [name for name in self.behind() if name in files]
        checkpoints = [name for name in changed if _is_checkpoint(name)]
        others = [name for name in changed if name not in checkpoints]
        for name in checkpoints:  # the newest, with which the run goes on, before the best
            self._send_checkpoint(name, files[name])
        for name in sorted(others, key=lambda name: name in _LAST):
            self._upload(name, self.folder / name)
            self._remember(name, files[name])
        return len(changed)

    def _files(self) -> dict[str, list[int]]:
        """Size and time of the newest checkpoint, of the best one, then of all other finished files."""
        found: dict[str, list[int]] = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
            if hidden or path.suffix in _PASSING or path.is_symlink() or not path.is_file():
                continue
            with contextlib.suppress(FileNotFoundError):  # gone since
                status = path.stat()
                found[name] = [status.st_size, status.st_mtime_ns]
        kinds = ([name for name in found if kind.fullmatch(name)] for kind in (_CHECKPOINT, _BEST))
        newest = [max(names, key=_place) for names in kinds if names]  # a kill may leave two that were the best
        others = [name for name in found if not name.startswith((_FOLDER, _BEST_FOLDER))]
        return {name: found[name] for name in [*newest, *others]}

    def _send_checkpoint(self, name: str, version: list[int]) -> None:
        arrived = self._send_held(name, version)
        if arrived is None:
            return
        pointer = self._read_pointer()
        if _BEST.fullmatch(name):
            self._write_pointer(_Pointer(pointer.checkpoints, arrived))
            kept, stored = [arrived], self._names(f"{_BEST_FOLDER}ep")
        else:
            older = [one for one in pointer.checkpoints if _place(one.name) < _place(name)]
            kept, stored = [arrived, *older][: self._keep], self._names(f"{_FOLDER}ep")
            self._write_pointer(_Pointer(kept, pointer.best))
        self._remember(name, version)
        for old in set(stored) - {one.name for one in kept}:
            self._delete(old)
            self._remember(old, None)

    def _send_held(self, name: str, version: list[int]) -> Whole | None:
        """Send a checkpoint; None where the run has deleted it, since there is another one."""
        held = self.folder / layout.REMOTE_HELD / Path(name).name
        held.parent.mkdir(exist_ok=True)
        held.unlink(missing_ok=True)
        try:
            os.link(self.folder / name, held)  # the run may delete it meanwhile
        except FileNotFoundError:
            return None
        except OSError:  # a disk without links
            held = self.folder / name
        try:
            arrived = Whole(name, version[0], _hash(held))
            self._upload(name, held)
            return arrived
        finally:
            if held.parent.name == layout.REMOTE_HELD:
                held.unlink(missing_ok=True)

    def _write_pointer(self, pointer: _Pointer) -> None:
        path = self.folder / layout.REMOTE_HELD / Path(layout.REMOTE_POINTER).name
        path.write_text(json.dumps(asdict(pointer), indent=2) + "\n")
        self._upload(layout.REMOTE_POINTER, path)
        path.unlink()

    def _read_pointer(self) -> _Pointer:
        """Empty where the run has not got so far."""
        place = self.folder / layout.REMOTE_HELD / Path(layout.REMOTE_POINTER).name
        try:
            self._store.download_object(self._key(layout.REMOTE_POINTER), place, overwrite=True)
        except FileNotFoundError:
            # Composer calls a refusal (403) that too, while listing tells the difference.
            if layout.REMOTE_POINTER in self._names(_FOLDER):
                raise PermissionError(f"{layout.REMOTE_POINTER} is there and may not be read") from None
            return _Pointer([])
        found = json.loads(place.read_text())
        place.unlink()
        best = found.get("best")  # which earlier versions did not send
        return _Pointer([Whole(**one) for one in found["checkpoints"]], Whole(**best) if best else None)

    def _fetch_checkpoint(self, known: list[Whole]) -> Path:
        faults = []
        for one in known:
            if not _CHECKPOINT.fullmatch(one.name):
                continue
            try:
                path = self._download(one.name, expected=one)
            except (ValueError, FileNotFoundError) as error:
                faults.append(f"{one.name}: {error}")
                log.warning("%s/%s is not whole: %s", self.uri, one.name, error)
                continue
            latest = path.with_name(layout.LATEST)
            latest.unlink(missing_ok=True)
            latest.symlink_to(path.name)
            return path
        raise ValueError(f"no checkpoint on it is whole ({'; '.join(faults)})")

    def _fetch_best(self, best: Whole | None) -> None:
        if best is None or not _BEST.fullmatch(best.name):
            return
        try:
            self._download(best.name, expected=best)
        except (ValueError, FileNotFoundError) as error:  # the run goes on without it
            log.warning("%s/%s is not whole: %s", self.uri, best.name, error)

    def _download(self, name: str, expected: Whole | None = None) -> Path:
        path = self.folder / name
        part = path.with_name(path.name + DOWNLOADED)
        _retried(lambda: self._store.download_object(self._key(name), part, overwrite=True))
        if expected is not None:
            size, found = part.stat().st_size, _hash(part)
            if (size, found) != (expected.bytes, expected.xxh64):
                part.unlink()
                raise ValueError(f"{size} bytes with xxh64 {found}, expected {expected.bytes} with {expected.xxh64}")
        os.replace(part, path)
        status = path.stat()
        self._remember(name, [status.st_size, status.st_mtime_ns])
        return path

    def _names(self, prefix: str = "") -> list[str]:
        """Names of the objects of this run; those that would not stay in the folder are left out."""
        keys = self._store.list_objects(self._key(prefix))
        names = [key.removeprefix(self._key("")) for key in keys]
        return [name for name in names if name and ".." not in PurePosixPath(name).parts and name[0] not in "./"]

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _upload(self, name: str, path: Path) -> None:
        self._store.upload_object(self._key(name), path)

    def _delete(self, name: str) -> None:
        _delete(self._store, self._key(name))

    def _remember(self, name: str, version: list[int] | None) -> None:
        if version is None:
            self._sent.pop(name, None)
        else:
            self._sent[name] = version
        path = self.folder / layout.REMOTE_STATE
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(layout.REMOTE_STATE + PARTIAL)
        partial.write_text(json.dumps({"uri": self.uri, "sent": self._sent}))
        partial.replace(path)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every object store has its own
            remedy = "See docs/object_stores.md for what each store reads from the environment."
            raise ConfigError(
                f"run.remote must be a place that this machine can read and write, got {masked(self.uri)!r}: "
                f"{describe(error)}. {remedy}"
            ) from error


def describe(error: BaseException) -> str:
    """An error of a store in one line, without credentials."""
    return masked(f"{type(error).__name__}: {error}").replace("\n", " ").rstrip(". ")


def restore_remote(uri: str, folder: Path, *, keep: int, here: str | None) -> None:
    """At the start of a run: make sure that its store can be used, and go on from there where this machine is behind.

    Args:
        here: File name of the newest whole checkpoint on this machine.

    Raises:
        ConfigError: The store cannot be used, or holds no whole checkpoint of the run that it should hold.
    """
    store = RunStore(uri, folder, keep=keep)
    store.check()
    came = store.fetch(here)
    if came is not None:
        print(f"{folder}: {came.name} came from {store.uri}.")


def _is_checkpoint(name: str) -> bool:
    return any(kind.fullmatch(name) for kind in (_CHECKPOINT, _BEST))


def _place(name: str) -> tuple[int, int]:
    """Step and epoch of a checkpoint: at the end of an epoch there may be two of one step."""
    found = layout.CHECKPOINT.fullmatch(PurePosixPath(name).name)
    return (int(found[2]), int(found[1])) if found else (-1, -1)


def _hash(path: Path) -> str:
    digest = xxhash.xxh64()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _retried(act: Any) -> None:
    """Bodies that break off, which the stores' clients don't all ask for again."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            act()
            return
        except FileNotFoundError:
            raise
        except Exception as error:  # every object store has its own
            if not left:
                raise
            log.info("%s. Another try follows.", describe(error))
            time.sleep(1.0)


def _open(uri: str) -> ObjectStore:
    if uri.startswith("s3://"):
        return S3ObjectStore(parse_uri(uri)[1], client_config=dict(_S3_CLIENT))
    store = maybe_create_object_store_from_uri(uri)
    assert store is not None, "the schema allows addresses of stores only"
    return store


def _delete(store: ObjectStore, key: str) -> None:
    """What Composer's stores lack: to delete an object, or nothing where there is none."""
    if isinstance(store, GCSObjectStore) and store.s3_object_store is not None:
        store = store.s3_object_store
    if isinstance(store, S3ObjectStore):
        store.client.delete_object(Bucket=store.bucket, Key=store.get_key(key))
    elif isinstance(store, GCSObjectStore):
        store.bucket.blob(store.get_key(key)).delete()
    elif isinstance(store, OCIObjectStore):
        store.client.delete_object(store.namespace, store.bucket, key)
    elif isinstance(store, LibcloudObjectStore):
        delete_from_libcloud(store, key)
