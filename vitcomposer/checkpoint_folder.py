"""The checkpoints of one run: each appears whole or not at all, and the newest whole one is found again."""

import os
import re
import shutil
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vitcomposer.models.checkpoint_shares import damage_of_shares
from vitcomposer.models.checkpoints import check_harmless

LATEST = "latest-rank0.pt"  # a link to the newest
_NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run goes on from.

    Attributes:
        refused: ``name: why``, of newer ones that are not whole.
    """

    path: Path | None
    refused: tuple[str, ...]


def has_checkpoints(folder: Path) -> bool:
    """Whether a run has saved anything there, whole or not."""
    return bool(_in_order(folder)) or os.path.lexists(folder / LATEST)


def newest_whole(folder: Path) -> Found:
    """The checkpoint that ``latest`` leads to, or else that of the latest step; each file is read to its end for it."""
    candidates, refused = _in_order(folder), []
    latest = folder / LATEST
    if os.path.lexists(latest):
        # No link where a copy was made by something that follows them.
        first = folder / os.readlink(latest) if latest.is_symlink() else latest
        candidates = [first, *(path for path in candidates if path != first)]
    for path in candidates:
        fault = damage(path)
        if fault is None:
            return Found(path, tuple(refused))
        refused.append(f"{path.name}: {fault}")
    return Found(None, tuple(refused))


def _in_order(folder: Path) -> list[Path]:
    """Checkpoints by their names, the latest step first; of two of one step the one after the end of its epoch."""
    found = [(match, path) for path in folder.glob("ep*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda each: _place(each[0]), reverse=True)]


def _place(name: re.Match[str]) -> tuple[int, int]:
    return int(name[2]), int(name[1])


def damage(path: Path, *, read: bool = True) -> str | None:
    """What keeps a file from being a whole checkpoint, or None; a file that never was one is left to other checks.

    Args:
        read: Compare every byte with its checksum; else look at the size and the directory at the end alone.

    Raises:
        OSError: The disk does not tell.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return "missing"
    if path.is_dir():
        return damage_of_shares(path, read=read)
    return _damage(path, status.st_size, status.st_mtime_ns, read)


@lru_cache(maxsize=16)  # a start asks twice
def _damage(path: Path, size: int, changed: int, read: bool) -> str | None:
    if size == 0:
        return "empty"
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip() if read else None
    except OSError:
        raise
    except Exception:  # of many kinds, by what stands in the place of the directory
        with path.open("rb") as file:
            head = file.read(4)
        return {b"PK\3\4": "cut short", bytes(4): "zeros"}.get(head)
    return None if broken is None else f"damaged in {broken}"


def save_whole(content: Any, path: Path) -> None:
    """Write a checkpoint under its name once it is on the disk and whole, and let ``latest`` point to it.

    Raises:
        OSError, RuntimeError: The disk does not take it; what was there before is as it was.
    """
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
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
    return path.with_name(path.name + _PARTIAL)


def finish_shares(path: Path) -> None:
    """Give a folder that all ranks have written at :func:`partial_of` its name, and let ``latest`` point to it.

    Raises:
        OSError: It is not whole; what was there before is as it was.
    """
    fault = damage(partial_of(path), read=False)
    if fault is not None:
        raise OSError(f"{partial_of(path)} is {fault} right after it was written")
    remove(path)  # of the same step
    _point_to(path)
    partial_of(path).replace(path)
    _to_disk(path.parent)


def _point_to(path: Path) -> None:
    link = path.with_name(LATEST + _PARTIAL)
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.with_name(LATEST))


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
    for left in (*whole[keep:], *folder.glob(f"*{_PARTIAL}")):
        remove(left)


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
        return state["metadata"]["world_size"], state["timestamp"]["Timestamp"]["batch"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a checkpoint of a run: {error!r}") from error
