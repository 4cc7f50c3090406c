"""``vitcomposer weights``: which published weights there are, and brings them here."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from vitcomposer.errors import ConfigError, did_you_mean
from vitcomposer.stores.weights import FOLDER, PUBLISHED, Published, find_published, named_by

_MIRROR = "VITCOMPOSER_WEIGHTS"
_SAID_EVERY = 10.0  # seconds, where stderr is no terminal


def add_command(commands: Any) -> None:
    """Add ``weights`` to the subcommands of a parser."""
    parser = commands.add_parser("weights", help="published weights: list, download", description=_run.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as deit_3_small_224_21k (default: list them)")
    parser.add_argument("--to", default=FOLDER, metavar="FOLDER", help="where they lie (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """List published weights and whether they are here, or bring the named ones here, checked by size and hash.

    VITCOMPOSER_WEIGHTS=FOLDER, or =http://HOST/FOLDER, has them come from there instead of from those who made them.
    A download that broke off goes on. Nothing in the files is run.
    """
    folder = Path(args.to)
    if not args.names:
        _print_list(folder)
        return 0
    chosen = [_known(name) for name in args.names]
    for weights in chosen:
        _bring(weights, folder / weights.name)
    users = next((named_by(weights.name) for weights in chosen if named_by(weights.name)), [])
    if users and folder == Path(FOLDER):
        print(f"Next: vitcomposer train {users[0]}")
    return 0


def _known(name: str) -> Published:
    found = find_published(Path(name).name)
    if found is None:
        names = [each.short for each in PUBLISHED]
        hint = did_you_mean(name, names) or f" There are {', '.join(names)}."
        raise ConfigError(f"NAME must be one of the published weights, got {name!r}.{hint}")
    return found


def _bring(weights: Published, target: Path) -> None:
    from vitcomposer.stores.http import FetchError, fetch, sha256_of

    if target.exists():
        digest = sha256_of(target)
        whole = target.stat().st_size >= weights.least_bytes and weights.fits(digest)
        if not whole:
            raise ConfigError(f"{target} must be {weights.name} as it is published, it is not. Delete it, call again.")
        print(f"{target} is there: {_facts(target, digest, weights)}")
        return
    source = _source(weights)
    progress = _Progress(weights.name)
    print(f"{weights.name} ({weights.licence}) from {source}", file=sys.stderr, flush=True)
    try:
        digest = fetch(source, target, least=weights.least_bytes, fits=weights.fits, report=progress)
    except FetchError as error:
        remedy = f"Check the network or {_MIRROR}=FOLDER (or http://HOST/FOLDER), or put the file at {target}."
        raise ConfigError(f"{error} {remedy}") from error
    finally:
        progress.close()
    print(f"wrote {target}: {_facts(target, digest, weights)}")


def _source(weights: Published) -> str:
    mirror = os.environ.get(_MIRROR, "")
    if not mirror:
        return weights.url
    if mirror.startswith(("http://", "https://")):
        return f"{mirror.rstrip('/')}/{weights.name}"
    if "://" in mirror:
        raise ConfigError(f"{_MIRROR} must be a folder or http(s)://HOST/FOLDER, got {mirror!r}. Mend or unset it.")
    return str(Path(mirror).expanduser() / weights.name)


def _facts(path: Path, digest: str, weights: Published) -> str:
    checked = "as published" if weights.sha256 else "none is published to compare it with"
    return f"{path.stat().st_size / 1e6:,.1f} MB, sha256 {digest} ({checked})"


class _Progress:
    """How far a download is: a bar on a terminal, else a line now and then, both on stderr."""

    def __init__(self, name: str) -> None:
        self.name, self.bar, self.said = name, None, time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        if sys.stderr.isatty():
            self._move(done, total)
        elif time.monotonic() - self.said > _SAID_EVERY:
            self.said = time.monotonic()
            of = f" of {total / 1e6:,.1f}" if total else ""
            print(f"{self.name}: {done / 1e6:,.1f}{of} MB", file=sys.stderr, flush=True)

    def _move(self, done: int, total: int | None) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, unit="B", unit_scale=True, desc=self.name, leave=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _print_list(folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("name", "what it is", "size", "licence", "sha256", "here"):
        table.add_column(name, justify="right" if name == "size" else "left", no_wrap=True)
    for weights in PUBLISHED:
        size = f"{weights.least_bytes / 1e6:.0f} MB"
        here = "yes" if (folder / weights.name).is_file() else "no"
        table.add_row(weights.short, weights.what, size, weights.licence, weights.sha256 or "-", here)
    Console(highlight=False, markup=False, emoji=False, width=120).print(table)
    print("\nfrom")
    for weights in PUBLISHED:
        users = named_by(weights.name)
        print(f"  {weights.url}" + (f"   for {', '.join(users)}" if users else ""))
    print(f"\nsize: at least, 4 bytes a parameter. sha256: how it begins, - where none is published. here: in {folder}")
    print(f"Next: vitcomposer weights {PUBLISHED[0].short}")
