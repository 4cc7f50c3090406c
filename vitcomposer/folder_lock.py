"""Gives a folder one writer at a time: a lock file names its process, and one whose process is gone is taken over.

On the machine that wrote it, a lock is alive while a process of that number and that start time runs, so neither
``kill -9`` nor a number that came to another process keeps anybody out. A lock of another machine, seen on a shared
disk, or of a container is alive while its file is touched, which its process does every ``BEAT`` seconds.
"""

import atexit
import fcntl
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from vitcomposer.errors import ConfigError

BEAT = 10.0  # seconds between two touches
STALE = 60.0  # seconds without a touch, seen by who waits for one
_EXITING = 0x4  # PF_EXITING of Linux
OLD = 300.0  # seconds since the last touch, by the disk's clock or another node's, that need no wait


@dataclass(frozen=True)
class Writer:
    """The process that a lock names.

    Attributes:
        machine: What tells one running system and its process numbers from all others, or None.
        ticks: When the process started, on the clock of the machine, or None.
        since: When it took the lock, ISO 8601 with the offset of its time zone.
    """

    host: str
    machine: str | None
    pid: int
    ticks: int | None
    since: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class _Held:
    content: bytes
    owner: int  # a fork that ends must not give back what its parent holds
    made: list[Path]  # folders that were made for it, the innermost first
    done: threading.Event = field(default_factory=threading.Event)


_held: dict[Path, _Held] = {}


def acquire(path: Path, what: str, otherwise: str) -> bool:
    """Take a lock for this process; a process may take what it holds.

    Args:
        path: Of the lock file; its folder is made where it is missing.
        what: The folder that it keeps, for the message.
        otherwise: What else to do than to wait, such as ``set run.name=demo_2``.

    Returns:
        Whether this call took it.

    Raises:
        ConfigError: Another process writes there.
        OSError: The disk does not take a lock file.
    """
    path = path.parent.resolve() / path.name
    if path in _held and _held[path].owner == os.getpid():
        return False
    content = json.dumps(asdict(this_process())).encode()
    made: list[Path] = []
    try:
        while True:
            made = _make(path.parent) or made
            with suppress(FileNotFoundError):  # the folder, which another process had made and takes away
                if _create(path, content):
                    break
                _remove_stale(path, what, otherwise)
    except BaseException:
        _remove_empty(made)
        raise
    if not _held:
        atexit.register(_release_all)
    _held[path] = _Held(content, os.getpid(), made)
    threading.Thread(target=_touch, args=(path, _held[path], what), name="lock", daemon=True).start()
    return True


def release(path: Path) -> None:
    """Give a lock back, if this process holds it, and remove the folders that were made for it and stayed empty."""
    path = path.parent.resolve() / path.name
    held = _held.get(path)
    if held is None or held.owner != os.getpid():
        return
    del _held[path]
    held.done.set()
    with suppress(OSError), _opened(path) as file:
        if file.read() == held.content:
            _unlink_same(path, file)
    _remove_empty(held.made)


@contextmanager
def only_writer(path: Path, what: str, otherwise: str) -> Iterator[None]:
    """Hold a lock; errors as :func:`acquire`."""
    taken = acquire(path, what, otherwise)
    try:
        yield
    finally:
        if taken:
            release(path)


def beside(folder: Path) -> Path:
    """The lock file of a folder that is made, moved or removed as a whole."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def this_process() -> Writer:
    """What a lock of this process says."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return Writer(socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()), since)


