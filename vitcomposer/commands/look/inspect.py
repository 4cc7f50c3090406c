"""``vitcomposer inspect``: shows what a data set holds, and finds what is broken in it."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vitcomposer.commands.arguments import add_max_pixels
from vitcomposer.data.jpeg import Reading, set_reading
from vitcomposer.escape import for_terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitcomposer.data.conversion.inspect import SplitReport

_SHOWN = 5  # class names that are printed


def add_command(commands: Any) -> None:
    """Add ``inspect`` to the subcommands of a parser."""
    parser = commands.add_parser("inspect", description=_run.__doc__)
    parser.add_argument("path", help="folder or s3://bucket/prefix")
    parser.add_argument("--split", help="only this split (default: all)")
    parser.add_argument("--verify", action="store_true", help="read every shard and compare its hashes")
    help_text = "decode every image and list those that training would leave out"
    parser.add_argument("--decode", action="store_true", help=help_text)
    add_max_pixels(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Show what a data set holds and check that its shards are what the index says. Exit code 1 if they are not."""
    from vitcomposer.data.conversion.inspect import inspect_data

    set_reading(Reading(args.max_pixels))
    reports = inspect_data(args.path, args.split, verify=args.verify, decode=args.decode)
    for report in reports:
        _print_report(report)
    problems = [problem for report in reports for problem in report.problems]
    for problem in problems:
        print(f"bad: {for_terminal(problem)}", file=sys.stderr)
    if not problems:
        checked = "hash" if args.verify or args.decode else "size"
        print(f"all shards are there with the right {checked}" + (", all images can be decoded" if args.decode else ""))
    return 1 if problems else 0


def _print_report(report: "SplitReport") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=for_terminal(report.name), title_justify="left", show_header=False)
    table.add_row("samples", f"{report.samples:,}")
    table.add_row("shards", f"{report.shards:,}, {report.bytes:,} bytes")
    table.add_row("hashes", ", ".join(report.hashes) or "none")
    table.add_row(
        "columns", ", ".join(for_terminal(f"{name}: {encoding}") for name, encoding in report.columns.items())
    )
    if report.class_names is not None:
        table.add_row("classes", _first_names(report.class_names))
    if report.class_counts:
        counts = sorted(report.class_counts.values())
        table.add_row("per class", f"min {counts[0]:,}, median {counts[len(counts) // 2]:,}, max {counts[-1]:,}")
    table.add_row("first sample", for_terminal(report.first_sample))
    if report.forms:
        forms = ", ".join(f"{count:,} {form}" for form, count in sorted(report.forms.items()))
        table.add_row("stored", f"{forms}, of {report.forms.total():,} samples read")
    Console(highlight=False, markup=False, emoji=False).print(table)


def _first_names(names: "Sequence[str]") -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names):,}: {', '.join(map(for_terminal, names[:_SHOWN]))}{more}"
