"""Weights carry their architecture: heads, pooling and positions of others' files and of our own runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.conftest import ROOT, run_train
from vitcomposer import config
from vitcomposer.errors import ConfigError
from vitcomposer.evaluation.trained import load_trained
from vitcomposer.models import build_model, load_weights
from vitcomposer.models.features import FrozenFeatures
from vitcomposer.models.positions import sincos_positions
from vitcomposer.schema import Init, Model
from vitcomposer.tasks.probe import EmbeddingTask
from vitcomposer.teacher.network import build_teacher
from vitcomposer.training.network import build_network

SIZE, GRID, DEPTH = 64, (4, 4), 2
KNN, PROBE = (str(ROOT / f"yamls/probe_{name}.yaml") for name in ("knn", "linear"))
Wrap = Callable[[dict[str, Tensor]], Any]


def theirs(heads: int, *, fixed: bool = False) -> nn.Module:
    """A trained ViT-S of two blocks by timm, with MoCo-v3's positions if they are fixed."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch16_224", img_size=SIZE, depth=DEPTH, num_heads=heads, num_classes=0
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * max(0.1, parameter.std(correction=0).item()) * torch.randn_like(parameter))
        if fixed:
            model.pos_embed.zero_()
            model.pos_embed[:, 1:] = sincos_positions(GRID, 384, "sincos_moco3")
    return model


def moco3(state: dict[str, Tensor]) -> dict[str, Any]:
    encoders = ("base_encoder", "momentum_encoder")
    found = {f"module.{encoder}.{key}": value for encoder in encoders for key, value in state.items()}
    return {"epoch": 300, "arch": "vit_small", "state_dict": found}


def dino(state: dict[str, Tensor]) -> dict[str, Any]:
    trunk = {f"backbone.{key}": value for key, value in state.items()}
    return {"student": {f"module.{key}": value for key, value in trunk.items()}, "teacher": trunk}


def deit(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"model": state}


def timms(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"arch": "deit_small_patch16_224", "state_dict": state, "state_dict_ema": state, "epoch": 3}


# How it was trained, how its file looks, and what a ViT-S of ours must be told.
LAYOUTS: dict[str, tuple[int, bool, Wrap, dict[str, Any]]] = {
    "moco3": (12, True, moco3, {"num_heads": 12}),
    "moco3, positions computed": (12, True, moco3, {"num_heads": 12, "position_embedding": "sincos_moco3"}),
    "moco3, converted to DeiT": (12, True, deit, {"num_heads": 12}),
    "dino": (6, False, dino, {}),
    "deit": (6, False, deit, {}),
    "timm": (6, False, timms, {}),
}


