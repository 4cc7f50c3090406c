"""``vitcomposer eval``: training's own numbers, classes by name, and what is wrong with data is said."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.conftest import PHOTOS, VAL_PER_CLASS
from vitcomposer.cli import main
from vitcomposer.data.labeled_sets import model_classes, read_real_labels
from vitcomposer.evaluation.accuracy import measure, open_labelled, with_real_labels
from vitcomposer.evaluation.confusion import confusions, draw_confusion
from vitcomposer.evaluation.trained import Trained, load_trained

NAMES = sorted(PHOTOS)
IMAGES = VAL_PER_CLASS * len(PHOTOS)


@pytest.fixture(scope="module")
def trained(trained_run: Path) -> Trained:
    return load_trained(trained_run)


class Constant(nn.Module):
    """A network that answers the same to every image."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.repeat(len(images), 1)


def test_eval_gives_the_numbers_of_training_on_shards_and_on_files(
    trained_run: Path, photo_mds: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [str(photo_mds), str(photo_folder)]
    # 18 divides neither the images nor the 20 of a batch in the run's own evaluation.
    more = ["--batch-size", "18", "--workers", "1", "--out", str(tmp_path), "--device", "cpu"]
    assert main(["eval", str(trained_run), "--data", *data, *more]) == 0
    summary = json.loads((trained_run / "summary.json").read_text())
    page = json.loads((tmp_path / "eval.json").read_text())
    found = {(result["data"], result["weights"]): result for result in page["results"]}
    assert list(found) == [(name, kind) for name in data for kind in ("raw", "ema")]
    assert [summary["top1"], summary["top5"]] != [summary["top1_ema"], summary["top5_ema"]]
    for name in data:
        raw, averaged = found[name, "raw"], found[name, "ema"]
        assert raw["images"] == averaged["images"] == IMAGES
        assert raw["top1"] == pytest.approx(summary["top1"], abs=1e-6)
        assert averaged["top1"] == pytest.approx(summary["top1_ema"], abs=1e-6)
        assert averaged["top5"] == pytest.approx(summary["top5_ema"], abs=1e-6)
        assert raw["loss"] == pytest.approx(summary["loss"], abs=1e-6)
        assert raw["class_top1"] == pytest.approx(raw["top1"])  # as are the classes
    folder = tmp_path / found[data[1], "ema"]["folder"]
    rows = list(csv.DictReader((folder / "per_class.csv").open()))
    assert [row["class"] for row in rows] == NAMES
    assert {row["images"] for row in rows} == {str(VAL_PER_CLASS)}
    mean = sum(float(row["top1"]) for row in rows) / len(rows)
    assert mean == pytest.approx(found[data[1], "ema"]["class_top1"], abs=1e-4)
    with Image.open(folder / "confusion.png") as picture:
        assert min(picture.size) > 400
    out = capsys.readouterr().out
    assert f"{data[0]}, ema: top-1 {100 * summary['top1_ema']:.2f}" in out


def test_classes_of_a_subset_are_found_by_name_and_their_mean_weighs_them_equally(
    trained: Trained, photo_folder: Path, tmp_path: Path
) -> None:
    for name, images in (("rocket", 6), ("chelsea", 2)):
        (tmp_path / name).mkdir()
        for path in sorted((photo_folder / "val" / name).iterdir())[:images]:
            shutil.copy(path, tmp_path / name)
    data = open_labelled(str(tmp_path), trained, workers=0)
    rocket = NAMES.index("rocket")
    logits = [float(output == rocket) for output in range(8)]
    scores = measure({"rocket": Constant(logits), "all": Constant([0.0] * 8)}, data)
    assert scores["rocket"].labels.tolist() == [NAMES.index("chelsea")] * 2 + [rocket] * 6
    assert (scores["rocket"].top1, scores["rocket"].class_top1) == (0.75, 0.5)
    loss = torch.nn.functional.cross_entropy(Constant(logits)(torch.zeros(8)), torch.tensor([rocket] * 6 + [0] * 2))
    assert scores["rocket"].loss == pytest.approx(float(loss))
    assert scores["all"].loss == pytest.approx(float(np.log(8)))

    (tmp_path / "chelse").mkdir()
    shutil.copy(photo_folder / "val/chelsea/000.jpg", tmp_path / "chelse")
    with pytest.raises(ValueError, match="got chelse, which it does not know. Did you mean 'chelsea'"):
        open_labelled(str(tmp_path), trained, workers=0)


def test_labels_become_outputs_by_name_by_number_or_by_order() -> None:
    def outputs(names: list[str] | None, model_names: list[str] | None) -> list[int] | None:
        return model_classes(names, model_names, num_classes=12, where="data")

    numbers = sorted(str(number) for number in range(12))
    words = [f"word {chr(97 + at)}" for at in range(12)]
    assert outputs(numbers, words) == [int(name) for name in numbers]  # ImageNet-V2
    assert outputs(numbers, None) == [int(name) for name in numbers]
    assert outputs(numbers, numbers) == list(range(12))  # a model that was trained on such folders
    assert outputs(words[::-1], words) == list(range(12))[::-1]
    assert outputs(words, None) == list(range(12))
    assert outputs(None, words) is None
    with pytest.raises(ValueError, match="must have the 12 classes of the model, it has 5"):
        outputs(words[:5], None)


def test_real_labels_count_any_of_an_images_and_leave_out_those_without(
    trained: Trained, photo_folder: Path, photo_mds: Path, tmp_path: Path
) -> None:
    labels: list[list[int]] = [[] for _ in range(50_000)]
    labels[0], labels[1], labels[49_999] = [3, 5], [4], [5]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    for name, number in (("chelsea", 1), ("chelsea", 2), ("rocket", 3), ("rocket", 50_000)):
        (tmp_path / "val" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo_folder / "val/rocket/000.jpg", tmp_path / "val" / name / f"ILSVRC2012_val_{number:08}.JPEG")
    real = read_real_labels(tmp_path / "real.json", None)
    data = with_real_labels(open_labelled(str(tmp_path), trained, workers=0), real)
    scores = measure({"five": Constant([0.0, 0, 0, 0, 0, 1, 0, 0])}, data)["five"]
    assert scores.real == pytest.approx(2 / 3) and scores.top1 == 0
    assert with_real_labels(open_labelled(str(photo_folder), trained, workers=0), real).real is None

    wordnet = [f"n{8 - at:08}" for at in range(8)]  # in the other order
    turned = read_real_labels(tmp_path / "real.json", wordnet)
    assert turned[0] == [4, 2]
    with pytest.raises(ValueError, match="named by WordNet ids"):
        read_real_labels(tmp_path / "real.json", NAMES)
    shards = open_labelled(str(photo_mds), trained, workers=0)
    with pytest.raises(ValueError, match="which .* does not keep, being MDS"):
        with_real_labels(shards, real)


def test_what_cannot_be_measured_on_is_refused(
    trained_run: Path, photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / "rocket").mkdir(parents=True)
    (tmp_path / "images" / "rocket" / "x.jpg").write_bytes(b"no image")
    for more, message in (
        (
            [str(tmp_path / "images"), "--workers", "0"],
            "rocket/x.jpg cannot be read: no image format that Pillow knows",
        ),
        ([str(photo_mds), "--split", "test"], "must hold the split 'test', it holds train, val"),
        ([str(tmp_path / "images" / "rocket")], "hold one folder of images per class"),
        (["s3://bucket/data"], "--cache must name a folder"),
        ([str(tmp_path / "images"), "--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        ([str(tmp_path / "images"), "--max-bad-fraction", "1"], "--max-bad-fraction must be in [0, 1), got 1.0"),
        ([str(tmp_path / "images"), "--device", "cuda:77"], "--device must be a device of this machine"),
    ):
        assert main(["eval", str(trained_run), "--data", *more]) == 2
        assert message in capsys.readouterr().err


def test_images_that_cannot_be_read_are_left_out_up_to_a_share(
    trained_run: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = tmp_path / "photos"
    shutil.copytree(photo_folder / "val", val)
    gone = sorted((val / "rocket").iterdir())[:2]
    arguments = ["eval", str(trained_run), "--weights", "raw", "--batch-size", "7", "--device", "cpu", "--workers", "0"]
    for name, change in (("broken", lambda path: path.write_bytes(b"no image")), ("without", Path.unlink)):
        for path in gone:
            change(path)
        more = ["--data", str(val), "--out", str(tmp_path / name)]
        assert main([*arguments, *more, "--max-bad-fraction", "0.05" if name == "broken" else "0"]) == 0
        if name == "broken":
            assert f"{IMAGES - 2} images (2 more cannot be read)" in capsys.readouterr().out
            share = f"{2 / IMAGES - 0.001:.4f}"
            assert main([*arguments, *more, "--max-bad-fraction", share]) == 2
            error = capsys.readouterr().err
            assert str(gone[1]) in error and f"More than {float(share):g} of the {IMAGES} images are" in error
    pages = [json.loads((tmp_path / name / "eval.json").read_text())["results"] for name in ("broken", "without")]
    assert [page[0].pop("bad_images") for page in pages] == [2, 0]
    assert pages[0] == pages[1]


def test_confusions_are_counted_and_drawn_for_few_and_for_many_classes() -> None:
    truth, predictions = (np.array(of, np.int32) for of in ([0, 0, 0, 1, 1, 2], [0, 2, 2, 0, 1, 2]))
    assert confusions(truth, predictions) == [(0, 2, 2), (1, 0, 1)]
    assert confusions(truth, truth) == []
    many = np.arange(1000, dtype=np.int32)
    for labels, guesses, names in ((truth, predictions, ["a", "b" * 60, "c"]), (many, np.roll(many, 1), None)):
        assert draw_confusion(labels, guesses, names, title="title").startswith(b"\x89PNG")


def test_measuring_again_and_in_bfloat16_gives_the_same_images(trained: Trained, photo_mds: Path) -> None:
    data = open_labelled(str(photo_mds / "val"), trained, workers=0, batch_size=30)
    first, again = (measure({"ema": trained.network}, data)["ema"] for _ in range(2))
    assert dataclasses.astuple(first)[:6] == dataclasses.astuple(again)[:6]
    assert first.predictions.tolist() == again.predictions.tolist()
    rounded = measure({"ema": trained.network}, data, bf16=True)["ema"]
    assert rounded.loss == pytest.approx(first.loss, rel=1e-2) and rounded.loss != first.loss
