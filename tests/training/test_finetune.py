"""Fine-tuning through train.py: weights of others, blocks that learn, rates by layer, resuming, two ranks, safety."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from composer import Callback
from torch import Tensor

from recipes import RECIPES
from tests.conftest import ROOT, run_train, tiny_photo_overrides
from tests.training.test_train import losses
from vitcomposer import config
from vitcomposer.models.weights.load import read_checkpoint
from vitcomposer.training.fit import fit

PAGE = str(ROOT / "yamls/finetune_photos.yaml")
DEPTH = 3
SIZE = {"depth": DEPTH, "embed_dim": 32, "num_heads": 4}
TINY = [f"model.{key}={value}" for key, value in SIZE.items()]
FROZEN = ("cls_token", "pos_embed", "patch_embed.", "blocks.0.", "blocks.1.")


def timm_file(folder: Path, name: str = "deit3_small_patch16_224") -> Path:
    """Weights of a small network of timm with eight times eight pixels a patch, for 64 pixels and 1000 classes."""
    torch.manual_seed(0)
    network = timm.create_model(name, img_size=64, patch_size=8, **SIZE)
    torch.save({"model": network.state_dict()}, folder / "timm.pth")
    return folder / "timm.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return timm_file(tmp_path_factory.mktemp("weights"))


def overrides(mds: Path, runs: Path, name: str, weights: Path) -> list[str]:
    mechanics = ["run.save_interval=5ba", "run.eval_interval=1ep", "run.progress_bar=false"]
    tiny = [line for line in tiny_photo_overrides(mds, runs, name) if "model.depth" not in line]
    return [*tiny, *TINY, *mechanics, "max_duration=1ep", f"init.weights={weights}"]


def state(run: Path) -> dict[str, Tensor]:
    content = read_checkpoint(run / "checkpoints/latest-rank0.pt")["state"]["model"]
    return {key.removeprefix("model."): value for key, value in content.items()}


@pytest.mark.parametrize(
    ("page", "name"), [("finetune_deit_b_384", "deit_base_patch16_224"), ("finetune_photos", "deit3_small_patch16_224")]
)
def test_yaml_starts_from_weights_of_timm(
    page: str, name: str, photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = timm_file(tmp_path, name)
    path = str(ROOT / f"yamls/{page}.yaml")
    assert run_train([path, *overrides(photo_mds, tmp_path, page, file), "max_duration=2ba"]) == 0
    assert json.loads((tmp_path / page / "summary.json").read_text())["steps"] == 2
    out = capsys.readouterr().out
    assert "100.0% of the model without its head" in out and "resized to the model's grid: pos_embed" in out
    assert "left as initialised, other number of classes: head.bias, head.weight" in out


class WatchRates(Callback):
    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def after_train_batch(self, state, logger) -> None:
        self.rates.append([group["lr"] for group in state.optimizers[0].param_groups])


def test_rates_of_the_layers_keep_their_ratios_in_a_run(photo_mds: Path, tmp_path: Path, weights: Path) -> None:
    cfg = config.load(PAGE, [*overrides(photo_mds, tmp_path, "rates", weights), "optimizer.layer_decay=0.5"])
    trainer = RECIPES["supervised"].build(cfg)
    watch = WatchRates()
    trainer.state.callbacks.append(watch)
    assert fit(trainer, cfg) == 0
    for rates in watch.rates:
        ratios = {round(rate / rates[0], 12) for rate in rates}
        assert ratios == {0.5**power for power in range(DEPTH + 2)}
    assert len({rates[0] for rates in watch.rates}) == len(watch.rates) == 12, "the schedule moves all of them"
    assert max(rates[0] for rates in watch.rates) == pytest.approx(5e-4 * 16 / 256)


@pytest.fixture(scope="module")
def last_block(photo_mds: Path, tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    given = overrides(photo_mds, folder, "last_block", weights)
    # A rate at which 12 steps move what LayerScale makes small.
    assert run_train([PAGE, *given, "init.train_blocks=1", "optimizer.lr=0.05"]) == 0
    return folder / "last_block"


def test_last_block_norm_and_head_learn_and_the_rest_stays(last_block: Path, weights: Path) -> None:
    source = torch.load(weights, weights_only=True)["model"]
    for name, value in state(last_block).items():
        if name.startswith(FROZEN) and name != "pos_embed":
            assert torch.equal(value, source[name]), name
        elif name in source and value.shape == source[name].shape:
            assert not torch.equal(value, source[name]), name
    summary = json.loads((last_block / "summary.json").read_text())
    assert summary["top1_ema"] is not None, "the average of a network that learns in part is measured too"


def test_resumed_run_needs_no_file(photo_mds: Path, tmp_path: Path, weights: Path) -> None:
    file = shutil.copy(weights, tmp_path / "gone.pth")
    given = [*overrides(photo_mds, tmp_path, "resumed", file), "init.train_blocks=1"]
    assert run_train([PAGE, *given, "max_duration=3ba"]) == 0
    file.unlink()
    assert run_train([PAGE, *given, "max_duration=6ba"]) == 0
    assert len(losses(tmp_path / "resumed")) == 6
    source, found = torch.load(weights, weights_only=True)["model"], state(tmp_path / "resumed")
    assert torch.equal(found["blocks.1.attn.qkv.weight"], source["blocks.1.attn.qkv.weight"])
    assert not torch.equal(found["blocks.2.attn.qkv.weight"], source["blocks.2.attn.qkv.weight"])


@pytest.mark.slow
def test_two_ranks_train_the_last_block_as_one_does(photo_mds: Path, tmp_path: Path, weights: Path) -> None:
    given = [*overrides(photo_mds, tmp_path, "two", weights), "init.train_blocks=1", "max_duration=4ba"]
    command = [str(Path(sys.executable).parent / "composer"), "-n", "2", "train.py", PAGE, *given]
    # Without stochastic depth, which draws for each rank by itself.
    done = subprocess.run([*command, "model.drop_path_rate=0"], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert run_train([PAGE, *given, "model.drop_path_rate=0", "run.name=one"]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (["init.train_blocks=4"], "init.train_blocks must be at most the 3 blocks of the model, got 4"),
        (["init.train_blocks=1", "init.weights=null"], "init.train_blocks must be null without init.weights"),
        (["init.weights=absent.pth"], "absent.pth"),
        (["model.depth=4"], "of the model, at least 100.0% is required"),
        (["model.depth=2"], "the model has no blocks.2.norm1.weight"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused(
    change: list[str], error: str, photo_mds: Path, tmp_path: Path, weights: Path, capsys
) -> None:
    assert run_train([PAGE, *overrides(photo_mds, tmp_path, "refused", weights), *change]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("name", ["probe_linear", "probe_knn", "swav_demo", "dino_vit_s"])
def test_train_blocks_are_refused_where_a_recipe_decides_what_learns(name: str, capsys) -> None:
    given = ["init.train_blocks=1", "init.weights=x.pt", "data.source=synthetic"]
    assert run_train([str(ROOT / f"yamls/{name}.yaml"), *given]) == 2
    found = capsys.readouterr().err
    assert "init.train_blocks  must be null in the recipe" in found and "init.weights       must be a file" in found


class Payload:
    """Would run code when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_in_place_of_weights_or_checkpoint_does_not_run(
    zipped: bool, photo_mds: Path, tmp_path: Path, weights: Path, capsys
) -> None:
    marker, bad = tmp_path / "code_ran", tmp_path / "bad.pth"
    content = {"model": {"cls_token": torch.zeros(1)}, "extra": Payload(marker)}
    torch.save(content, bad, _use_new_zipfile_serialization=zipped)
    given = overrides(photo_mds, tmp_path, "safe", weights)
    assert run_train([PAGE, *given, f"init.weights={bad}"]) == 2
    assert "mkdir" in capsys.readouterr().err and not marker.exists()

    (tmp_path / "safe/checkpoints").mkdir(parents=True)
    shutil.copy(bad, tmp_path / "safe/checkpoints/latest-rank0.pt")
    assert run_train([PAGE, *given]) == 2
    error = capsys.readouterr().err
    assert "run.folder must hold checkpoints of weights and numbers" in error and "latest-rank0.pt" in error
    assert not marker.exists()
