"""Every yaml builds at its real size and trains two batches of synthetic images through train.py."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import run_train
from vitcomposer import config
from vitcomposer.costs import costs_of

ROOT = Path(__file__).resolve().parent.parent
SUPERVISED = [p for p in sorted((ROOT / "yamls").glob("*.yaml")) if "recipe: supervised\n" in p.read_text()]
IMAGENET_YAMLS = [p for p in SUPERVISED if p.stem not in ("demo", "finetune_photos")]
FROM_SCRATCH = [p for p in IMAGENET_YAMLS if not p.stem.startswith("finetune_")]  # the others: test_finetune.py

LIVE_TEACHER = sorted((ROOT / "yamls").glob("deit_*_distilled.yaml"))  # built with small teachers in test_distill.py


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", FROM_SCRATCH, ids=lambda p: p.stem)
def test_yaml_trains_two_batches_from_the_loss_of_a_uniform_guess(path: Path, tmp_path: Path) -> None:
    overrides = ["data.source=synthetic", "data.local=null", "data.synthetic_samples=4", "data.num_workers=0"]
    overrides += ["precision=fp32", "global_train_batch_size=2", "max_duration=2ba", "schedule.t_warmup=1ba"]
    overrides += [f"run.folder={tmp_path}", "run.log_interval=1ba", "run.keep_checkpoints=1", "run.compile=false"]
    cfg = config.load(path)
    if "Curriculum" in cfg.algorithms:
        # Two steps have room for two stages; at 96 pixels an image costs 0.17 to 0.18 of one at 224.
        overrides += ["algorithms.Curriculum={image_sizes: [96, 224], compute: [0.15, 0.85]}"]
    try:
        assert run_train([str(path), *overrides]) == 0
        run = tmp_path / path.stem
        losses = [row["loss/train/total"] for row in read_jsonl(run / "metrics.jsonl") if "loss/train/total" in row]
        summary = json.loads((run / "summary.json").read_text())
    finally:
        shutil.rmtree(tmp_path)  # checkpoints of the large models are gigabytes
    # A zero head says 1/1000 for every class, and 1/2 for each of the thousand yes-or-no questions of BCE. Weights of
    # N(0, 0.02^2) make logits of N(0, 0.55^2) at width 768, which two images average.
    guess = math.log(2) if cfg.loss == "binary_cross_entropy" else math.log(1000)
    assert losses[0] == pytest.approx(guess, abs=1e-4 if cfg.model.weight_init == "big_vision" else 1.2)
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert summary["steps"] == 2 and summary["images_seen"] == 4 and summary["finished"] is True
    assert summary["train_flops"] > 0 and summary["mfu"] is None and 0 <= summary["top1"] <= 1


@pytest.mark.parametrize("path", [*IMAGENET_YAMLS, *LIVE_TEACHER], ids=lambda p: p.stem)
def test_yaml_header_states_the_counted_flops_and_the_planned_hours(path: Path, tmp_path: Path) -> None:
    found = costs_of(config.load(path), gpu="h200", gpus=1, images=1_281_167, results=tmp_path)
    stated = re.search(r"Cost: ([\d.]+) GFLOP an image, ([\d.]+) EFLOP; (?:([\d.]+) H200-hours)?", path.read_text())
    assert stated is not None
    assert float(stated[1]) == pytest.approx(found["train_flops_per_image"] / 1e9, rel=0.01)
    assert float(stated[2]) == pytest.approx(found["train_flops"] / 1e18, rel=0.02)
    if stated[3] is not None:
        assert float(stated[3]) == pytest.approx(found["gpu_hours"], rel=0.05)
        assert "roofline estimate, not measured" in path.read_text()


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
