"""``vitcomposer convert | inspect | eval | export | ...``: the command line around training.

A command is one function: it adds its parser and names the function that runs it. Heavy imports stay inside the run.
Exit codes: 0 done, 1 a check failed, 2 something to mend (one line on stderr), 130 interrupted.
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vitcomposer.commands import (
    arguments,
    attention,
    bench,
    cache_teacher,
    convert,
    evaluate,
    export,
    launch,
    plan,
    predict,
    soup,
)
from vitcomposer.escape import for_terminal, message
from vitcomposer.reading import Reading, add_max_pixels, reading, set_reading
from vitcomposer.schema import expand_home

if TYPE_CHECKING:
    from vitcomposer.data.conversion.inspect import SplitReport

_COMMANDS = (attention, bench, cache_teacher, evaluate, export, launch, plan, predict, soup)
_WITH_KEYS = ("attention", "bench", "cache-teacher", "eval", "export", "launch", "plan", "predict", "soup")
_SHOWN = 5  # class names that are printed
_SHELL = ("setup",)  # arguments that a shell expands, where it runs them


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    parser = argparse.ArgumentParser(prog="vitcomposer", description="Data, runs and models of vitcomposer.")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error comes from")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add_command in (convert.add_command, _add_inspect, *(module.add_command for module in _COMMANDS)):
        add_command(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words  # after the command too
    words = [word for word in words if word != "--traceback"]
    takes_keys = next((word for word in words if not word.startswith("-")), None) in _WITH_KEYS
    args = arguments.parse(parser, words) if takes_keys else parser.parse_args(words)
    try:
        for name, value in vars(args).items():
            if name not in _SHELL:
                setattr(args, name, expand_home(value, name))
        with reading(Reading()):  # what a command sets ends with it
            return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if traceback:
            raise
        print(f"error: {message(str(error))}", file=sys.stderr)
        return 2


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="what a data set holds", description=_run_inspect.__doc__)
    parser.add_argument("path", help="folder or s3://bucket/prefix")
    parser.add_argument("--split", help="only this split (default: all)")
    parser.add_argument("--verify", action="store_true", help="read every shard and compare its hashes")
    help_text = "decode every image and list those that training would leave out"
    parser.add_argument("--decode", action="store_true", help=help_text)
    add_max_pixels(parser)
    parser.set_defaults(run=_run_inspect)


def _run_inspect(args: argparse.Namespace) -> int:
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
        more = ", ..." if len(report.class_names) > _SHOWN else ""
        table.add_row(
            "classes", f"{len(report.class_names):,}: {', '.join(map(for_terminal, report.class_names[:_SHOWN]))}{more}"
        )
    if report.class_counts:
        counts = sorted(report.class_counts.values())
        table.add_row("per class", f"min {counts[0]:,}, median {counts[len(counts) // 2]:,}, max {counts[-1]:,}")
    table.add_row("first sample", for_terminal(report.first_sample))
    if report.forms:
        forms = ", ".join(f"{count:,} {form}" for form, count in sorted(report.forms.items()))
        table.add_row("stored", f"{forms}, of {report.forms.total():,} samples read")
    Console(highlight=False, markup=False, emoji=False).print(table)