def model_of(**options: Any) -> Model:
    return Model(name="vit_small_patch16", num_classes=0, image_size=SIZE, drop_path_rate=0.0, depth=DEPTH, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_probe_and_neighbours_see_the_features_of_the_pretrained_network(layout: str, tmp_path: Path) -> None:
    heads, fixed, wrap, options = LAYOUTS[layout]
    reference = theirs(heads, fixed=fixed)
    torch.save(wrap(dict(reference.state_dict())), tmp_path / "weights.pth")
    trunk = build_network(model_of(**options), Init(weights=str(tmp_path / "weights.pth")))
    images = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = reference.forward_features(images)
    found = FrozenFeatures(trunk, ["lastCLS", "mean"])(images)
    torch.testing.assert_close(found["lastCLS"], expected[:, 0])
    torch.testing.assert_close(found["mean"], expected[:, 1:].mean(dim=1))
    torch.testing.assert_close(EmbeddingTask(trunk).features(images), expected[:, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_heads_and_pooling_than_the_layout_had_are_refused_by_name(layout: str, tmp_path: Path) -> None:
    heads, fixed, wrap, options = LAYOUTS[layout]
    torch.save(wrap(dict(theirs(heads, fixed=fixed).state_dict())), tmp_path / "weights.pth")
    init, wrong = Init(weights=str(tmp_path / "weights.pth")), 6 if heads == 12 else 12
    rule = rf"model\.num_heads must be {heads} for .*weights\.pth, as .* says, got {wrong}\. Set .*num_heads={heads}"
    with pytest.raises(ConfigError, match=rule):
        build_network(model_of(**{**options, "num_heads": wrong}), init)
    if wrap in (moco3, dino):
        with pytest.raises(ConfigError, match=r"model\.pool must be token .* got avg"):
            build_network(model_of(**{**options, "pool": "avg"}), init)


def test_moco3s_positions_are_no_others(tmp_path: Path) -> None:
    torch.save(moco3(dict(theirs(12, fixed=True).state_dict())), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="the model has no pos_embed; set model.position_embedding=learned"):
        build_network(model_of(num_heads=12, position_embedding="sincos"), Init(weights=str(tmp_path / "weights.pth")))


def test_report_says_which_weights_of_timm_were_taken_and_what_was_assumed() -> None:
    state = dict(theirs(6).state_dict())
    small = {"num_classes": 0, "image_size": SIZE, "depth": DEPTH}
    model = build_model("vit_small_patch16", **small)
    report = str(load_weights(model, timms(state)))
    assert "trained with 6 heads, as its architecture deit_small_patch16_224 says" in report
    assert "taken: state_dict, the trained weights, not state_dict_ema, their average" in report
    assert "assumed: 6 heads and pool=token, the source says neither" in str(load_weights(model, state))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({"position_embedding": "sincos"}, {}, "it has no pos_embed; set model.position_embedding=sincos"),
        ({"class_token": False, "pool": "avg"}, {"pool": "avg"}, "it has no cls_token; set model.class_token=false"),
        ({"pool": "avg"}, {"class_token": False, "pool": "avg"}, "has no cls_token; set model.class_token=true"),
        ({}, {"init_values": 0.1}, r"it has no blocks.0.ls1.gamma, .*; set model.init_values=0"),
    ],
)
def test_what_no_source_fills_is_not_left_at_random(source: dict, target: dict, message: str) -> None:
    sizes = {"num_classes": 0, "image_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}
    weights = build_model("vit_tiny_patch16", **{**sizes, **source}).state_dict()
    with pytest.raises(ValueError, match=message):
        load_weights(build_model("vit_tiny_patch16", **{**sizes, **target}), weights, min_matched=0.5)


# A run of ours: four heads of eight, means of patches, fixed positions, a convolutional stem.
BLOCK = {"name": "vit_tiny_patch16", "num_classes": 10, "image_size": 16, "drop_path_rate": 0.3, "patch_size": 4}
BLOCK |= {"embed_dim": 32, "depth": 2, "num_heads": 4, "pool": "avg", "class_token": False}
BLOCK |= {"position_embedding": "sincos", "weight_init": "big_vision", "stem": "conv"}


STATISTICS = {"mean": [0.3, 0.3, 0.3], "std": [0.35, 0.35, 0.35]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "pretrained"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"recipe": "supervised", "model": BLOCK, "augment": STATISTICS}))
    state = {f"model.{key}": value for key, value in build_model(**BLOCK).state_dict().items()}
    torch.save({"state": {"model": state, "algorithms": []}}, folder / "checkpoints/latest-rank0.pt")
    return folder


@pytest.mark.parametrize("part", ["", "checkpoints/latest-rank0.pt"])
@pytest.mark.parametrize("page", [KNN, PROBE])
def test_start_from_a_run_reads_its_model_block(run: Path, part: str, page: str) -> None:
    cfg = config.load(page, [f"init.weights={run / part}"])
    for key in BLOCK.keys() - {"num_classes", "image_size", "drop_path_rate", "weight_init"}:
        assert getattr(cfg.model, key) == BLOCK[key], key
    assert (cfg.model.image_size, cfg.model.drop_path_rate, cfg.model.weight_init) == (16, 0.0, None)
    assert cfg.model.num_classes == (0 if page == KNN else 1000), "classes and dropout are the new run's"
    seen = cfg if page == KNN else cfg.augment
    assert {"mean": list(seen.mean), "std": list(seen.std)} == STATISTICS
    trunk = build_network(Model(**{**vars(cfg.model), "num_classes": 0}), cfg.init)
    reference = build_model(**{**BLOCK, "num_classes": 0}).eval()
    load_weights(reference, torch.load(run / "checkpoints/latest-rank0.pt")["state"]["model"])
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(EmbeddingTask(trunk).features(images), reference(images))


