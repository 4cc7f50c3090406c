"""Classes of 1:20 images: what data.balance and logit_adjustment do for the rare ones, and where they are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, run_train
from vitcomposer import config
from vitcomposer.cli import main
from vitcomposer.data.labels import class_imbalance
from vitcomposer.errors import ConfigError

DEMO = str(ROOT / "yamls/demo.yaml")
TRAIN = {"cat": 200, "dog": 200, "lynx": 10, "wolf": 10}


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red and blue images; a rare class is somewhat brighter than the frequent one of its colour, and often not."""
    folder, rng = tmp_path_factory.mktemp("unequal"), np.random.default_rng(0)
    colors = {"cat": (1.0, 0.3, 0.3), "dog": (0.3, 0.3, 1.0), "lynx": (1.0, 0.3, 0.3), "wolf": (0.3, 0.3, 1.0)}
    for split, counts in (("train", TRAIN), ("val", dict.fromkeys(TRAIN, 40))):
        for name, count in counts.items():
            (folder / "images" / split / name).mkdir(parents=True)
            for at in range(count):
                bright = (115 if name in ("cat", "dog") else 147) + 20 * rng.normal()
                pixels = bright * np.array(colors[name]) + 4 * rng.normal(size=(16, 16, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / "images" / split / name / f"{at}.png")
    assert main(["convert", "folder", str(folder / "images"), str(folder / "mds"), "--workers", "1"]) == 0
    return folder / "mds"


def overrides(data: Path, runs: Path, name: str, *more: str) -> list[str]:
    small = [
        "model.num_classes=4",
        "model.depth=1",
        "model.embed_dim=32",
        "data.num_workers=0",
        "max_duration=20ep",
        "schedule.t_warmup=1ep",
    ]
    run = [
        f"run.folder={runs}",
        f"run.name={name}",
        "run.save_interval=20ep",
        "run.eval_interval=20ep",
        "algorithms.EMA=null",
        "mixing.label_smoothing=0",
    ]
    return [f"data.local={data}", *small, *run, *more]


def test_mean_of_classes_rises_and_is_shown_first(
    unequal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, change in {"plain": [], "full": ["data.balance=full"], "adjusted": ["logit_adjustment=1"]}.items():
        assert run_train([DEMO, *overrides(unequal, tmp_path, name, *change)]) == 0
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())
    assert found["plain"]["class_imbalance"] == 20
    assert min(found["full"]["class_top1"], found["adjusted"]["class_top1"]) > found["plain"]["class_top1"] + 0.1
    # all classes have as many images to be measured on
    assert found["full"]["class_top1"] == pytest.approx(found["full"]["top1"])
    printed = capsys.readouterr().err
    head = next(line for line in printed.splitlines() if "val top-1" in line)
    assert "classes" in head and head.index("classes") < head.index("val top-1")


def test_balance_goes_on_bit_for_bit_after_a_stop_amid_an_epoch(unequal: Path, tmp_path: Path) -> None:
    """The loss of each step is that of a run in one go, with other workers too."""
    steady = ["schedule.t_warmup=0ba", "schedule.alpha_i=1", "schedule.alpha_f=1", "run.log_interval=1ba"]
    same = ["data.balance=sqrt", *steady, "run.save_interval=1ep", "run.progress_bar=false"]
    for name, steps, workers in (("whole", 20, 0), ("parts", 8, 0), ("parts", 20, 2)):
        more = [f"max_duration={steps}ba", f"data.num_workers={workers}", "run.eval_interval=20ba"]
        assert run_train([DEMO, *overrides(unequal, tmp_path, name, *same, *more)]) == 0
    losses = [losses_of(tmp_path / name) for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def losses_of(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss/train/total"] for row in rows if "loss/train/total" in row]


def test_imbalance_is_that_of_the_training_split_and_none_without_a_summary(unequal: Path, tmp_path: Path) -> None:
    data = config.load(DEMO, [f"data.local={unequal}"]).data
    assert class_imbalance(data) == 20
    for text in ("", "[]", '{"splits": {"train": {"class_counts": {"a": 1, "b": 0}}}}', '{"splits": 3}'):
        (tmp_path / "summary.json").write_text(text)
        assert class_imbalance(config.load(DEMO, [f"data.local={tmp_path}"]).data) is None


@pytest.mark.parametrize(
    ("page", "changes", "message"),
    [
        ("demo", ["data.balance=full", "data.remote=s3://bucket/x"], "data.balance must be null unless the images lie"),
        ("demo", ["logit_adjustment=1", "data.source=synthetic"], "logit_adjustment must be 0 unless the images lie"),
        ("demo", ["logit_adjustment=1", "data.balance=full"], "logit_adjustment must be 0 with data.balance"),
        ("demo", ["logit_adjustment=-1"], "logit_adjustment must be 0 or more, got -1"),
        ("deit3_s", ["logit_adjustment=1"], "logit_adjustment must be 0 but with .* loss: soft_target_cross_entropy"),
        ("deit_s", ["data.balance=sqrt"], "augment.repeated_augmentation must be 1 with data.balance"),
        ("swav_demo", ["data.balance=sqrt"], "data.balance must be null in the recipe swav"),
        ("probe_knn", ["data.balance=sqrt"], "data.balance must be null in the recipe knn"),
    ],
)
def test_weights_of_classes_are_refused_where_they_cannot_be_had(page: str, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(page, changes)
