"""Writes files that appear whole or not at all, and sets damaged ones aside."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # ends the name of what is being written
BAD = ".bad"  # ends the name of what is set aside


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file, which gets its name when the block ends well; no reader and no kill finds half of it.

    The name in the meantime is always the same, so what a kill leaves is written over by the next try. It keeps the
    suffix, by which some libraries choose the format.
    """
    partial = path.with_name(f".{path.stem}{PARTIAL}{path.suffix}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Create or replace a file in one step; text is UTF-8."""
    with whole_file(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())


def set_aside(path: Path) -> Path:
    """Give a file that cannot be read another name, which is returned: ``.bad`` behind its own, or ``.bad2``."""
    names = (path.with_name(f"{path.name}{BAD}{number if number > 1 else ''}") for number in range(1, 1 << 20))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    return aside
