"""Compiles functions with numba (``@kernel``) and keeps the machine code on disk, for exactly these sources.

numba's own cache looks at the file of the called function alone: after a change in a file that it calls into, it would
run the old code. Here the place of the cache is a hash of every kernel file in the folder above, those of
``data.augment`` too, so that a change starts afresh.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import config

_CONFIG: Any = config  # its attributes come from the environment


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on the first call, without the interpreter's lock; later processes load what was compiled."""
    previous = _CONFIG.CACHE_DIR
    folder = previous or _folder()  # the user's NUMBA_CACHE_DIR comes first
    _CONFIG.CACHE_DIR = folder
    try:
        return numba.njit(cache=bool(folder), nogil=True)(function)
    finally:
        _CONFIG.CACHE_DIR = previous


@cache
def _folder() -> str:
    """Where the compiled code lies; empty where no folder is this user's alone.

    numba unpickles what it finds there: a file that somebody else wrote would run as this user.
    """
    sources = sorted(path for path in Path(__file__).parents[1].rglob("*.py") if b"\n@kernel\n" in path.read_bytes())
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    own = f"vitcomposer-kernels-{os.getuid()}"
    for parent in (base, Path(tempfile.gettempdir())):
        with suppress(OSError):  # a read-only home
            parent.mkdir(parents=True, exist_ok=True)
            if all(_is_private(folder) for folder in (parent / own, parent / own / digest)):
                return str(parent / own / digest)
    return ""


def _is_private(folder: Path) -> bool:
    """Whether a folder, made where there is none, is no link and one that nobody else can write or exchange."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700
