"""``@kernel``: compile a function with numba and keep the machine code on disk, for exactly these sources.

numba's own cache looks at the file of the called function alone: after a change in a file that it calls into, it would
run the old code. Here the place of the cache is a hash of every kernel file, so that a change starts afresh.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import config

_CONFIG: Any = config  # its attributes come from the environment


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on the first call, without the interpreter's lock; later processes load what was compiled."""
    previous = _CONFIG.CACHE_DIR
    if not previous:  # else the user's NUMBA_CACHE_DIR
        _CONFIG.CACHE_DIR = _folder()
    try:
        return numba.njit(cache=True, nogil=True)(function)
    finally:
        _CONFIG.CACHE_DIR = previous


@cache
def _folder() -> str:
    sources = sorted(path for path in Path(__file__).parent.glob("*.py") if b"\n@kernel\n" in path.read_bytes())
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for parent in (base, Path(tempfile.gettempdir(), f"vitcomposer-{os.getuid()}")):
        folder = parent / "vitcomposer" / digest
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a read-only home
            continue
        if os.access(folder, os.W_OK):
            return str(folder)
    return ""  # numba chooses
