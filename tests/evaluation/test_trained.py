"""Trained models from run folders, checkpoints, exported folders and yamls: the right weights, and nothing else."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import PHOTOS, ROOT
from vitcomposer import __version__
from vitcomposer.algorithms import EvaluationEMA
from vitcomposer.algorithms.schedule_free import ScheduleFreeWeights
from vitcomposer.evaluation.trained import Trained, load_each, load_trained
from vitcomposer.models import build_model
from vitcomposer.models.weights.averages import EMA_STATE, SCHEDULE_FREE_STATE, averaged_weights, better_weights
from vitcomposer.models.weights.load import read_checkpoint

LATEST = "checkpoints/latest-rank0.pt"
TINY = [f"model.{key}={value}" for key, value in dict(num_classes=8, image_size=32, patch_size=8, depth=2).items()]


def has_weights(trained: Trained, task: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, task[f"model.{name}"]) for name, value in trained.network.state_dict().items())


@pytest.fixture
def changed_run(trained_run: Path, tmp_path: Path) -> Callable[[Callable[[Any], None]], Path]:
    """A copy of the run whose checkpoint a function has changed."""

    def change(edit: Callable[[Any], None]) -> Path:
        run = tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True)
        shutil.copy(trained_run / "config.yaml", run)
        content = read_checkpoint(trained_run / LATEST)
        edit(content)
        torch.save(content, run / LATEST)
        return run

    return change


def test_run_folder_gives_its_average_its_raw_weights_and_what_they_are_for(trained_run: Path) -> None:
    saved = read_checkpoint(trained_run / LATEST)
    found = load_each(trained_run)
    assert list(found) == ["raw", "ema"]
    assert has_weights(found["raw"], saved["state"]["model"]) and not found["raw"].averaged
    auto = load_trained(trained_run)
    summary = json.loads((trained_run / "summary.json").read_text())
    assert auto.averaged == (summary["top1_ema"] >= summary["top1"])
    assert has_weights(auto, averaged_weights(saved) if auto.averaged else saved["state"]["model"])
    averaged = load_trained(trained_run, weights="ema")
    assert has_weights(averaged, averaged_weights(saved)) and averaged.averaged
    assert not has_weights(averaged, saved["state"]["model"])
    assert not any(module.training for module in auto.network.modules())
    assert auto.class_names == tuple(sorted(PHOTOS))
    assert json.loads((trained_run / "class_names.json").read_text()) == sorted(PHOTOS)
    assert (auto.image_size, auto.crop_ratio, auto.interpolation) == (32, 0.875, "bicubic")
    assert load_trained(trained_run, ["evaluation.image_size=48"]).image_size == 48


def evaluated(step: int, raw: float | None, average: float | None) -> str:
    return json.dumps({"step": step, "metrics/eval/top1": raw, "metrics/ema/top1": average}) + "\n"


@pytest.mark.parametrize(
    ("lines", "averaged", "note"),
    [
        ([(36, 0.858, 0.769)], False, "raw (85.8 % top-1); the average has 76.9 %. --weights ema takes the other."),
        ([(36, 0.769, 0.858)], True, "average (85.8 % top-1); the raw has 76.9 %. --weights raw takes the other."),
        ([(36, 0.5, 0.5)], True, "average (50.0 % top-1); the raw has 50.0 %. --weights raw takes the other."),
        # Of a later checkpoint, which is gone, and of an evaluation in which a number was not finite.
        (
            [(24, 0.6, 0.4), (36, None, 0.9), (48, 0.1, 0.9)],
            False,
            "raw (60.0 % top-1 at step 24); the average has 40.0 %. --weights ema takes the other.",
        ),
        (
            [(12, 0.6, None)],
            False,
            "raw: neither was measured, and the average looks back over 20 steps, more than a third of the 36 done. "
            "--weights ema takes the other.",
        ),
    ],
)
def test_better_of_the_two_is_taken_by_what_the_run_measured(
    lines: list[Any], averaged: bool, note: str, changed_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    run = changed_run(lambda saved: None)
    (run / "metrics.jsonl").write_text("".join(evaluated(*line) for line in lines))
    for source in (run, run / LATEST):
        trained = load_trained(source)
        assert capsys.readouterr().err == f"note: weights: {note}\n"
        kind = (
            averaged_weights(read_checkpoint(run / LATEST))
            if averaged
            else read_checkpoint(run / LATEST)["state"]["model"]
        )
        assert trained.averaged == averaged and has_weights(trained, kind)
    assert load_trained(run, weights="ema").averaged and capsys.readouterr().err == ""


def test_average_without_a_measurement_is_taken_after_three_of_its_windows(
    changed_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    run = changed_run(lambda saved: None)
    for arguments, averaged, note in (
        (
            "{smoothing: 0.9, update_interval: 1ba}",
            True,
            "average: neither was measured, and the average looks back over 10 steps, of 36 done.",
        ),
        ("{smoothing: 0.9, update_interval: 2ba}", False, "over 20 steps, more than a third of the 36 done."),
        ("{half_life: 1ep, smoothing: null, update_interval: null}", True, "over 2 epochs, of 6 done."),
        ("{half_life: 0.07dur, smoothing: null, update_interval: 1ba}", True, "over 10% of the run, of 100% done."),
        (
            "{half_life: 0.5dur, smoothing: null, update_interval: 1ba}",
            False,
            "over 72% of the run, more than a third of the 100% done.",
        ),
    ):
        edit = read_checkpoint(run / LATEST)
        edit["state"]["timestamp"]["Timestamp"]["epoch"] = 6
        torch.save(edit, run / LATEST)
        assert load_trained(run, [f"algorithms={{EMA: {arguments}}}", "max_duration=6ep"]).averaged == averaged
        assert note in capsys.readouterr().err
    kind, why = better_weights(36, {"ba": 36, "ep": 3}, None, None)
    assert kind == "raw" and "nor is it known how long the average looks back" in why


def test_checkpoint_file_and_yaml_give_the_same_network(trained_run: Path) -> None:
    run = load_trained(trained_run, weights="raw").network.state_dict()
    file = load_trained(trained_run / LATEST, weights="raw")
    init = [*TINY, f"init.weights={trained_run / LATEST}", "data.local=/nowhere"]
    page = load_trained(ROOT / "yamls/deit_ti.yaml", init, weights="raw")
    for other in (file, page):
        assert all(torch.equal(value, run[name]) for name, value in other.network.state_dict().items())
    assert file.class_names == tuple(sorted(PHOTOS)) and page.class_names is None


def test_average_that_has_not_started_is_none(changed_run: Callable) -> None:
    assert EvaluationEMA.__qualname__ == EMA_STATE
    run = changed_run(lambda saved: dict(saved["state"]["algorithms"])[EMA_STATE].update(ema_started=False))
    assert not load_trained(run).averaged
    with pytest.raises(ValueError, match="must hold a started average"):
        load_trained(run, weights="ema")


def test_schedule_free_run_has_its_average_alone(changed_run: Callable) -> None:
    assert ScheduleFreeWeights.__qualname__ == SCHEDULE_FREE_STATE
    run = changed_run(lambda saved: saved["state"].update(algorithms=[(SCHEDULE_FREE_STATE, {"trained": []})]))
    saved = read_checkpoint(run / LATEST)
    trained = load_trained(run)
    assert trained.averaged and has_weights(trained, saved["state"]["model"])
    with pytest.raises(ValueError, match="holds nothing but their average"):
        load_trained(run, weights="raw")


def test_exported_folder_is_the_model_that_was_exported(trained_run: Path, tmp_path: Path) -> None:
    trained = load_trained(trained_run)
    ours = {
        "version": __version__,
        "model": trained.model.options(),
        "evaluation": {"image_size": 32, "crop_ratio": 0.875, "interpolation": "bicubic"},
        "mean": trained.mean,
        "std": trained.std,
    }
    save_file(trained.network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vitcomposer": ours, "label_names": trained.class_names}))
    again = load_trained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.network(images), trained.network(images))
    assert (again.model, again.class_names, again.std) == (trained.model, trained.class_names, trained.std)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "deit_tiny_patch16_224"}))
    with pytest.raises(ValueError, match="must have the key vitcomposer.*init.weights="):
        load_trained(tmp_path)


PAGE = {
    "model": {
        **{"name": "vit_tiny_patch16", "num_classes": 2, "image_size": 32, "drop_path_rate": 0.0},
        **{"patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2},
    },
    "evaluation": {"image_size": 32, "crop_ratio": 0.875, "interpolation": "bicubic"},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("block", "values", "why"),
    [
        ("model", {"depth": 1_000_000_000}, r"model\.depth must be at most 1000"),
        ("model", {"depth": 1e9}, r"depth has the value 1000000000\.0"),
        ("model", {"depth": 1000, "embed_dim": 8192}, r"need at least 805,\d+,\d+,\d+ weights, far more"),
        ("model", {"embed_dim": 65536, "num_heads": 1}, "need at least 5[12],"),
        ("model", {"num_classes": 10**7}, "weights, far more than there are"),
        ("model", {"image_size": 1 << 30}, "model.image_size must be at most 16384"),
        ("model", {"name": []}, r"name has the value \[\]"),
        ("model", {"colour": 3}, "'colour', which is not known"),
        ("evaluation", {"image_size": 1_000_000_000}, "evaluation.image_size must be at most 16384"),
        ("evaluation", {"crop_ratio": 1e-9}, "evaluation.crop_ratio must be 0.1 or more"),
        ("evaluation", {"interpolation": "nearest"}, "interpolation has the value"),
        ("std", [0, 1, 1], "std must be positive"),
        ("mean", "abc", "mean must be three numbers"),
        ("mean", None, "mean must be three numbers"),
    ],
)
def test_page_of_a_stranger_is_refused_before_a_network_is_built(
    block: str, values: Any, why: str, tmp_path: Path
) -> None:
    network = build_model(**PAGE["model"])  # type: ignore[arg-type]
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vitcomposer": PAGE}))
    assert load_trained(tmp_path).image_size == 32
    changed = {**PAGE[block], **values} if isinstance(values, dict) else values  # type: ignore[dict-item]
    (tmp_path / "config.json").write_text(json.dumps({"vitcomposer": {**PAGE, block: changed}}))
    with pytest.raises(ValueError, match=why):
        load_trained(tmp_path)


@pytest.mark.parametrize(
    ("yaml", "overrides", "message"),
    [
        ("swav_demo", [], "the recipe swav has no classes.*yamls/probe_linear.yaml init.weights="),
        ("probe_linear", [], "it is a linear probe: many heads.*init.train_blocks=0"),
        ("deit_ti", [], "init.weights must be the file of the trained network"),
    ],
)
def test_yaml_of_no_classifier_is_refused(yaml: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_trained(ROOT / f"yamls/{yaml}.yaml", overrides)


def test_what_is_no_trained_model_is_refused(trained_run: Path, tmp_path: Path) -> None:
    for source, overrides, message in (
        (tmp_path, [], "must be a run folder .* or a folder of `vitcomposer export`"),
        (tmp_path / "typo", [], "There is no .*typo"),
        (trained_run, ["model.depth=3"], r"model\.depth must be 2 for .*photos.* got 3"),
        (trained_run, ["model.num_classes=9"], "must name its 9 classes"),
        (trained_run, ["model.dept=3"], "model.dept"),
    ):
        with pytest.raises(ValueError, match=message):
            load_trained(source, overrides)
    alone = tmp_path / "weights.pt"
    shutil.copy(trained_run / LATEST, alone)
    with pytest.raises(ValueError, match="must lie in the folder checkpoints of a run"):
        load_trained(alone)
    few = [*TINY[1:], "model.num_classes=5", f"init.weights={trained_run / LATEST}", "data.local=/nowhere"]
    with pytest.raises(ValueError, match=r"it lacks head.*Give the model the classes it was trained on"):
        load_trained(ROOT / "yamls/deit_ti.yaml", few)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_checkpoint_with_code_in_it_does_not_run(trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(trained_run / "config.yaml", run)
    (run / LATEST).write_bytes(pickle.dumps(Canary(tmp_path / "sung")))
    with pytest.raises(ValueError, match=r"latest-rank0\.pt"):
        load_trained(run)
    assert not (tmp_path / "sung").exists()
