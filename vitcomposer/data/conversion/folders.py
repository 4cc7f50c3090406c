"""Finds the images below a folder, for ``convert``, ``predict`` and ``eval`` alike.

What is odd about a folder is collected in a :class:`Report` and said at once. It is an error where images would get a
wrong label, or where it is not known what is missing; it is a warning where what is left out can be named.
"""

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vitcomposer.data.jpeg import current_reading
from vitcomposer.escape import for_terminal

_SUFFIXES = "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm avif jp2 tga"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))
# What systems and programs leave in folders; names that begin with a dot are hidden everywhere.
_CLUTTER = frozenset({"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found", "__pycache__"})
_SHOWN = 10  # names that a line of the report lists


class Kind(NamedTuple):
    """A kind of finding: what was found, and what becomes of it or what to do."""

    is_error: bool
    text: str
    remedy: str


EMPTY = Kind(True, "class folders without an image", "Fill or remove them.")
GONE = Kind(True, "folders that are links to nowhere", "Mend or remove them.")
SHARED = Kind(True, "folders in two classes", "Remove the links: an image has one label.")
UNREADABLE = Kind(True, "files or folders that cannot be read", "Mend them: what they hold is not known.")
UNKNOWN = Kind(True, "class folders of one split alone", "Make the classes of the splits equal.")
LOOPS = Kind(False, "links back to a folder that they lie in", "They are left out.")
TWICE = Kind(False, "folders that are reached twice, by links", "Each is read once.")
NOWHERE = Kind(False, "links to nowhere", "They count as broken images.")
NO_FILES = Kind(False, "pipes, sockets and devices with names of images", "They count as broken images.")
BESIDE = Kind(False, "images beside the class folders", "They have no class and are left out.")
OUTSIDE = Kind(False, "folders beside the splits", "They are left out.")
CLUTTER = Kind(False, "hidden files and folders, and those of the system", "They are left out.")
SAME_BUT_CASE = Kind(False, "class names that differ in upper and lower case alone", "Each is a class of its own.")
NO_VAL = Kind(False, "classes without an image for validation", "Nothing measures them.")
TWO_LABELS = Kind(False, "files that are byte for byte in two classes", "At least one label of each is wrong.")
TWO_SPLITS = Kind(False, "files of train that are byte for byte in another split", "What they measure is memory.")
NOTES = Kind(False, "", "")  # whole sentences


class ImageFile(NamedTuple):
    """A file that is an image by its name: the name below the root, with slashes, and its size in bytes.

    The size is 0 where it is no regular file; reading it then raises ValueError (:func:`read_file`).
    """

    name: str
    size: int


class Report:
    """What was found in folders, by kind, each name once."""

    def __init__(self) -> None:
        self._found: dict[Kind, dict[str, None]] = {}
        self.left_out = Counter[str]()  # files that are no images by their names: by suffix

    def add(self, kind: Kind, *names: str) -> None:
        """Take note of names (of NOTES: of sentences)."""
        if names:
            self._found.setdefault(kind, {}).update(dict.fromkeys(map(for_terminal, names)))

    def names(self, kind: Kind) -> list[str]:
        """What was found of a kind."""
        return list(self._found.get(kind, ()))

    def lines(self, *, errors: bool) -> list[str]:
        """A line for each kind of error, or of warning."""
        lines = []
        for kind, found in self._found.items():
            if kind is NOTES:
                lines += [] if errors else found
            elif kind.is_error == errors:
                more = f" and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else ""
                listed = ", ".join(list(found)[:_SHOWN]) + more
                lines.append(f"{kind.text} ({len(found):,}): {listed}. {kind.remedy}")
        if self.left_out and not errors:
            counts = ", ".join(f"{count:,} {suffix}" for suffix, count in self.left_out.most_common(_SHOWN))
            lines.append(f"files that are no images by their names, left out ({self.left_out.total():,}): {counts}.")
        return lines

    def check(self, where: str | Path) -> None:
        """Raise ValueError with all that was found, unless there are warnings alone."""
        errors = self.lines(errors=True)
        if errors:
            others = [f"also: {line}" for line in self.lines(errors=False)]
            found = "\n".join(f"  {line}" for line in [*errors, *others])
            raise ValueError(f"{where} must hold one folder of images per class, got:\n{found}")


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file; a pipe or device is not waited for.

    Raises:
        ValueError: No regular file, a link that leads nowhere, or more bytes than an image may have.
        OSError: It cannot be read.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if os.path.islink(path):
            raise ValueError("a link that leads nowhere") from error
        raise
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device, no file")
    if status.st_size > current_reading().max_bytes:
        raise ValueError(
            f"it has {status.st_size:,} bytes, more than the largest image that is read "
            f"({current_reading().max_bytes:,}). If it is sound, raise --max-pixels"
        )
    return Path(path).read_bytes()


