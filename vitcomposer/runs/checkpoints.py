"""Writes and finds the checkpoints of a run: each appears whole or not at all, and a run resumes from the newest."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash

from vitcomposer.models.weights.load import check_harmless
from vitcomposer.models.weights.plain_pickle import UnsafeError
from vitcomposer.models.weights.sharded import DIGESTS, check_shares
from vitcomposer.models.weights.torch_file import check_directory, check_torch_file
from vitcomposer.models.weights.zip_records import with_digest
from vitcomposer.runs import layout
from vitcomposer.whole_files import PARTIAL


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from.

    Attributes:
        refused: ``name: why``, of newer ones that are not whole.
        unsafe: Of these, what the first that could run code needs.
        digest: Whether it carries a digest of its bytes, which older versions did not write.
    """

    path: Path | None
    refused: tuple[str, ...]
    unsafe: str | None = None
    digest: bool = False


def has_checkpoints(folder: Path) -> bool:
    """Whether a run has saved anything there, whole or not."""
    return bool(_in_order(folder)) or os.path.lexists(folder / layout.LATEST)


def last_step(folder: Path) -> int | None:
    """The step of the newest checkpoint by its name, without a look into it; None where there is none."""
    names = [match for path in _in_order(folder) if (match := layout.CHECKPOINT.fullmatch(path.name))]
    return int(names[0][2]) if names else None


def newest_whole(folder: Path) -> Found:
    """The checkpoint that ``latest`` leads to, or else that of the latest step; each file is read to its end for it.

    Whatever keeps one from being read has the one before it tried.
    """
    candidates, refused, unsafe = _in_order(folder), [], None
    latest = folder / layout.LATEST
    if os.path.lexists(latest):
        # No link where a copy was made by something that follows them.
        first = folder / os.readlink(latest) if latest.is_symlink() else latest
        candidates = [first, *(path for path in candidates if path != first)]
    for path in candidates:
        try:
            digest = _check(path)
            ranks_and_step(path)
        except UnsafeError as error:
            unsafe = unsafe or f"{path} needs {error}, and loading that can run any code"
            refused.append(f"{path.name}: it needs {error}, which is no weights or numbers")
        except (OSError, ValueError) as error:
            refused.append(f"{path.name}: {_reason(error)}")
        else:
            return Found(path, tuple(refused), unsafe, digest)
    return Found(None, tuple(refused), unsafe)


def _in_order(folder: Path) -> list[Path]:
    """Checkpoints by their names, the latest step first; of two of one step the one after the end of its epoch."""
    found = [(match, path) for path in folder.glob("*.pt") if (match := layout.CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda each: _place(each[0]), reverse=True)]


def _place(name: re.Match[str]) -> tuple[int, int]:
    return int(name[2]), int(name[1])


def damage(path: Path, *, read: bool = True) -> str | None:
    """What keeps a file or folder from being a whole checkpoint, or None.

    Args:
        read: Compare every byte with its digest or checksum; else look at sizes and the directory at the end alone.
    """
    try:
        _check(path, read=read)
    except (OSError, ValueError) as error:
        return _reason(error)
    return None


def _check(path: Path, *, read: bool = True) -> bool:
    """Whether a whole checkpoint carries a digest.

    Raises:
        OSError, ValueError: It is not whole, or would run code.
    """
    status = path.stat()
    if path.is_dir():
        check_shares(path, read=read)
        return (path / DIGESTS).is_file()
    return _check_file(path, status.st_size, status.st_mtime_ns, read)


@lru_cache(maxsize=16)  # a start asks twice
def _check_file(path: Path, size: int, changed: int, read: bool) -> bool:
    return (check_torch_file if read else check_directory)(path)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    return f"{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


class _DigestWriter:
    """A file that keeps the digest of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, xxhash.xxh3_128()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def append_digest(self) -> None:
        """After the archive: in the place of its last two bytes, which say that it has no comment."""
        self._file.seek(-2, os.SEEK_END)
        self._file.write(with_digest(self._digest.hexdigest()))


def save_whole(content: Any, path: Path) -> None:
    """Write a checkpoint under its name once it is on the disk and whole, and let ``latest`` point to it.

    Raises:
        OSError, RuntimeError: The disk does not take it; what was there before is as it was.
    """
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            writer = _DigestWriter(file)
            torch.save(content, cast(BinaryIO, writer))  # of which it uses these two methods
            writer.append_digest()
            file.flush()
            os.fsync(file.fileno())
        fault = damage(partial, read=False)
        if fault is not None:
            raise OSError(f"{partial} is {fault} right after it was written")
        # First: a kill in between leaves a link to nothing, not a whole checkpoint that no link leads to.
        _point_to(path)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _to_disk(path.parent)


def partial_of(path: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return path.with_name(path.name + PARTIAL)


def finish_shares(path: Path, digests: Mapping[str, str]) -> None:
    """Give a folder that all ranks have written at :func:`partial_of` its name, and let ``latest`` point to it.

    Args:
        digests: Of its files, by name; they become one of them.

    Raises:
        OSError: It is not whole; what was there before is as it was.
    """
    (partial_of(path) / DIGESTS).write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
    fault = damage(partial_of(path), read=False)
    if fault is not None:
        raise OSError(f"{partial_of(path)} is {fault} right after it was written")
    remove(path)  # of the same step
    _point_to(path)
    partial_of(path).replace(path)
    _to_disk(path.parent)


def _point_to(path: Path) -> None:
    link = path.with_name(layout.LATEST + PARTIAL)
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.with_name(layout.LATEST))


def _to_disk(folder: Path) -> None:
    """New names are on the disk only when their folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_newest(folder: Path, path: Path, keep: int) -> None:
    """Delete the oldest whole checkpoints up to ``path``, the one just saved, and what kills have left half written."""
    older = _in_order(folder)
    older = older[older.index(path) :]
    whole = [each for each in older if damage(each, read=False) is None]
    for left in (*whole[keep:], *folder.glob(f"*{PARTIAL}")):
        remove(left)


def keep_as_best(path: Path, folder: Path) -> None:
    """Give a whole checkpoint a second name in a folder of its own, and delete what was there.

    A kill leaves the one before, or both. The bytes are on the disk once, where it knows hard links.

    Raises:
        OSError: The disk does not take it; what was there before is as it was.
    """
    target = folder / path.name
    folder.mkdir(exist_ok=True)
    if not target.exists():
        partial = partial_of(target)
        remove(partial)
        if path.is_dir():
            shutil.copytree(path, partial, copy_function=_link)
        else:
            _link(str(path), str(partial))
        partial.replace(target)
        _to_disk(folder)
    for other in folder.iterdir():
        if other != target:
            remove(other)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk that has none
        shutil.copyfile(source, target)
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Delete a checkpoint, whole or not, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def ranks_and_step(path: Path) -> tuple[int, int]:
    """How many ranks saved a checkpoint, and after which step.

    Raises:
        ValueError: Loading it as a whole would run code, or it is not Composer's.
    """
    content = check_harmless(path)
    try:
        state = content["state"]
        ranks, step = state["metadata"]["world_size"], state["timestamp"]["Timestamp"]["batch"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of a run: {error!r}") from error
    if type(ranks) is not int or type(step) is not int:
        raise ValueError(f"{path} is not a checkpoint of a run: its step is {step!r}, saved by {ranks!r} ranks")
    return ranks, step
