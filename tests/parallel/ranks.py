"""Several runs of train.py one after the other on the ranks there are: Composer's import is paid once for all.

``train_on(2, runs, folder)`` starts this file under Composer's launcher with the command lines as JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from composer import Callback
from torch._dynamo.utils import counters

from recipes import RECIPES
from tests.conftest import ROOT, run_train
from vitcomposer import config
from vitcomposer.training.fit import fit

STOP = "stop_after="  # an argument of ours: raise after that step, as a fault would
GRAPHS = "graphs_alone"  # another one: run.compile makes graphs and says how many, and they run without a compiler


def train_on(ranks: int, runs: Sequence[Sequence[str]], folder: Path) -> str:
    """What the ranks printed; an AssertionError where a run did not end with status 0.

    Args:
        runs: Arguments of train.py; one that begins with ``STOP`` ends the run before its time.
    """
    page = folder / "runs.json"
    page.write_text(json.dumps([list(run) for run in runs]))
    command = [str(Path(sys.executable).parent / "composer"), "-n", str(ranks), "-m", "tests.parallel.ranks", str(page)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # more of them than cores wait for each other
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800, env=one_thread)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


class _Stopped(Exception):
    pass


class _Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def batch_end(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch == self.step:
            raise _Stopped


def _run(argv: list[str]) -> int:
    if GRAPHS in argv:
        torch._dynamo.reset()
        counters.clear()
        with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
            status = _run([argument for argument in argv if argument != GRAPHS])
        print(f"graphs: {counters['stats']['unique_graphs']}")
        return status
    stops = [int(argument.removeprefix(STOP)) for argument in argv if argument.startswith(STOP)]
    argv = [argument for argument in argv if not argument.startswith(STOP)]
    if not stops:
        return run_train(argv)
    cfg = config.load(argv[0], argv[1:])
    trainer = RECIPES[cfg.recipe].build(cfg)
    trainer.state.callbacks.append(_Stop(stops[0]))
    try:
        fit(trainer, cfg)
    except _Stopped:
        return 0
    return 1


def main() -> int:
    return max(_run(argv) for argv in json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    sys.exit(main())