def find_images(folder: str | Path, report: Report) -> Iterator[ImageFile]:
    """Images of a folder and of those below it, sorted, files before folders; links are followed, each folder once."""
    yield from Walk(Path(folder), Path(folder), report).images(".", 0)


def scan_classes(root: Path, folder: Path, report: Report) -> dict[str, list[ImageFile]]:
    """The images of every class folder in ``folder``, with their names below ``root``."""
    walk = Walk(root, folder, report)
    names = [name for name in subfolders(folder, report, root) if walk.claim(folder / name, name)]
    spelled: dict[str, str] = {}
    for name in names:
        same = spelled.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if same is not name:
            report.add(SAME_BUT_CASE, f"{same} / {name}")
    for entry in _entries(folder, report, root):
        inside = below(folder / entry.name, root)
        if is_image(entry.name) and not _is_folder(entry):
            report.add(BESIDE, inside)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            report.add(GONE, inside)
        elif not _is_folder(entry):
            report.left_out[suffix_of(entry.name)] += 1
    return {name: list(walk.images(below(folder / name, root), name)) for name in names}


def subfolders(folder: Path, report: Report, root: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones and without links back to it or above it."""
    names = [entry.name for entry in _entries(folder, report, root) if _is_folder(entry)]
    above = _identities_above(folder)
    loops = {name for name in names if _identity(folder / name) in above}
    report.add(LOOPS, *(below(folder / name, root) for name in sorted(loops)))
    return [name for name in names if name not in loops]


def is_clutter(name: str) -> bool:
    """Whether a name is hidden, or that of a file which systems put into folders."""
    return name.startswith(".") or name.lower() in _CLUTTER


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return suffix_of(name) in IMAGE_SUFFIXES


def suffix_of(name: str) -> str:
    """The end of a file's name as it is counted."""
    return os.path.splitext(name)[1].lower() or "without a suffix"


def below(path: Path, root: Path) -> str:
    """The path of a file below a folder, with slashes."""
    return path.relative_to(root).as_posix()


class Walk:
    """One way through the folders of a data set, or of one of its splits: no folder is entered twice.

    Args:
        root: Where names begin.
        top: The folder that is walked; links to it, or to what it lies in, are loops.
    """

    def __init__(self, root: Path, top: Path, report: Report) -> None:
        self._root, self._report = root, report
        self._above = _identities_above(top)
        self._owners: dict[object, tuple[object, str]] = {}  # of every folder entered: its class, and its name there

    def claim(self, folder: Path, label: object) -> bool:
        """Take a folder for a class; False where it has been taken before, or is one above."""
        name = below(folder, self._root)
        identity = _identity(folder)
        if identity in self._above:
            self._report.add(LOOPS, name)
            return False
        owner, other = self._owners.setdefault(identity, (label, name))
        if other == name:
            return True
        self._report.add(TWICE, name) if owner == label else self._report.add(SHARED, f"{name} is {other}")
        return False

    def images(self, folder: str, label: object) -> Iterator[ImageFile]:
        """Images of a folder and of those below it; each new folder is taken for ``label``."""
        waiting = [folder]
        while waiting:
            name = waiting.pop()
            deeper = []
            for entry in _entries(self._root / name, self._report, self._root):
                inside = entry.name if name == "." else f"{name}/{entry.name}"
                if _is_folder(entry):
                    deeper.append(inside)
                elif is_image(entry.name):
                    yield ImageFile(inside, self._size(inside))
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    self._report.add(NOWHERE, inside)  # perhaps to a folder of images
                else:
                    self._report.left_out[suffix_of(entry.name)] += 1
            waiting += [inside for inside in deeper if self.claim(self._root / inside, label)][::-1]

    def _size(self, name: str) -> int:
        try:
            status = os.stat(self._root / name)
        except OSError as error:
            kind, more = (NOWHERE, "") if os.path.islink(self._root / name) else (UNREADABLE, f" ({error.strerror})")
            self._report.add(kind, name + more)
            return 0
        if not stat.S_ISREG(status.st_mode):
            self._report.add(NO_FILES, name)
            return 0
        if not os.access(self._root / name, os.R_OK):
            self._report.add(UNREADABLE, f"{name} (Permission denied)")
        return status.st_size


def _entries(folder: Path, report: Report, root: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, sorted, without clutter; nothing, and an entry of the report, where it cannot be read."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        report.add(UNREADABLE, f"{below(folder, root)} ({error.strerror})")
        return []
    report.add(CLUTTER, *(below(folder / entry.name, root) for entry in entries if is_clutter(entry.name)))
    return [entry for entry in entries if not is_clutter(entry.name)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> object:
    """Equal for two ways to one folder; file systems without inode numbers have its path alone."""
    status = os.stat(folder)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _identities_above(folder: Path) -> set[object]:
    """Of a folder and all that it lies in, by the path given and by its real one."""
    given, real = Path(os.path.abspath(folder)), folder.resolve()
    return {_identity(path) for path in (given, *given.parents, real, *real.parents)}
