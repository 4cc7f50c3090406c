"""Candidates take turns on one core: each is a process that runs in its own turn only and is stopped otherwise."""

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT

_START_SECONDS = 240  # FFCV compiles, TensorFlow imports
_TURN_SECONDS = 300
_ONE_THREAD = {
    name: "1"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "TF_NUM_THREADS")
}


class CandidateError(Exception):
    """A candidate that could not be installed, started or run; the message is the reason in one line."""


@dataclass(frozen=True)
class Turn:
    """What one turn took. ``cpu_seconds`` is of all processes and threads of the candidate."""

    images: int
    cpu_seconds: float
    wall_seconds: float


class Process:
    """A candidate's process group, pinned to one core.

    Raises:
        CandidateError: It ends or does not answer; the message is the last line that it printed.
    """

    def __init__(self, python: Path, job: dict[str, Any], log: Path, core: int) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.input.serve", json.dumps(job)],
                cwd=ROOT,
                env={**os.environ, **_ONE_THREAD, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONWARNINGS": "ignore"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # one process group, which takes the signals
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
        try:
            self.first = self._answer(_START_SECONDS)
            self._cpu, _ = self._settle()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def turn(self, images: int) -> Turn:
        """Let it process at least so many images, and whatever it prepares ahead of the next turn.

        What is prepared ahead is paid for in this turn and comes free in the next one, so over several turns it
        cancels out.
        """
        self._signal(signal.SIGCONT)
        before, start = self._cpu, time.perf_counter()
        assert self._process.stdin is not None
        self._process.stdin.write(f"{images}\n".encode())
        self._process.stdin.flush()
        done = self._answer(_TURN_SECONDS)["images"]
        answered = time.perf_counter()
        self._cpu, busy_until = self._settle()
        self._signal(signal.SIGSTOP)
        return Turn(done, self._cpu - before, max(answered, busy_until) - start)

    def close(self) -> None:
        """End it, gently at first: Streaming frees its shared memory when Python exits."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.stdin.close()
            self._process.wait(15)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not ready:
            raise CandidateError(f"no answer in {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise CandidateError(last_line(self._log))
        return json.loads(line)

    def _settle(self) -> tuple[float, float]:
        """CPU seconds once its background threads have nothing more to do, and the time at which they last had."""
        now = group_cpu_seconds(self._process.pid)
        busy_until = 0.0
        deadline = time.perf_counter() + 5
        while time.perf_counter() < deadline:
            time.sleep(0.01)
            before, now = now, group_cpu_seconds(self._process.pid)
            if now - before < 0.001:  # polling threads never rest completely
                break
            busy_until = time.perf_counter()
        return now, busy_until


def group_cpu_seconds(group: int) -> float:
    """CPU seconds of all living processes of a process group, with their ended threads, to the nanosecond."""
    # The clock of another process, as clock_getcpuclockid() of the C library makes its number.
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in _members(group))


def _members(group: int) -> Iterator[int]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_text()
            except OSError:  # it has just ended
                continue
            if int(stat.rpartition(")")[2].split()[2]) == group:
                yield int(entry.name)


def last_line(log: Path) -> str:
    """The last line of a log, short and without the folders of this machine."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    words = (lines or ["it ended without a word"])[-1].split()
    return " ".join(word.rpartition("/")[2] if word.count("/") > 1 else word for word in words)[:200]


def run_rounds(
    starts: dict[str, Callable[[int], Process]], *, rounds: int, images: int, turn_seconds: float
) -> tuple[dict[str, list[Turn]], dict[str, dict[str, Any]], dict[str, str]]:
    """Start all candidates on one core, let them take turns, and return their turns, first answers and failures.

    A first turn of ``images`` warms up and is left out; the turns that count are as much longer as it takes to fill
    ``turn_seconds`` of CPU time, up to four times. Each round begins with another candidate.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in starts}
    firsts, failures, sizes = {}, {}, {}
    processes: dict[str, Process] = {}
    # One core for the candidates and, where there is a second one, another for this process.
    core, *others = sorted(os.sched_getaffinity(0), reverse=True)
    os.sched_setaffinity(0, others or {core})
    with ExitStack() as stack:
        for name, start in starts.items():
            print(f"  start {name}", file=sys.stderr, flush=True)
            try:
                processes[name] = start(core)
                stack.callback(processes[name].close)
                firsts[name] = processes[name].first
                warm = processes[name].turn(images)
                sizes[name] = images * max(1, min(4, round(turn_seconds / warm.cpu_seconds)))
            except CandidateError as error:
                failures[name] = str(error)
        names = [name for name in starts if name not in failures]
        for number in range(rounds):
            print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if name in failures:
                    continue
                try:
                    turns[name].append(processes[name].turn(sizes[name]))
                except CandidateError as error:
                    failures[name] = f"failed in round {number + 1}: {error}"
    return {name: turns[name] for name in starts if name not in failures}, firsts, failures


def summarise(turns: list[Turn], baseline: list[Turn]) -> dict[str, Any]:
    """Medians with smallest and largest: speed, and its ratio to the baseline inside each round."""
    speeds = [turn.images / turn.cpu_seconds for turn in turns]
    base = [turn.images / turn.cpu_seconds for turn in baseline]
    return {
        "images_per_cpu_second": _spread(speeds),
        "images_per_second": _spread([turn.images / turn.wall_seconds for turn in turns]),
        "ratio": _spread([own / other for own, other in zip(speeds, base, strict=True)]),
        "rounds": [asdict(turn) for turn in turns],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
