"""Composer's launcher without its own words: ``python -m vitcomposer.commands.start.launcher -n 8 -m MODULE ...``.

The processes say by themselves how a run ends. What the launcher adds are lines about waiting, exit codes, a traceback
for Ctrl-C, and all that a process other than the first wrote. Of these only the last has something new: an error or a
traceback of that process. The launcher prints through ``sys.stdout`` and logs by its name, the processes write to the
files of this one, so that the two are told apart without a change in Composer.
"""

import logging
import re
import signal
import sys
from contextlib import redirect_stdout
from typing import TextIO

_WORDS = ("Waiting up to ", "Ctrl-C received", "Killing training processes")
_PROCESS = re.compile(r"Global rank (\d+) \(PID \d+\) exited with code (-?\d+)")
_WRITTEN = re.compile(r"-+Begin global rank \d+ STD(?:OUT|ERR)-+\n(.*?)\n-+End global rank", re.S)
_OF_TORCH = re.compile(r"(\[rank\d+\]:)?\[W|frame #\d+: |Exception raised from |<omitting python frames>")
_AGAIN = "Start the same command again: it goes on from the last checkpoint."
_CALLS_TO_KILL = 3  # of Ctrl-C: the first stops the processes, the second has them drop their step


class LauncherWords:
    """Takes the place of ``sys.stdout`` for the launcher: passes on what a user has to know.

    Attributes:
        named: Whether a process other than the first has said why the run ends.
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out, self._err = out, err
        self.named = False

    def write(self, text: str) -> int:
        """Print a text of the launcher, or what is in it."""
        process = _PROCESS.match(text)
        if process:
            self._tell(process, text)
        elif text.strip() and not text.startswith(_WORDS):
            self._out.write(f"{text.rstrip()}\n")
        return len(text)

    def flush(self) -> None:
        """As a file has it."""
        self._out.flush()

    def _tell(self, process: re.Match[str], text: str) -> None:
        lines = "\n".join(_WRITTEN.findall(text)).splitlines()
        lines = [line for line in lines if line.strip() and not _OF_TORCH.match(line)]
        if not lines:
            return
        # The line that says why the run ends is the last one on stderr; without it another process has said it.
        named = any(line.startswith("error: ") for line in lines)
        self.named = self.named or named
        file = self._err if named else self._out
        file.write("\n".join([f"rank {process[1]} (exit code {process[2]}):", *lines, ""]))
        file.flush()


def main() -> int:
    """Launch what the command line says; returns the exit code of the first process that failed, or 0."""
    from composer.cli.launcher import main as launch

    calls = 0

    def stop(number: int, _: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 1 or (number == signal.SIGINT and calls >= _CALLS_TO_KILL):
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # Composer's own ends in a traceback
        signal.signal(number, stop)
    logging.getLogger(launch.__module__).addFilter(lambda record: record.levelno < logging.ERROR)
    words = LauncherWords(sys.stdout, sys.stderr)
    with redirect_stdout(words):  # pyright: ignore[reportArgumentType]
        status = launch()
    if status < 0 and not words.named:
        name = signal.Signals(-status).name
        print(
            f"error: A process was ended by {name}, perhaps for want of memory (see dmesg). {_AGAIN}", file=sys.stderr
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
