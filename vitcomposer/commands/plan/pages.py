"""``vitcomposer list``, ``show`` and ``copy``: the recipes that come with the package, by name."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vitcomposer.errors import ConfigError
from vitcomposer.schema.pages import Page, all_pages, find_named

_NAMED = "of a recipe, as `vitcomposer list` prints it"


def add_command(commands: Any) -> None:
    """Add ``list``, ``show`` and ``copy`` to the subcommands of a parser."""
    commands.add_parser("list", description=_list.__doc__).set_defaults(run=_list)
    show = commands.add_parser("show", description=_show.__doc__)
    show.add_argument("name", help=_NAMED)
    show.set_defaults(run=_show)
    copy = commands.add_parser("copy", description=_copy.__doc__)
    copy.add_argument("name", help=_NAMED)
    copy.add_argument("file", type=Path, help="to write, such as mine.yaml; one that is there stays")
    copy.set_defaults(run=_copy)


def _list(args: argparse.Namespace) -> int:
    """List the recipes, the cheapest first: what each trains, its published top-1, its cost and what was measured."""
    head = ("name", "what", "ImageNet top-1", "cost", "ran here")
    rows = [head, *(_row(page) for page in sorted(all_pages(), key=lambda page: (page.flops or 0, page.name)))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print("Next: vitcomposer show NAME        vitcomposer copy NAME mine.yaml        vitcomposer train NAME")
    return 0


def _row(page: Page) -> tuple[str, ...]:
    return page.name, page.what, page.top1 or "-", page.price, page.ran_here or "-"


def _show(args: argparse.Namespace) -> int:
    """Print the yaml of a recipe: where its numbers come from, and every one of them."""
    sys.stdout.write(find_named(args.name).read_text(encoding="utf-8"))
    return 0


def _copy(args: argparse.Namespace) -> int:
    """Write the yaml of a recipe to a file of your own, which you can change and train."""
    page = find_named(args.name)
    if args.file.suffix != ".yaml":
        raise ConfigError(f"{args.file} must be the name of a yaml. Write it like {args.name}_mine.yaml.")
    try:
        with args.file.open("x", encoding="utf-8") as file:
            file.write(page.read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigError(f"{args.file} is there, and is not written over. Choose another name.") from None
    print(f"wrote {args.file}\nNext: vitcomposer train {args.file}")
    return 0
