"""A run of eight steps, and what two runs have to have in common to be called the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, run_train, tiny_photo_overrides
from vitcomposer.runs.layout import LATEST

DEIT = str(ROOT / "yamls/deit_ti.yaml")
STEPS = 8
TIMES = ("seconds", "throughput/", "time/")  # of a line, what differs by the clock
CLOCKS = ("Throughput", "total_wct", "iteration_wct", "epoch_wct", "batch_wct", "repr", "run_name")  # of a checkpoint


def tiny(runs: Path, name: str) -> list[str]:
    """Eight steps, two an epoch, on images made from their number; a checkpoint every third, all of them kept.

    The second evaluation comes at the end, after the last checkpoint.
    """
    data = ["data.local=null", "data.source=synthetic", "data.synthetic_samples=32"]
    run = [f"max_duration={STEPS}ba", "run.save_interval=3ba", "run.keep_checkpoints=9", "run.eval_interval=3ep"]
    small = ["model.depth=1", "evaluation.global_batch_size=16", "run.progress_bar=false"]
    return [*tiny_photo_overrides(Path("unused"), runs, name), *data, *run, *small]


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock makes of them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def saved(run: Path) -> Any:
    return torch.load(run / "checkpoints" / LATEST, map_location="cpu", weights_only=False)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Every tensor and number of two checkpoints, bit for bit."""
    assert type(a) is type(b), place
    if isinstance(a, Mapping):
        assert a.keys() == b.keys(), place
        for key in a:
            if key not in CLOCKS:
                assert_same(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}/{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif hasattr(a, "tobytes"):
        assert a.tobytes() == b.tobytes(), place
    else:
        assert a == b, place


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("unbroken")
    assert run_train([DEIT, *tiny(runs, "run")]) == 0
    return runs / "run"