def test_fine_tuning_keeps_its_size_and_a_distilled_name(run: Path) -> None:
    cfg = config.load(ROOT / "yamls/finetune_photos.yaml", [f"init.weights={run}"])
    assert (cfg.model.name, cfg.model.num_heads, cfg.model.image_size) == ("vit_tiny_patch16", 4, 224)
    page = {"recipe": "supervised", "model": {**BLOCK, "name": "deit_small_patch16"}}
    (run / "config.yaml").write_text(yaml.safe_dump(page))
    cfg = config.load(ROOT / "yamls/deit_s_distilled.yaml", [f"init.weights={run}"])
    assert (cfg.model.name, cfg.model.num_heads) == ("deit_small_distilled_patch16", 4)


def test_command_line_that_names_another_network_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["model.num_heads=2", "precision=fp32", f"run.folder={run.parent}", "data.source=synthetic"]
    assert run_train([KNN, f"init.weights={run}", *changes, "data.local=null"]) == 2
    error = capsys.readouterr().err
    page = run / "config.yaml"
    assert f"model.num_heads must be 4 for {run}, as {page} says, got 2. Set model.num_heads=4." in error


@pytest.mark.parametrize("given", ["run", "yaml"])
def test_classifier_of_a_run_is_no_other_network_by_an_override(run: Path, tmp_path: Path, given: str) -> None:
    block = {**BLOCK, "pool": None, "class_token": None, "position_embedding": None, "weight_init": None}
    page = config.load(ROOT / "yamls/demo.yaml", [f"model.{key}={_text(value)}" for key, value in block.items()])
    (run / "config.yaml").write_text(config.to_yaml(page))
    state = {f"model.{key}": value for key, value in build_model(**block).state_dict().items()}
    torch.save({"state": {"model": state, "algorithms": []}}, run / "checkpoints/latest-rank0.pt")
    source, more = (run, []) if given == "run" else (ROOT / "yamls/demo.yaml", [f"init.weights={run}"])
    assert load_trained(source, more).model.num_heads == 4
    with pytest.raises(ValueError, match=r"model\.num_heads must be 4 for .*config\.yaml says, got 2"):
        load_trained(source, [*more, "model.num_heads=2"])


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def test_run_goes_on_where_the_one_that_it_started_from_is_gone(run: Path, tmp_path: Path) -> None:
    changes = [f"init.weights={run}", f"run.folder={tmp_path}", "run.name=probe"]
    first = config.load(KNN, changes)
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe/config.yaml").write_text(config.to_yaml(first))
    run.rename(tmp_path / "moved")
    assert config.load(KNN, changes).model == first.model
    assert config.load(tmp_path / "probe/config.yaml").model == first.model


def test_exported_folder_is_a_start_too(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file(build_model(**BLOCK).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vitcomposer": {"model": BLOCK}}))
    for source in (folder, folder / "model.safetensors"):
        assert config.load(KNN, [f"init.weights={source}"]).model.num_heads == 4
    (folder / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 4}})
    )
    with pytest.raises(ValueError, match=r"model\.num_heads must be 4 .*config\.json says, got 2"):
        load_weights(build_model(**{**BLOCK, "num_heads": 2}), folder / "model.safetensors")


def test_teacher_of_other_heads_is_refused(run: Path) -> None:
    options = {key: value for key, value in BLOCK.items() if key not in ("name", "num_classes", "image_size")}
    rule = r"teacher\.options\.num_heads must be 4 .* got 2\. Set teacher\.options\.num_heads=4"
    with pytest.raises(ValueError, match=rule):
        build_teacher("vit_tiny_patch16", run, num_classes=10, image_size=16, **{**options, "num_heads": 2})
    build_teacher("vit_tiny_patch16", run, num_classes=10, image_size=16, **options)


def test_page_that_describes_no_network_is_refused(run: Path) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {**BLOCK, "mlp_ratio": "wide"}}))
    with pytest.raises(ValueError, match="must describe a network, got .*wide"):
        load_weights(build_model(**BLOCK), run)


def test_page_that_cannot_be_read_is_named(run: Path) -> None:
    (run / "config.yaml").write_bytes(b"\xff: [")
    with pytest.raises(ConfigError, match=r"config\.yaml must say what the weights beside it are, but cannot be read"):
        config.load(KNN, [f"init.weights={run}"])
