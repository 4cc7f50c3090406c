"""A run that another PyTorch began goes on with this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, run_train
from tests.faults.small_run import DEIT, STEPS, rows, tiny
from vitcomposer.runs.layout import LATEST

BESIDE = [ROOT / name / "bin/python" for name in (".venv", ".venv-torch-2.7")]
HALF = STEPS // 2


def other() -> Path | None:
    """The Python of the project's other set of packages, where ``make setup TORCH=2.7`` has made it."""
    return next((path for path in BESIDE if path.exists() and not path.parent.parent.samefile(sys.prefix)), None)


def train_there(python: Path, argv: list[str]) -> str:
    """Run train.py with the other set; what it says is its version."""
    program = "import sys, torch, train; print(torch.__version__); sys.exit(train.main(sys.argv[1:]))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", program, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()[0]


def losses(run: Path) -> list[float]:
    return [row["loss/train/total"] for row in rows(run) if "loss/train/total" in row]


@pytest.mark.slow
def test_a_run_that_another_torch_began_goes_on_with_this_one(tmp_path: Path) -> None:
    python = other()
    if python is None:
        pytest.skip("one set of packages: make setup TORCH=2.7 makes the second")
    ema = ["algorithms.EMA={smoothing: 0.9, update_interval: 1ba}", "run.eval_interval=4ba"]
    assert train_there(python, [DEIT, *tiny(tmp_path, "moved"), *ema, f"max_duration={HALF}ba"]) != torch.__version__
    assert run_train([DEIT, *tiny(tmp_path, "stayed"), *ema, f"max_duration={HALF}ba"]) == 0
    for name in ("moved", "stayed"):
        assert run_train([DEIT, *tiny(tmp_path, name), *ema]) == 0
    moved, stayed = (losses(tmp_path / name) for name in ("moved", "stayed"))
    assert len(moved) == STEPS and moved == pytest.approx(stayed, rel=1e-4)  # sums of other kernels round otherwise
    assert (tmp_path / "moved/checkpoints" / LATEST).exists()
