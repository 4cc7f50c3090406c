"""``vitcomposer convert | inspect | eval | export | ...``: the command line around training.

A command is one function: it adds its parser and names the function that runs it. Heavy imports stay inside the run.
Exit codes: 0 done, 1 a check failed, 2 something to mend (one line on stderr), 130 interrupted.
"""

import argparse
import sys
from typing import TYPE_CHECKING

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
from vitcomposer.data.jpeg import Reading, reading
from vitcomposer.escape import message
from vitcomposer.schema import expand_home

if TYPE_CHECKING:
    pass
from vitcomposer.commands.inspect import _add_inspect

_COMMANDS = (attention, bench, cache_teacher, evaluate, export, launch, plan, predict, soup)
_WITH_KEYS = ("attention", "bench", "cache-teacher", "eval", "export", "launch", "plan", "predict", "soup")
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
