"""``run.parallelism: fsdp2``: the losses, averages, evaluations and files of a run with all weights on one rank."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.utils import dist

from tests.conftest import ROOT, run_train
from tests.training.test_train import losses
from vitcomposer.algorithms import averaged_weights
from vitcomposer.errors import ConfigError
from vitcomposer.models import build_model, load_weights
from vitcomposer.schema import Optimizer, Run
from vitcomposer.training.execution import (
    BY_NORM,
    HAS_NORMS,
    SPLITS_RECOMPUTED,
    check_execution,
    check_shares,
    share_blocks,
)

CONVIT = str(ROOT / "yamls/convit_ti.yaml")
NETWORK = {"image_size": 32, "patch_size": 8, "depth": 2, "local_up_to_layer": 1}
STEPS = 10
EVALUATED = [f"metrics/{label}/{name}" for label in ("eval", "ema") for name in ("loss", "top1", "class_top1")]


def overrides(folder: Path, name: str, steps: int, *more: str) -> list[str]:
    """Without mixing, which pairs the images of a rank, and drop path: the number of ranks changes rounding alone."""
    algorithms = [
        "algorithms.EMA={smoothing: 0.7, update_interval: 1ba}",
        # Above all norms: a gradient that is clipped hides a wrong scale.
        "algorithms.GradientClipping={clipping_type: norm, clipping_threshold: 10}",
    ]
    data = ["data.local=null", "data.source=synthetic", "data.synthetic_samples=320", "data.num_workers=0"]
    model = [f"model.{key}={value}" for key, value in {**NETWORK, "num_classes": 8, "drop_path_rate": 0}.items()]
    # Keys' biases have no gradient but rounding noise, which Adam would blow up with its own eps.
    optimizer = ["optimizer.lr=3e-2", "optimizer.options={eps: 1e-4}", "schedule.t_warmup=0ba", "schedule.alpha_f=1"]
    run = [f"run.{key}=5ba" for key in ("eval_interval", "save_interval")]
    run += [f"run.folder={folder}", f"run.name={name}", "run.log_interval=1ba", "run.progress_bar=false"]
    step = ["precision=fp32", "global_train_batch_size=16", "mixing.prob=0", "augment.repeated_augmentation=1"]
    return [*algorithms, *data, *model, *optimizer, *run, *step, f"max_duration={steps}ba", *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run_train([CONVIT, *overrides(folder, "whole", STEPS)]) == 0
    return folder / "whole"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    command = [
        str(Path(sys.executable).parent / "composer"),
        "-n",
        "2",
        "-m",
        "tests.training.test_parallelism",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "sharded"


def train_on_this_rank(folder: Path) -> None:
    """Each step in two microbatches, stopped at the middle and resumed."""
    more = ("run.parallelism=fsdp2", "run.device_train_microbatch_size=4")
    for steps in (STEPS // 2, STEPS):
        assert run_train([CONVIT, *overrides(folder, "sharded", steps, *more)]) == 0


def checkpoint(run: Path) -> dict:
    # Our own checkpoint, just written by this test: Composer's format needs full unpickling.
    return torch.load(run / "checkpoints/latest-rank0.pt", map_location="cpu", weights_only=False)


def evaluations(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if EVALUATED[0] in row for name in EVALUATED]


@pytest.mark.timeout(400)
def test_sharded_run_that_was_resumed_has_the_losses_and_evaluations_of_a_whole_one(whole: Path, sharded: Path) -> None:
    assert json.loads((sharded / "summary.json").read_text())["world_size"] == 2
    assert len(losses(sharded)) == STEPS
    assert losses(sharded) == pytest.approx(losses(whole), rel=1e-5)
    assert len(evaluations(sharded)) == 2 * len(EVALUATED)
    assert evaluations(sharded) == pytest.approx(evaluations(whole), rel=1e-5)
    raw, averaged = (evaluations(sharded)[EVALUATED.index(f"metrics/{label}/loss")] for label in ("eval", "ema"))
    assert raw != pytest.approx(averaged, rel=1e-4)


@pytest.mark.timeout(400)
def test_sharded_checkpoint_holds_the_weights_and_averages_of_a_whole_one(whole: Path, sharded: Path) -> None:
    ours, theirs = checkpoint(sharded), checkpoint(whole)
    for read in (lambda saved: saved["state"]["model"], averaged_weights):
        assert read(ours).keys() == read(theirs).keys()
        for name, value in read(ours).items():
            assert type(value) is torch.Tensor
            torch.testing.assert_close(value, read(theirs)[name], rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.equal(averaged_weights(ours)["model.head.weight"], ours["state"]["model"]["model.head.weight"])


@pytest.mark.timeout(400)
def test_sharded_checkpoint_fills_a_plain_model_and_goes_on_with_ddp(
    whole: Path, sharded: Path, tmp_path: Path
) -> None:
    model = build_model("convit_tiny", num_classes=8, **NETWORK)
    load_weights(model, sharded / "checkpoints/latest-rank0.pt")
    saved = checkpoint(sharded)["state"]["model"]
    assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in model.state_dict().items())
    for run in (sharded, whole):
        shutil.copytree(run, tmp_path / run.name, symlinks=True)
        assert run_train([CONVIT, *overrides(tmp_path, run.name, STEPS + 3)]) == 0
    curve = losses(tmp_path / "sharded")
    assert len(curve) == STEPS + 3 and curve == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def config(optimizer: str = "adamw", **algorithms: dict) -> Any:
    chosen = Optimizer(name=optimizer, lr=1e-3, lr_batch_size=16, lr_scaling="none", weight_decay=0.05)
    return SimpleNamespace(optimizer=chosen, algorithms=algorithms)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (config(optimizer="muon"), "optimizer.name must be adamw.* with fsdp2.*got 'muon'"),
        (config(optimizer="adamw_schedulefree"), "optimizer.name must be adamw"),
        (config(SAM={}), "algorithms.SAM must be left out with fsdp2"),
        (
            config(GradientClipping={"clipping_type": "adaptive"}),
            "clipping_type must be norm, value or norm_per_parameter with fsdp2, got 'adaptive'",
        ),
    ],
)
def test_what_needs_whole_tensors_is_refused(cfg: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_shares(cfg)


@pytest.mark.skipif(HAS_NORMS, reason="for the older torch")
@pytest.mark.parametrize("name", BY_NORM)
def test_optimizers_by_norm_need_a_newer_torch(name: str) -> None:
    with pytest.raises(ConfigError, match=f"adamw or sgd with fsdp2.*got '{name}'.*needs torch 2.14"):
        check_shares(config(optimizer=name))


@pytest.mark.skipif(SPLITS_RECOMPUTED, reason="for the older torch")
def test_graphs_that_ddp_splits_compute_nothing_again_before_a_newer_torch() -> None:
    check = partial(check_execution, device="gpu", device_batch_size=8, world_size=2)
    run = Run(name="x", compile=True, activation_checkpointing=0.5)
    with pytest.raises(ConfigError, match="run.activation_checkpointing must be 0 with run.compile and DDP.*got 0.5"):
        check(run)
    check(run, world_size=1)
    check(replace(run, parallelism="fsdp2"))
    check(replace(run, compile=False))


def test_network_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="run.parallelism must be ddp for a network without blocks"):
        share_blocks(torch.nn.Linear(2, 2), Run(name="x", parallelism="fsdp2"), world_size=2)


@pytest.mark.skipif(dist.get_world_size() > 1, reason="for one rank")
def test_one_rank_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train([CONVIT, *overrides(tmp_path, "one", 1, "run.parallelism=fsdp2")]) == 2
    assert "run.parallelism must be ddp on one rank" in capsys.readouterr().err


@pytest.mark.skipif(dist.get_world_size() > 1, reason="for one rank")
@pytest.mark.parametrize("recipe", ["linear", "knn"])
def test_one_rank_is_refused_where_the_trunk_does_not_learn(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["data.local=null", "data.source=synthetic", "data.synthetic_samples=32", "data.num_workers=0"]
    tiny = ["model.image_size=32", "model.patch_size=8", "model.depth=4", "precision=fp32", f"run.folder={tmp_path}"]
    batch = ["evaluation.global_batch_size=8", "knn.k=[5]"] if recipe == "knn" else ["global_train_batch_size=8"]
    page = str(ROOT / f"yamls/probe_{recipe}.yaml")
    assert run_train([page, *data, *tiny, *batch, "run.parallelism=fsdp2"]) == 2
    assert "run.parallelism must be ddp on one rank" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    train_on_this_rank(Path(sys.argv[1]))
