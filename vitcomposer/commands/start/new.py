"""``vitcomposer new``: looks at photographs and writes the yaml that fits them."""

import argparse
import os
import re
import shlex
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcomposer.errors import require
from vitcomposer.escape import for_terminal
from vitcomposer.shipped import YAMLS
from vitcomposer.stores.weights import FOLDER

if TYPE_CHECKING:
    from vitcomposer.data.conversion.sources import FolderSource, ListSource, UnlabelledSource
    from vitcomposer.survey.duplicates import Pair
    from vitcomposer.survey.photos import Survey
    from vitcomposer.survey.rules import Choice

WEIGHTS = Path(FOLDER, "deit_3_small_224_21k.pth")  # as the page of that start names it
_STARTS = {
    "finetune_photos": "DeiT III-S from ImageNet-21k",
    "photos_scratch": "a small ConViT from scratch",
    "dino_vit_s": "DINO",
}
_WIDTH = 80  # columns


def add_command(commands: Any) -> None:
    """Add ``new`` to the subcommands of a parser."""
    parser = commands.add_parser("new", help="a yaml that fits your photos", description=_run_new.__doc__)
    parser.add_argument(
        "photos", help="folder with one folder per class, or train and val of such, or of images alone; or a list"
    )
    parser.add_argument("--unlabelled", action="store_true", help="all images, in the folder and below, have no class")
    help_text = "minutes of one core that a run without pre-trained weights shall take (default: 10)"
    parser.add_argument("--minutes", type=float, metavar="N", help=help_text)
    parser.add_argument("--out", metavar="FILE", help="yaml to write (default: the name of the folder)")
    parser.set_defaults(run=_run_new)


def _run_new(args: argparse.Namespace) -> int:
    """Look at the photos of a folder (or of a list of path,label) and write a yaml that fits them, never over a file.

    A folder without folders in it has no classes: then it is one for training without them (DINO).

    The headers and thumbnails of at most 2,000 images are looked at. What was chosen, and why, stands in the yaml.
    """
    from vitcomposer.data.conversion.sources import UnlabelledSource
    from vitcomposer.survey.duplicates import find_pairs, to_csv
    from vitcomposer.survey.photos import survey
    from vitcomposer.survey.rules import choose_unlabelled

    photos = Path(args.photos)
    out = Path(args.out or f"{_plain_name(photos)}.yaml")
    table = out.with_suffix(".duplicates.csv")
    for path in (out, table):
        if os.path.lexists(path):
            raise ValueError(f"--out must be a file that is not there yet, got {path}. Remove it, or choose another.")
    source = _open(photos, args.unlabelled)
    found = survey(source, args.photos, on_progress=_Progress().update)
    data = _data_folder(photos)
    if isinstance(source, UnlabelledSource):
        _no_minutes(args.minutes, "for images without classes, whose length is in the yaml")
        pairs, choice = [], choose_unlabelled(found)
        commands = _commands_unlabelled(photos, data, out, found)
    else:
        pairs, choice = find_pairs(source, found), _choose(found, args.minutes)
        commands = _commands(photos, data, out, found, choice)
    said = [_counted(found), *_odd(found), *_pairs(pairs, table)]
    _write_new(out, _page(choice, said, commands, data))
    if pairs:
        _write_new(table, to_csv(pairs, found.class_names))
    print("\n".join(said))
    start = _STARTS[choice.page]
    print(f"wrote {out}: {start}, {choice.image_size} px, {choice.epochs} epochs, {choice.batch} images a step")
    print("\n".join(_because(choice)))
    if choice.page == "photos_scratch":
        print("\n".join(_missing_weights(args.photos, out)))
    print("\n".join(["Next:", *(f"  {command}" for command in commands)]))
    return 0


def _choose(found: "Survey", minutes: float | None) -> "Choice":
    from vitcomposer.survey.rules import MINUTES, choose

    if WEIGHTS.is_file():
        _no_minutes(minutes, f"where {WEIGHTS} is there: its run is short, and max_duration says how long")
        return choose(found, pretrained=True)
    minutes = MINUTES if minutes is None else minutes
    require(0 < minutes < 1e6, "--minutes", "above 0, and below a million", minutes, f"{MINUTES:g} is the default.")
    return choose(found, pretrained=False, minutes=minutes)


def _no_minutes(minutes: float | None, where: str) -> None:
    require(minutes is None, "--minutes", f"left out {where}", minutes, "Leave it out.")


def _open(photos: Path, unlabelled: bool) -> "FolderSource | ListSource | UnlabelledSource":
    from vitcomposer.data.conversion.sources import FolderSource, ListSource, UnlabelledSource

    if photos.is_dir() and (unlabelled or not any(path.is_dir() for path in photos.iterdir())):
        return UnlabelledSource(photos)
    rule, remedy = "left out with a list, which gives classes", "Give the folder."
    require(not unlabelled, "--unlabelled", rule, str(photos), remedy)
    source = ListSource(photos, split=None) if photos.is_file() else FolderSource(photos, find_copies=False)
    if len(source.class_names) < 2:
        raise ValueError(
            f"{photos} must hold two classes or more, got {source.class_names}. A label would tell nothing; "
            "--unlabelled trains without."
        )
    if "val" not in source.splits:
        raise ValueError(f"{photos} must have images for validation. Give it a folder val beside train.")
    return source


