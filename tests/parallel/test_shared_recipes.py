"""Compiled blocks, linear probes and nearest neighbours on two ranks, with shares of the weights and with all."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT
from tests.parallel.ranks import GRAPHS, STOP, train_on
from tests.parallel.test_fsdp2 import assert_close
from tests.training.test_parallelism import CONVIT, checkpoint, overrides
from tests.training.test_train import losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS, SAVED = 4, 2
KINDS = ("ddp", "fsdp2", "resumed_fsdp2")
DATA = ["data.local=null", "data.source=synthetic", "data.synthetic_samples=64", "data.num_workers=0"]
TRUNK = ["model.image_size=32", "model.patch_size=8", "model.depth=4", "precision=fp32", "run.progress_bar=false"]


class Trained(NamedTuple):
    folder: Path
    graphs: list[int]  # of each compiled start, in their order

    def runs(self, recipe: str) -> tuple[Path, ...]:
        return tuple(self.folder / f"{recipe}_{kind}" for kind in KINDS)


def page(recipe: str, folder: Path, name: str) -> list[str]:
    run = [f"run.folder={folder}", f"run.name={name}", f"run.parallelism={name.rpartition('_')[2]}"]
    batch = ["global_train_batch_size=8", "model.num_classes=5", f"max_duration={STEPS}ba", "run.log_interval=1ba"]
    saved = [f"run.eval_interval={STEPS}ba", f"run.save_interval={SAVED}ba"]
    if recipe == "compiled":
        recomputed = 0.5 if "fsdp2" in name else 0  # which changes no bit; not with DDP's graphs of torch 2.7
        more = ["model.drop_path_rate=0.3", f"run.activation_checkpointing={recomputed}", *saved, *run]
        graphs = [] if "eager" in name else ["run.compile=true", GRAPHS]
        return [CONVIT, *overrides(folder, name, STEPS, *more), *graphs]
    if recipe == "knn":
        batch = ["evaluation.global_batch_size=8", "knn.k=[5]"]
        return [str(ROOT / "yamls/probe_knn.yaml"), *DATA, *TRUNK, *batch, *run]
    heads = ["heads.lr_factors=[1,100]", *saved]
    return [str(ROOT / "yamls/probe_linear.yaml"), *DATA, *TRUNK, *batch, *heads, *run]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Of one launch with all runs in turn; those to be resumed stop a step behind a checkpoint and start again."""
    folder = tmp_path_factory.mktemp("runs")
    starts = [page("compiled", folder, "eager_ddp"), *(page("knn", folder, f"knn_{kind}") for kind in KINDS[:2])]
    for recipe in ("compiled", "probe"):
        whole, shared, resumed = (page(recipe, folder, f"{recipe}_{kind}") for kind in KINDS)
        starts += [whole, shared, [*resumed, f"{STOP}{SAVED + 1}"], resumed]
    said = train_on(2, starts, folder)
    return Trained(folder, [int(count) for count in re.findall(r"graphs: (\d+)", said)])


def measured(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in sorted(row) if key.startswith(("metrics/", "knn/"))]


def assert_resumed(shared: Path, resumed: Path) -> None:
    assert len(set(losses(shared))) == STEPS and losses(resumed) == losses(shared)
    assert measured(resumed) == measured(shared)
    ours, theirs = (checkpoint(run)["state"] for run in (resumed, shared))
    for part in ("model", "optimizers"):
        assert assert_close(ours[part], theirs[part], 0.0, part) > 4


def test_compiled_blocks_train_as_a_compiled_network_and_an_eager_one(trained: Trained) -> None:
    """With stochastic depth and, where weights are shared, the first block's activations computed again."""
    whole, shared, _ = trained.runs("compiled")
    # The network in training and in evaluation; each of two unlike blocks in both; one start evaluates nothing.
    assert trained.graphs == [2, 4, 2, 4]
    for other in (trained.folder / "eager_ddp", whole):
        assert losses(shared) == pytest.approx(losses(other), abs=1e-5)
        assert measured(shared) == pytest.approx(measured(other), abs=1e-5)
        assert_close(*(checkpoint(run)["state"]["model"] for run in (shared, other)), 1e-4)


@pytest.mark.parametrize("recipe", ["compiled", "probe"])
def test_resumed_run_ends_bit_for_bit_as_the_unbroken_one(recipe: str, trained: Trained) -> None:
    assert_resumed(*trained.runs(recipe)[1:])


def test_probe_has_the_losses_heads_and_accuracies_of_all_weights_on_every_rank(trained: Trained) -> None:
    """Batch norms of heads know the images of their rank alone; all ranks evaluate with those of rank 0."""
    whole, shared, _ = trained.runs("probe")
    assert losses(shared) == pytest.approx(losses(whole), abs=1e-5)
    assert measured(shared) == pytest.approx(measured(whole), abs=1e-6) and len(measured(whole)) >= 12
    ours, theirs = (checkpoint(run)["state"]["model"] for run in (shared, whole))
    assert "classifiers.0.0.weight" in ours
    assert_close(ours, theirs, 1e-5)


def test_neighbours_are_those_of_all_weights_on_every_rank(trained: Trained) -> None:
    whole, shared = (measured(trained.folder / f"knn_{kind}") for kind in KINDS[:2])
    assert len(whole) == 3 and shared == whole
