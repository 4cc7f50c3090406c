"""Two ranks in processes of their own: from ones that stand ready, or with ``composer -n 2``."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

BIN = Path(sys.executable).parent


class ReadyRanks:
    """Starts runs of two ranks in a second, see ready_ranks.py; what it started and left ends with it."""

    def __init__(self, temporary: Path) -> None:
        self.temporary, self.groups = temporary, []
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "tests.faults.ready_ranks"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=variables, **pipes)
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "it ended"
        return json.loads(line)

    def call(self, **what: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return self.answer()

    def start(self, arguments: list[str], log: Path, notes: Path | None = None, *, ranks: int = 2) -> "ReadyRun":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = self.call(start=arguments, ranks=ranks, port=port, log=str(log), notes=notes and str(notes))
        self.groups.append(group)
        return ReadyRun(self, group)

    def close(self) -> None:
        for group in self.groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True)
class ReadyRun:
    ranks: ReadyRanks
    group: int

    def poll(self) -> int | None:
        return self.ranks.call(poll=self.group)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        finish(self)


class ComposerRun:
    """``composer -n 2 train.py`` in a session of its own."""

    def __init__(self, arguments: list[str], log: Path, temporary: Path) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        command = [str(BIN / "composer"), "-n", "2", "train.py", *arguments]
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=file, stderr=file, start_new_session=True
            )
        self.poll = self.process.poll

    def kill(self) -> None:
        """The launcher, the ranks and their workers, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def finish(run: ReadyRun | ComposerRun, seconds: float = 600.0) -> int:
    end = time.monotonic() + seconds
    while (status := run.poll()) is None:
        assert time.monotonic() < end, "it does not end"
        time.sleep(0.02)
    return status


@pytest.fixture(scope="module")
def ready() -> Iterator[ReadyRanks]:
    # In a folder with a short name, for sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="kill", ignore_cleanup_errors=True) as temporary:
        ranks = ReadyRanks(Path(temporary))
        yield ranks
        ranks.close()
