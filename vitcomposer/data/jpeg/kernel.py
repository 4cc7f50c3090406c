"""Compiles functions with numba and keeps the machine code on disk: ``@kernel`` for what is called, ``@part`` inside.

numba's own cache goes by the path of the called function's file: another clone would compile all of it again, and a
change in a file that it calls into would go unnoticed. Here a kernel's file lies in a folder of the user whose name is
a hash of every source with kernels, those of ``data.augment`` too, and of the versions of numba, LLVM and NumPy. Its
name is a hash of argument types and processor, so that processes which compile the same thing at once write the same
file. A folder that no process has used for ``_KEPT_DAYS`` goes when something is compiled. All that is used of numba's
private side is in ``_Disk``.
"""

import hashlib
import os
import pickle
import platform
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import numba
import numpy as np
from numba.core import caching, compiler, config, serialize

_CONFIG: Any = config  # its attributes come from the environment
_MARKS = (b"\n@kernel\n", b"\n@part\n")
_EXPECTED = "about 10 s of a core"
_KEPT_DAYS = 90

_said = False


class _Place(NamedTuple):
    """Where compiled code is kept; ``folder`` is empty where it is not, and ``why`` says why not at the usual place."""

    folder: str
    why: str = ""


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on the first call, without the interpreter's lock; later processes load what was compiled."""
    dispatcher: Any = numba.njit(nogil=True)(function)
    place = _place()
    if place.folder and hasattr(dispatcher, "_cache") and function.__closure__ is None:
        dispatcher._cache = _Disk(function, Path(place.folder))
    return dispatcher


def part(function: Callable[..., Any]) -> Any:
    """Compile for kernels and other parts alone; Python must not call it.

    Without the wrappers for Python and C the compiler has less to do.
    """
    options: Any = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    dispatcher: Any = numba.njit(**options)(function)
    return dispatcher


class _Disk(caching._Cache):
    """The compiled forms of one function, a file each."""

    def __init__(self, function: Callable[..., Any], folder: Path) -> None:
        self._function, self._folder = function, folder

    @property
    def cache_path(self) -> str:
        return str(self._folder)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        try:
            payload = pickle.loads(self._file(sig, target_context.codegen()).read_bytes())
            return compiler.CompileResult._rebuild(target_context, *payload)
        except Exception:  # none yet, or a damaged one
            _announce()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        file = self._file(sig, data.codegen)
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            partial.write_bytes(serialize.dumps(data._reduce()))
            partial.replace(file)
            _remove_unused(self._folder)
        except OSError:  # a full disk: the next start compiles again
            with suppress(OSError):
                partial.unlink()

    def _file(self, sig: Any, codegen: Any) -> Path:
        key = (str(sig), codegen.magic_tuple(), _CONFIG.BOUNDSCHECK, _CONFIG.OPT)
        module = self._function.__module__.rpartition(".")[2]
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        return self._folder / f"{module}.{self._function.__qualname__}.{digest}.nbc"

    def enable(self) -> None:
        """Nothing: a kernel is always kept where there is a place."""

    def disable(self) -> None:
        """Nothing, see :meth:`enable`."""

    def flush(self) -> None:
        """Nothing: a file is right for as long as its folder is."""


def _announce() -> None:
    """Say once, on the first rank of a machine, what the next seconds are spent on."""
    global _said
    if _said or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    _said = True
    place = _place()
    how_often = "once" if place.folder else "at each start"
    why = f" ({place.why})" if place.why else ""
    print(f"compiling image kernels, {_EXPECTED}, {how_often}{why}", file=sys.stderr, flush=True)


@cache
def _remove_unused(folder: Path) -> None:
    """Delete what other versions compiled and none has used for long; once in a process."""
    oldest = time.time() - _KEPT_DAYS * 24 * 3600
    for other in folder.parent.glob(folder.name.replace(_digest(), "?" * len(_digest()))):
        found = other.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_mtime < oldest:
            shutil.rmtree(other, ignore_errors=True)


def _used(folder: Path) -> str:
    """Note in the time of a folder that it is used."""
    with suppress(OSError):
        os.utime(folder)
    return str(folder)


@cache
def _place() -> _Place:
    """Where the compiled code lies: only where a folder is this user's alone, since what is found there is unpickled.

    A file that somebody else wrote would run as this user.
    """
    digest = _digest()
    if _CONFIG.CACHE_DIR:  # the user's NUMBA_CACHE_DIR comes first
        folder = Path(_CONFIG.CACHE_DIR) / f"vitcomposer-kernels-{digest}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            return _Place(_used(folder))
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = f"vitcomposer-kernels-{os.getuid()}"
    why = ""
    for parent in (base, Path(tempfile.gettempdir())):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if all(_is_private(folder) for folder in (parent / own, parent / own / digest)):
                where = f"kept in {parent / own}, since {why}" if why else ""
                return _Place(_used(parent / own / digest), where)
            why = why or f"{parent / own} is not a folder of this user alone"
        except OSError as error:  # a read-only home
            why = why or f"{parent} cannot be written: {error.strerror}"
    return _Place("", f"{why}, and neither can the temporary folder be used")


@cache
def _digest() -> str:
    """Of the sources and of what compiles them."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    sources = [source for source in sources if any(mark in source for mark in _MARKS)]
    versions = (numba.__version__, llvmlite.__version__, np.__version__, platform.python_version())
    return hashlib.sha256(b"\0".join([*sources, repr(versions).encode()])).hexdigest()[:16]


def _is_private(folder: Path) -> bool:
    """Whether a folder, made where there is none, is no link and one that nobody else can write or exchange."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700
