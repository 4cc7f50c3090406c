"""Remembers the command that was typed, so that a run can say how it is resumed."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

TYPED_COMMAND = "VITCOMPOSER_COMMAND"  # a variable of the environment: what `vitcomposer train` was given


def typed_command() -> str:
    """This process's command, or that of the launcher which started it (``composer -n 8 train.py ...``)."""
    if typed := os.environ.get(TYPED_COMMAND):
        return typed
    own = list(sys.orig_argv)
    if len(own) > 1 and _is_python(own[0]) and Path(own[1]).name == "vitcomposer":
        own = own[1:]
    launcher = _arguments_of(os.getppid())
    if "RANK" in os.environ and len(launcher) > len(sys.argv) and _ends_with(launcher, sys.argv):
        # A console script runs as `python /where/it/lies/composer ...`.
        is_script = _is_python(launcher[0]) and not launcher[1].startswith("-")
        own = launcher[1:] if is_script else launcher
    first = Path(own[0]).name
    return shlex.join([first if _is_found(first, own[0]) else own[0], *own[1:]])


def _ends_with(arguments: Sequence[str], script: Sequence[str]) -> bool:
    """Whether these are a launcher's arguments for this script; only the way to the script may be written otherwise."""
    tail = arguments[len(arguments) - len(script) :]
    module = "/" + tail[0].replace(".", "/")  # composer -n 8 -m vitcomposer.train
    is_script = Path(tail[0]).name == Path(script[0]).name or script[0].endswith(f"{module}.py")
    return tail[1:] == script[1:] and is_script


def _is_python(path: str) -> bool:
    return Path(path).name.startswith("python")


def _is_found(name: str, path: str) -> bool:
    found = shutil.which(name)
    return found is not None and os.path.realpath(found) == os.path.realpath(shutil.which(path) or path)


def _arguments_of(pid: int) -> list[str]:
    try:
        content = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # another system, or it has ended
        return []
    return os.fsdecode(content).rstrip("\0").split("\0")