def _machine() -> str | None:
    """The boot of the system and, for containers, the namespace that the numbers of processes are of."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _start_of(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None where there is none, or where it has ended unreaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _runs_on(pid: int, ticks: int) -> bool:
    """Whether the process of that start runs. A killed one goes by itself, which takes seconds on a full machine."""
    end = time.monotonic() + STALE
    while _start_of(pid) == ticks:
        if not _was_killed(pid) or time.monotonic() > end:
            return True
        time.sleep(0.02)
    return False


def _was_killed(pid: int) -> bool:
    """Whether SIGKILL waits for a process, or it gives its memory back already: it runs none of its code again."""
    try:
        flags = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6])
        pending = re.findall(r"^(?:Sig|Shd)Pnd:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    except (OSError, ValueError, IndexError):
        return False
    return bool(flags & _EXITING) or any(int(mask, 16) >> (signal.SIGKILL - 1) & 1 for mask in pending)


def _make(folder: Path) -> list[Path]:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for each in folders:
        with suppress(OSError):
            each.rmdir()


def _create(path: Path, content: bytes) -> bool:
    """Have the lock appear with its content, unless there is one."""
    whole = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        whole.write_bytes(content)
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        except OSError:  # a disk without links
            with path.open("xb", buffering=0) as file:
                file.write(content)
        return True
    except FileExistsError:
        return False
    finally:
        whole.unlink(missing_ok=True)


def _remove_stale(path: Path, what: str, otherwise: str) -> None:
    """Remove a lock whose process is gone.

    Raises:
        ConfigError: It is alive.
    """
    with suppress(FileNotFoundError), _opened(path) as file:  # it may be given back meanwhile
        writer = _parse(file.read())
        if _is_alive(path, writer):
            raise ConfigError(_say(what, writer, otherwise))
        _unlink_same(path, file)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb+")  # as a network disk asks of who locks a file
    except PermissionError:  # of another user
        return path.open("rb")


def _unlink_same(path: Path, file: BinaryIO) -> None:
    """Remove the lock that is open here, unless its name is another's by now.

    Whoever wants to remove it locks the open file first and looks at the name again, and nobody can have the name
    while it is there: so no start removes the lock that another has just made.
    """
    with suppress(OSError):  # a disk without locks
        fcntl.flock(file, fcntl.LOCK_EX)
    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        path.unlink()


def _parse(content: bytes) -> Writer | None:
    try:
        return Writer(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _is_alive(path: Path, writer: Writer | None) -> bool:
    here = this_process()
    if writer is not None and (writer.host, writer.machine) == (here.host, here.machine) and here.ticks is not None:
        return isinstance(writer.pid, int) and writer.ticks is not None and _runs_on(writer.pid, writer.ticks)
    try:
        first = path.stat().st_mtime
        if _now_of_disk(path) - first > OLD:
            return False
        print(f"{path} is of {_name(writer)}: a wait of {STALE:g} s shows whether that still runs.", flush=True)
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE / 10))
            with path.open("rb") as file:  # which has a network disk look again
                if os.fstat(file.fileno()).st_mtime != first:
                    return True
    except FileNotFoundError:
        pass
    return False


def _now_of_disk(path: Path) -> float:
    trial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        trial.touch()
        return trial.stat().st_mtime
    finally:
        trial.unlink(missing_ok=True)


def _name(writer: Writer | None) -> str:
    return "a process that it does not name" if writer is None else f"pid {writer.pid} on {writer.host}"


def _say(what: str, writer: Writer | None, otherwise: str) -> str:
    since = ""
    with suppress(ValueError, TypeError, AttributeError):
        began = datetime.fromisoformat(writer.since).astimezone()  # pyright: ignore[reportOptionalMemberAccess]
        form = "%H:%M" if began.date() == datetime.now().date() else "%Y-%m-%d %H:%M"
        since = f" (since {began.strftime(form)})"
    return f"{what} is being written by {_name(writer)}{since}. Wait, stop it, or {otherwise}."


def _touch(path: Path, held: _Held, what: str) -> None:
    while not held.done.wait(BEAT):
        with suppress(OSError), path.open("rb") as file:
            if file.read() == held.content:
                os.utime(file.fileno())
            elif not held.done.is_set():
                _end(what)


def _end(what: str) -> None:
    """Two writers would spoil the folder: the one that stood still, suspended or without its disk, ends."""
    text = f"error: {what} was taken over by another start, which saw no sign of this process for {STALE:g} s."
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


def _release_all() -> None:
    for path in list(_held):
        release(path)
