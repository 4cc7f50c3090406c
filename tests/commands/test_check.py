"""``vitcomposer check``: all that is wrong at once, and first steps that are those of the run and leave nothing."""

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_train, tiny_photo_overrides
from vitcomposer import cli, config
from vitcomposer.commands.start import check
from vitcomposer.training.trial import Trial, chance_loss

YAML = "deit_ti"
SYNTHETIC = ["data.source=synthetic", "data.synthetic_samples=128", "data.num_workers=0"]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the process makes its temporary ones."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def overrides(mds: Path, runs: Path) -> list[str]:
    return [*tiny_photo_overrides(mds, runs, "checked"), "algorithms.EMA={smoothing: 0.9, update_interval: 1ba}"]


def test_the_first_steps_are_those_of_the_run_and_leave_nothing(
    photo_mds: Path, tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = overrides(photo_mds, tmp_path / "runs")
    assert cli.main(["check", YAML, *keys]) == 0
    good, step, whole, *advice, following = capsys.readouterr().out.splitlines()
    assert good == "configuration good, data good (12 steps an epoch), no weights: the network starts from nothing"
    assert re.fullmatch(r"one step: [\d.e-]+ s \(the first .* s\), loss 2\.\d\d \(chance 2\.08\), .* of .* GB", step)
    assert re.fullmatch(r"2 epochs: about .* \(measured step\) \+ .* evaluation\. Loader .* CPU .* is the limit", whole)
    assert all(line.startswith("do    ") for line in advice)
    assert following.startswith(f"Next: vitcomposer train {YAML} data.local={photo_mds} ")
    assert not (tmp_path / "runs").exists() and os.listdir(temporary) == []
    assert run_train([YAML, *keys]) == 0
    first = json.loads((tmp_path / "runs/checked/metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1 and f"loss {first['loss/train/total']:.2f} " in step
    assert cli.main(["check", YAML, *keys]) == 0
    assert f"{tmp_path}/runs/checked is already done" in capsys.readouterr().out
    assert cli.main(["check", YAML, *keys, "optimizer.lr=0.1"]) == 2
    assert "optimizer.lr must be" in capsys.readouterr().err


def test_everything_wrong_is_said_at_once(photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["optimzer.lr=1", "model.num_classes=10", "global_train_batch_size=256", "init.weights=nowhere.pth"]
    assert cli.main(["check", YAML, *overrides(photo_mds, tmp_path), "schedule.t_warmup=2ep", *wrong]) == 2
    warning, error, *keys = capsys.readouterr().err.splitlines()
    assert warning == "warning: warm-up is 2 of 2 epochs (schedule.t_warmup): the learning rate never comes down"
    assert error == "error: 4 keys cannot be used"
    assert sorted(key.split()[0] for key in keys) == sorted(key.partition("=")[0] for key in wrong)
    assert os.listdir(tmp_path) == []


def test_an_epoch_that_leaves_many_images_out_is_warned_of(photo_mds: Path, tmp_path: Path) -> None:
    keys = overrides(photo_mds, tmp_path)
    assert check.warnings_of(config.load(YAML, keys)) == []
    (warning,) = check.warnings_of(config.load(YAML, [*keys, "global_train_batch_size=160"]))
    assert warning.startswith("an epoch is 1 step of 160 images (global_train_batch_size) and leaves out 32 of 192")


def test_recipes_without_labels_and_without_steps_and_curricula(tmp_path: Path, capsys: Any) -> None:
    run = [f"run.folder={tmp_path}", "precision=fp32", *SYNTHETIC]
    assert cli.main(["check", "swav_demo", "--json", *run]) == 0
    swav = json.loads(capsys.readouterr().out)
    assert swav["chance"] == pytest.approx(math.log(32)) and swav["loss"] == pytest.approx(swav["chance"], rel=0.5)
    assert swav["steps_per_epoch"] == 2 and swav["steps"] == 40 and swav["evaluation_seconds"] is None
    small = ["model.image_size=32", "model.patch_size=8", "model.depth=1", "global_train_batch_size=16"]
    staged = "algorithms={Curriculum: {image_sizes: [16, 32], compute: [0.5, 0.5]}}"
    assert cli.main(["check", YAML, "--json", *run, *small, "max_duration=100ba", "schedule.t_warmup=5ba", staged]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 100 and found["evaluations"] == 13
    # Half of the compute is steps at 32 pixels, each of which costs more than the first, at 16.
    slowest = max(found["seconds_per_step"], 16 / found["loader_rate"])
    assert found["train_seconds"] >= 100 * slowest
    knn = ["init.weights=null", "evaluation.global_batch_size=16", "knn.k=[10]"]
    assert cli.main(["check", "probe_knn", *run, *small[:3], *knn]) == 0
    assert "the recipe knn takes no step: nothing to measure" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name, more, chance",
    [
        ("deit_s", [], math.log(1000)),
        ("deit3_s", [], math.log(2)),
        ("simclr_vit_b", ["global_train_batch_size=512"], math.log(1023)),
        ("dino_vit_s", [], math.log(65536)),
        ("moco3_vit_s", [], None),
        ("deit_s_distilled", [], math.log(1000)),
    ],
)
def test_loss_of_a_network_that_knows_nothing(name: str, more: list[str], chance: float | None) -> None:
    assert chance_loss(config.load(name, more)) == (None if chance is None else pytest.approx(chance))


def test_advice_names_the_key_that_stands_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "usable_cores", lambda: 16)
    cfg = config.load(YAML, ["data.num_workers=4"])
    shown: dict[str, Any] = {"device": "gpu", "finished": False, "said": [], "images": 1, "steps": 1}
    trial = Trial(**shown, steps_per_epoch=1, loader_rate=1000.0, model_rate=2100.0, loss=7.0, chance=6.9)
    assert trial.loader_limits
    assert check.advice(trial, cfg) == ["do    data.num_workers=9 (now 4; this machine has 16 cores)"]
    monkeypatch.setattr(check, "usable_cores", lambda: 4)
    assert check.advice(trial, cfg)[0].startswith("do    all 4 cores decode: `vitcomposer bench`")
    trial = Trial(**shown, steps_per_epoch=1, loader_rate=3000.0, model_rate=2100.0, loss=14.0, chance=6.9)
    assert [line[:36] for line in check.advice(trial, cfg)] == ["do    the first loss is far above ch"]


def test_times_have_the_unit_that_fits() -> None:
    assert [check.span(s) for s in (0.2, 41, 420, 11_500, 440_000)] == ["1 s", "41 s", "7 min", "3.2 h", "5.1 days"]
