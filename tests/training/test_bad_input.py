"""Bad input of every kind: one clear error that names key or file, rule, value and remedy, before the first batch."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import PHOTOS, ROOT, run_train, tiny_photo_overrides
from vitcomposer import config

DEIT = str(ROOT / "yamls/deit_ti.yaml")

CASES = {
    "unknown key": (["model.drop_path=0.1"], ["model.drop_path", "Did you mean", "drop_path_rate"]),
    "wrong type": (["optimizer.lr=fast"], ["optimizer.lr", "'fast'", "a finite number"]),
    "out of range": (["model.drop_path_rate=2"], ["model.drop_path_rate", "[0, 1)", "2.0"]),
    "bf16 on a CPU": (["precision=amp_bf16"], ["precision", "fp32 on a CPU", "amp_bf16", "precision=auto"]),
    "no data folder": (["data.local=/nowhere/at/all"], ["/nowhere/at/all", "vitcomposer convert"]),
    "no such split": (["data.val_split=test"], ["test", "train", "val"]),
    "other class count": (["model.num_classes=1000"], ["model.num_classes", "8", "1000", "model.num_classes=8"]),
    "more images a step than there are": (
        ["global_train_batch_size=512"],
        ["global_train_batch_size", "192", "512"],
    ),
    "odd batch with mixing": (["global_train_batch_size=15"], ["global_train_batch_size", "even", "15"]),
    "unknown model": (["model.name=deit_smal_patch16"], ["deit_smal_patch16", "Did you mean", "deit_small_patch16"]),
    "option of another model": (["model.locality_strength=1.0"], ["model.locality_strength", "convit"]),
    "size off the patch grid": (["model.image_size=30"], ["model.image_size", "30", "24", "32"]),
    "width that heads cannot share": (["model.embed_dim=100"], ["model.embed_dim", "100", "3"]),
    "unknown optimizer": (["optimizer.name=adamww"], ["optimizer.name", "adamww", "Did you mean", "adamw"]),
    "unknown optimizer option": (["optimizer.options.betass=[0.9,0.99]"], ["optimizer.options.betass", "betas"]),
    "unknown algorithm": (["algorithms.EMAA={}"], ["EMAA", "Did you mean", "EMA"]),
    "useless algorithm": (["algorithms.StochasticDepth={}"], ["StochasticDepth", "model.drop_path_rate"]),
    "unknown argument": (["algorithms.EMA.smoothng=0.9"], ["algorithms.EMA.smoothng", "smoothing"]),
    "endless duration": (["max_duration=64tok"], ["max_duration", "64tok", "300ep"]),
    "duration without unit": (["max_duration=8"], ["max_duration", "8", "300ep"]),
    "warm-up longer than the run": (["schedule.t_warmup=5ep"], ["schedule.t_warmup", "5ep", "2ep"]),
    "unknown RandAugment": (["augment.rand_augment=rnd-m9"], ["augment.rand_augment", "rnd-m9", "rand-m9"]),
    "smoothing under BCE": (["loss=binary_cross_entropy"], ["mixing.label_smoothing", "0", "0.1"]),
    "smoothing twice": (["algorithms.LabelSmoothing.smoothing=0.1"], ["LabelSmoothing", "mixing.label_smoothing"]),
    "logger that is not installed": (["run.loggers=[wandb]"], ["run.loggers", "wandb", "pip install"]),
    "evaluation off the patch grid": (["evaluation.image_size=18"], ["evaluation.image_size", "8", "18", "16 or 24"]),
    "weights that are not there": (["init.weights=/nowhere.pth"], ["init.weights", "/nowhere.pth"]),
    "cache limit in words": (["data.cache_limit=lots"], ["data.cache_limit", "lots", "200gb"]),
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_bad_input_ends_with_one_clear_error(
    case: str, photo_mds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, words = CASES[case]
    assert run_train([DEIT, *tiny_photo_overrides(photo_mds, tmp_path, "bad"), *overrides]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0], f"{word!r} is not in {errors[0]!r}"
    assert not (tmp_path / "bad" / "metrics.jsonl").exists(), "it began to train"


def test_keys_and_missing_files_are_reported_at_once(
    photo_mds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [*tiny_photo_overrides(photo_mds, tmp_path, "bad"), "optimzer.lr=1e-3", "init.weights=/nowhere.pth"]
    assert run_train([DEIT, *given, "model.num_classes=10", "seed=-1"]) == 2
    first, *lines = capfd.readouterr().err.splitlines()
    assert first == "error: 4 keys cannot be used"
    assert [line.split()[0] for line in lines] == ["optimzer.lr", "seed", "model.num_classes", "init.weights"]
    assert "must be 8, the number of classes in" in lines[2] and "/nowhere.pth" in lines[3]
    assert run_train([DEIT, *given, "data.local=/nowhere/at/all", "model.num_classes=10"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["optimzer.lr", "data.local", "init.weights"]
    assert not (tmp_path / "bad").exists()


def test_missing_yaml_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train([str(ROOT / "yamls/deit_tiny.yaml")]) == 2
    assert "deit_tiny.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_shard_stops_the_run_and_is_named(
    photo_mds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str, workers: int
) -> None:
    mds = tmp_path / "mds"
    shutil.copytree(photo_mds, mds)
    shard = sorted((mds / "train").rglob("*.mds"))[-1]
    shard.unlink() if damage == "missing" else shard.write_bytes(shard.read_bytes()[:-100])
    overrides = [*tiny_photo_overrides(mds, tmp_path, "bad"), f"data.num_workers={workers}"]
    assert run_train([DEIT, *overrides]) == 2
    assert shard.name in capfd.readouterr().err


def test_class_folders_that_differ_are_refused(
    photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mds = tmp_path / "mds"
    shutil.copytree(photo_mds, mds)
    names = mds / "val/class_names.json"
    names.write_text(names.read_text().replace(PHOTOS[0], "somebody else"))
    assert run_train([DEIT, *tiny_photo_overrides(mds, tmp_path, "bad")]) == 2
    error = capsys.readouterr().err
    assert "class" in error and ("somebody else" in error or PHOTOS[0] in error)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TypeError("of the code"), 2),
        (KeyError("of the code"), 2),
        (AssertionError("of the code"), 2),
        (ZeroDivisionError("of the code"), 2),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), 1),
        (ConnectionResetError("by a store"), 1),
        (TimeoutError("of a store"), 1),
    ],
)
def test_only_what_may_pass_has_the_status_that_starts_again(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from vitcomposer.runs.failures import end_together

    assert end_together(error, config.load(DEIT)) == status
    assert f"error: {type(error).__name__}: " in capsys.readouterr().err