def _counted(found: "Survey") -> str:
    """What the photographs are, in a line."""
    fewest, most = found.of_a_class[0], found.of_a_class[-1]
    classes = f", {len(found.class_names):,} classes, {fewest:,} to {most:,} a class"
    if len(found.class_names) == 1:
        classes = " without classes"
    width, height = found.size
    return f"{for_terminal(found.name)}: {found.images:,} images{classes}, median {width} x {height}"


def _odd(found: "Survey") -> list[str]:
    """What is odd about them."""
    lines = []
    if len(found.photos) < found.images:
        lines.append(f"  of {len(found.photos):,} images looked at:")
    odd = [f"{count:,} {what}" for what, count in sorted(found.odd.items())]
    if found.turned:
        lines.append(f"  {found.turned:,} turned by EXIF (become upright)")
    if odd:
        lines.append(f"  {', '.join(odd)} (become RGB)")
    lines += [f"  cannot be read: {for_terminal(photo.item.name)} ({photo.look.fault})" for photo in found.broken[:5]]
    if len(found.broken) > 5:
        lines.append(f"  and {len(found.broken) - 5:,} more that cannot be read")
    return lines + [f"  {line}" for line in found.warnings]


def _pairs(pairs: list["Pair"], table: Path) -> list[str]:
    from vitcomposer.survey.duplicates import counted

    counts = counted(pairs).items()
    lines = [f"  {count:,} {_plural('pair', count)} of {what} in {across}" for (what, across), count in counts]
    return [*lines[:-1], f"{lines[-1]}: {table}"] if lines else []


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _because(choice: "Choice") -> list[str]:
    text = f"  because: {'; '.join(choice.reasons)}"
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * 11)


def _commands(photos: Path, data: Path, out: Path, found: "Survey", choice: "Choice") -> list[str]:
    """What to call next, which a shell runs as it stands."""
    stored = ["--for", str(out)] if choice.page == "photos_scratch" else []  # small images; the other page reads large
    run = Path("runs", out.stem)
    kind = "list" if photos.is_file() else "folder"
    root = photos.parent if photos.is_file() else photos
    good = [photo for photo in found.photos if photo.look.fault is None]
    one = min(good, key=lambda photo: (photo.split != "val", photo.item.name))
    return [
        shlex.join(["vitcomposer", "convert", kind, str(photos), str(data), *stored, *_tolerance(found)]),
        shlex.join(["vitcomposer", "train", str(out)]),
        shlex.join(["vitcomposer", "predict", str(run), str(root / one.item.name)]),
    ]


def _commands_unlabelled(photos: Path, data: Path, out: Path, found: "Survey") -> list[str]:
    run, features = Path("runs", out.stem), f"{out.stem}_features.npz"
    words = ["vitcomposer", "convert", "folder", str(photos), str(data), "--unlabelled", *_tolerance(found)]
    return [
        shlex.join(words),
        shlex.join(["vitcomposer", "train", str(out)]),
        shlex.join(["vitcomposer", "embed", str(run), str(photos), "--out", features]),
    ]


def _tolerance(found: "Survey") -> list[str]:
    """Arguments of convert that leave out what cannot be read, where that is more than it takes by itself."""
    return [] if found.broken_share <= 0.01 else ["--max-bad-fraction", f"{found.broken_share + 0.005:.2f}"]


def _page(choice: "Choice", said: list[str], commands: list[str], data: Path) -> str:
    """The text of the yaml: a page of ours with what was found, why, and what comes next at its head."""
    from vitcomposer.survey.page import changed_page, quoted

    base = (YAMLS / f"{choice.page}.yaml").read_text(encoding="utf-8")
    origin = f"Written by vitcomposer new, from yamls/{choice.page}.yaml, which says where its settings come from."
    values = {"data.local": (quoted(str(data)), ""), **choice.values}
    head = [origin, "A comment behind a value is the reason for it.", "", *said, *_because(choice), ""]
    return changed_page(base, values, [*head, *(f"  {command}" for command in commands)])


def _data_folder(photos: Path) -> Path:
    """Where the converted images go: into datasets/, unless that lies in the photographs or above them."""
    data = Path("datasets", _plain_name(photos))
    read, written = photos.resolve(), data.resolve()
    if written.is_relative_to(read) or read.is_relative_to(written):
        return Path(os.path.relpath(read.with_name(f"{read.name}_mds")))
    return data


def _plain_name(photos: Path) -> str:
    """The name of a folder or of a list, without what a shell or a yaml would have to quote."""
    path = photos.resolve()
    stem = path.stem if path.is_file() else path.name
    return re.sub(r"[^\w.-]+", "_", stem).strip("_.-") or "photos"


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}. Choose another place with --out.") from error


class _Progress:
    """A line on stderr every two seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 2

    def update(self, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` images were looked at."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 2
            print(f"{done:,} of {total:,} images looked at", file=sys.stderr)


def _missing_weights(photos: str, out: Path) -> list[str]:
    again = shlex.join(["vitcomposer", "new", photos, "--out", f"{out.stem}_pretrained.yaml"])
    return [
        f"do    {WEIGHTS} is missing (88 MB); it is the better start:",
        f"      vitcomposer weights {WEIGHTS.stem}",
        f"      {again}",
    ]
