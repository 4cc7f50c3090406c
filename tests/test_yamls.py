"""Every yaml builds at its real size and trains two batches of synthetic images through train.py."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import run_train
from vitcomposer import config
from vitcomposer.flops import forward_flops
from vitcomposer.trainer import build_network

ROOT = Path(__file__).resolve().parent.parent
IMAGENET_YAMLS = sorted(p for p in (ROOT / "yamls").glob("*.yaml") if p.stem != "demo")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", IMAGENET_YAMLS, ids=lambda p: p.stem)
def test_yaml_trains_two_batches_from_the_loss_of_a_uniform_guess(path: Path, tmp_path: Path) -> None:
    overrides = ["data.source=synthetic", "data.local=null", "data.synthetic_samples=4", "data.num_workers=0"]
    overrides += ["precision=fp32", "global_train_batch_size=2", "max_duration=2ba", "schedule.t_warmup=1ba"]
    overrides += [f"run.folder={tmp_path}", "run.log_interval=1ba", "run.keep_checkpoints=1"]
    try:
        assert run_train([str(path), *overrides]) == 0
        run = tmp_path / path.stem
        losses = [row["loss/train/total"] for row in read_jsonl(run / "metrics.jsonl") if "loss/train/total" in row]
        summary = json.loads((run / "summary.json").read_text())
    finally:
        shutil.rmtree(tmp_path)  # checkpoints of the large models are gigabytes
    # A zero head says 1/1000 for every class, and 1/2 for each of the thousand yes-or-no questions of BCE.
    guess = math.log(2) if path.stem.startswith("deit3") else math.log(1000)
    assert losses[0] == pytest.approx(guess, rel=0.02)
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert summary["steps"] == 2 and summary["images_seen"] == 4 and summary["finished"] is True
    assert summary["train_flops"] > 0 and summary["mfu"] is None and 0 <= summary["top1"] <= 1


@pytest.mark.parametrize("path", IMAGENET_YAMLS, ids=lambda p: p.stem)
def test_yaml_header_states_the_counted_flops(path: Path) -> None:
    cfg = config.load(path)
    with torch.device("meta"):
        flops = 3 * forward_flops(build_network(cfg.model), cfg.model.image_size)
    stated = re.search(r"Cost: ([\d.]+) GFLOP an image, ([\d.]+) EFLOP", path.read_text())
    assert stated is not None
    assert float(stated[1]) == pytest.approx(flops / 1e9, rel=0.01)
    images = 1_281_167 * int(cfg.max_duration.removesuffix("ep"))
    assert float(stated[2]) == pytest.approx(flops * images / 1e18, rel=0.02)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
