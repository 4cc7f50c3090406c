"""``vitcomposer report``: writes what became of a run, or of several side by side, as one HTML file."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vitcomposer.escape import for_terminal
from vitcomposer.runs import layout

EPILOG = """One run gets its page into its own folder; several are compared with the first of them on a page here.
The file needs no network and no script."""


def add_command(commands: Any) -> None:
    """Add ``report`` to the subcommands of a parser."""
    parser = commands.add_parser("report", description=_run.__doc__, epilog=EPILOG)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    help_text = f"(default: {layout.REPORT} in the folder of one run, here of several)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=help_text)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Say whether a run learns, how good and how fast it is, what it confuses and what it cost; or compare runs."""
    from vitcomposer.report.answers import answers
    from vitcomposer.report.compare import in_words, write_comparison
    from vitcomposer.report.single import write_page
    from vitcomposer.report.story import read_story

    stories = [read_story(folder) for folder in args.runs]
    for problem in (problem for story in stories for problem in story.problems):
        print(for_terminal(problem), file=sys.stderr)
    if len(stories) > 1:
        print(in_words(stories, write_comparison(stories, args.out or Path(layout.REPORT))))
        return 0
    print(for_terminal(str(write_page(stories[0], args.out))))
    for card in answers(stories[0]):
        print(for_terminal(f"{card.question}  {card.answer}. {card.behind}"))
    return 0
