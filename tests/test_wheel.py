"""The wheel by itself: in an empty folder, away from the checkout, it converts, plans and trains by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PARTS = ("vitcomposer", "recipes", "yamls", "benchmarks", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files alone. It is built from a copy, without what older builds have left."""
    tree, wheels, target = (tmp_path_factory.mktemp("wheel") / name for name in ("tree", "wheels", "target"))
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, tree / part)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(tree)]
    subprocess.run(build, check=True, timeout=200)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=200)
    return target


def run(installed: Path, cwd: Path, *command: str) -> str:
    """What the command prints, where nothing but the wheel and its requirements can be imported."""
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_away_from_the_checkout_converts_plans_and_trains(installed: Path, tmp_path: Path) -> None:
    python, vitcomposer = sys.executable, str(installed / "bin/vitcomposer")
    where = run(
        installed, tmp_path, python, "-c", "import recipes, vitcomposer as v; print(v.__file__, recipes.__file__)"
    )
    assert where.split() == [str(installed / name / "__init__.py") for name in ("vitcomposer", "recipes")]
    assert sorted(path.name for path in (installed / "vitcomposer/yamls").iterdir()) == sorted(
        path.name for path in (ROOT / "yamls").glob("*.yaml")
    )
    assert "1,797 of 1,797 images" in run(installed, tmp_path, vitcomposer, "convert", "digits", "digits")
    plan = run(installed, tmp_path, vitcomposer, "plan", "deit_s", "--gpu", "h100", "--gpus", "8")
    assert "deit_s: deit_small_patch16" in plan
    assert "input_full.json)" in plan  # the CPU cores are those of a measurement that came with the wheel
    overrides = ["data.local=digits", "max_duration=2ba", "schedule.t_warmup=1ba", "run.eval_interval=2ba"]
    run(installed, tmp_path, python, "-m", "vitcomposer.train", "demo", *overrides)
    assert (tmp_path / "runs/demo/summary.json").is_file()
