"""``vitcomposer COMMAND``: finds the command in a table, and imports its module alone.

A module of ``commands`` has ``add_command``, which adds its parser and names the function that runs it; heavy imports
stay inside that function. Exit codes: 0 done, 1 a check failed, 2 something to mend (one line on stderr), 130 Ctrl-C.
"""

import argparse
import os
import re
import select
import sys
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from vitcomposer.commands import arguments
from vitcomposer.data.jpeg import Reading, reading
from vitcomposer.errors import did_you_mean
from vitcomposer.escape import for_terminal, message, print_error
from vitcomposer.installed import check_installed, version_line
from vitcomposer.schema import expand_home


class Command(NamedTuple):
    """A word after ``vitcomposer``.

    Attributes:
        group: The line of the help that it stands in.
        takes_keys: Whether ``key=value`` may stand anywhere behind it.
        module: In the folder of ``vitcomposer.commands`` that is named like the group; empty: it has the same name.
    """

    name: str
    group: str
    takes_keys: bool = False
    module: str = ""


COMMANDS = (  # as the help lists them
    Command("doctor", "start"),
    Command("new", "start"),
    Command("weights", "start"),
    Command("convert", "start"),
    Command("preview", "start", takes_keys=True),
    Command("check", "start", takes_keys=True),
    Command("train", "start", takes_keys=True),
    Command("report", "look"),
    Command("attention", "look", takes_keys=True),
    Command("inspect", "look"),
    Command("eval", "use", takes_keys=True, module="evaluate"),
    Command("predict", "use", takes_keys=True),
    Command("embed", "use", takes_keys=True),
    Command("export", "use", takes_keys=True),
    Command("soup", "use", takes_keys=True),
    Command("list", "plan", module="pages"),
    Command("show", "plan", module="pages"),
    Command("copy", "plan", module="pages"),
    Command("plan", "plan", takes_keys=True),
    Command("bench", "plan", takes_keys=True),
    Command("launch", "clusters", takes_keys=True),
    Command("cache-teacher", "clusters", takes_keys=True, module="cache_teacher"),
)
_SHELL = ("setup",)  # arguments that a shell expands, where it runs them


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, text: str) -> NoReturn:
        text = text.replace(", key=value", "")  # of which any number may be left out, argparse counts it as required
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", text)
        near = did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2])) if choice else ""
        self.exit(2, f"error: {message(text)}.{near} `{self.prog} --help` shows what it takes.\n")


def help_text() -> str:
    """What ``vitcomposer`` prints by itself."""
    groups = dict.fromkeys(command.group for command in COMMANDS)
    rows = [f"  {group:<11}{'  '.join(c.name for c in COMMANDS if c.group == group)}" for group in groups]
    head = "Train Vision Transformers: your photos or ImageNet, one GPU or many nodes."
    return "\n".join([head, *rows, "vitcomposer COMMAND --help   vitcomposer --version   docs/first_hour.md"])


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words  # after the command too
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(version_line())
        return 0
    command = next((command for command in COMMANDS if command.name == words[0]), None)
    if command is None:
        near = did_you_mean(words[0], [command.name for command in COMMANDS]).replace("'", "")
        hint = near or " `vitcomposer --help` lists them."
        print(f"error: no command {for_terminal(words[0])!r}.{hint}", file=sys.stderr)
        return 2
    return _run(command, words, traceback)


def _run(command: Command, words: list[str], traceback: bool) -> int:
    args = _parse(command, words)
    args.traceback = traceback
    try:
        check_installed()
        for name, value in vars(args).items():
            if name not in _SHELL:
                setattr(args, name, expand_home(value, name))
        with reading(Reading()):  # what a command sets ends with it
            status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 0
        if traceback:
            raise
        print_error(str(error))
        return 2


def _reader_is_gone() -> bool:
    """Whether what reads our output, such as ``head``, has what it wants; a network connection may have broken too."""
    output = sys.stdout.fileno()
    pipe = select.poll()
    pipe.register(output, 0)  # errors are reported without being asked for
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # for the flush at the end of Python
    return gone


def _parse(command: Command, words: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="vitcomposer")
    subparsers: Any = parser.add_subparsers()
    parser.prog = f"vitcomposer {command.name}"  # of what the command itself takes
    import_module(f"vitcomposer.commands.{command.group}.{command.module or command.name}").add_command(subparsers)
    return arguments.parse(parser, words) if command.takes_keys else parser.parse_args(words)
