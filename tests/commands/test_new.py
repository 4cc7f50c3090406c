"""``vitcomposer new``: a yaml that fits, what it says, and commands that run as they are printed."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, run_train
from tests.data.conversion.conversion import write_images
from vitcomposer import config
from vitcomposer.cli import main
from vitcomposer.commands.start import new


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed_commands(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.partition("\nNext:\n")[2].splitlines()]


def test_yaml_fits_the_folder_and_the_printed_conversion_makes_what_it_trains_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(here / "my photos", {"ant": 30, "bee": 12})
    (here / "my photos/bee/same.jpg").write_bytes((here / "my photos/ant/000.JPEG").read_bytes())
    (here / "my photos/bee/broken.jpg").write_bytes((here / "my photos/ant/001.JPEG").read_bytes()[:300])
    assert main(["new", "my photos"]) == 0
    printed = capsys.readouterr().out
    assert "my photos: 44 images, 2 classes, 14 to 30 a class, median 40 x 30\n" in printed
    assert "1 pair of identical files in different classes: my_photos.duplicates.csv\n" in printed
    assert "cannot be read: bee/broken.jpg (" in printed
    assert "wrote my_photos.yaml: a small ConViT from scratch, 32 px, 500 epochs, 4 images a step\n" in printed
    text = Path("my_photos.yaml").read_text()
    assert "#   cannot be read: bee/broken.jpg" in text
    convert, train, predict = printed_commands(printed)
    assert convert[:5] == ["vitcomposer", "convert", "folder", "my photos", "datasets/my_photos"]
    assert convert[5:7] == ["--for", "my_photos.yaml"]
    assert main([*convert[1:], "--workers", "1"]) == 0
    converted = capsys.readouterr().out
    assert "left out 1 (2.27 %): datasets/my_photos/left_out.csv\n" in converted
    assert "   2 classes: ant bee   " in converted and converted.endswith(
        "\nNext: vitcomposer preview my_photos.yaml\n"
    )
    cfg = config.load(train[-1])
    assert cfg.model.num_classes == 2
    assert cfg.data.local == convert[4] and Path(cfg.data.local, "val/index.json").is_file()
    assert predict[2] == "runs/my_photos" and Image.open(predict[3]).size == (40, 30)


def test_weights_that_are_there_are_started_from_and_missing_ones_are_told(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(here / "photos", {"ant": 12, "bee": 12}, size=300)
    assert main(["new", "photos"]) == 0
    told = capsys.readouterr().out
    assert "do    weights/deit_3_small_224_21k.pth is missing" in told
    assert "\n      vitcomposer weights deit_3_small_224_21k\n" in told
    Path("weights").mkdir()
    Path(new.WEIGHTS).touch()
    assert str(new.WEIGHTS) == config.load("finetune_photos").init.weights
    again = next(line.strip() for line in told.splitlines() if line.strip().startswith("vitcomposer new"))
    assert main(shlex.split(again)[1:]) == 0
    printed = capsys.readouterr().out
    assert "wrote photos_pretrained.yaml: DeiT III-S from ImageNet-21k" in printed and "missing" not in printed
    assert "--for photos.yaml" in told and "--for" not in printed
    assert config.load("photos_pretrained.yaml", ["model.num_classes=2"]).init.weights == str(new.WEIGHTS)


@pytest.mark.parametrize(
    ("options", "weights", "message"),
    [
        (["--minutes", "0"], False, "--minutes must be above 0, and below a million, got 0.0. 10 is the default."),
        (["--minutes", "3"], True, "--minutes must be left out where weights/deit_3_small_224_21k.pth is there"),
        (["--minutes", "3", "--unlabelled"], False, "--minutes must be left out for images without classes"),
    ],
)
def test_minutes_are_those_of_a_run_from_scratch(
    here: Path, capsys: pytest.CaptureFixture[str], options: list[str], weights: bool, message: str
) -> None:
    write_images(here / "photos", {"ant": 12, "bee": 12})
    if weights:
        Path("weights").mkdir()
        Path(new.WEIGHTS).touch()
    assert main(["new", "photos", *options]) == 2
    assert message in capsys.readouterr().err and not Path("photos.yaml").exists()


def test_list_of_files_is_read_as_convert_reads_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(here / "files", {"one": 10, "two": 10})
    rows = [f"files/{path.parent.name}/{path.name},{path.parent.name}" for path in sorted(here.glob("files/*/*"))]
    Path("labels.csv").write_text("\n".join(["path,label", *rows, ""]))
    assert main(["new", "labels.csv"]) == 0
    convert, train, _ = printed_commands(capsys.readouterr().out)
    assert main([*convert[1:], "--workers", "1"]) == 0
    assert Path(config.load(train[-1]).data.local, "val/index.json").is_file()


def test_nothing_is_written_over_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(here / "photos", {"ant": 12, "bee": 12})
    Path("photos.yaml").write_text("mine")
    assert main(["new", "photos"]) == 2
    assert "error: --out must be a file that is not there yet, got photos.yaml" in capsys.readouterr().err
    assert Path("photos.yaml").read_text() == "mine"
    assert main(["new", "photos", "--out", "none/other.yaml"]) == 2
    assert "none/other.yaml cannot be written: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "There is no such folder"),
        (lambda root: write_images(root, {"ant": 5}), "two classes or more"),
        (lambda root: (root.mkdir(), (root / "notes.txt").touch()), "must hold images"),
    ],
)
def test_folder_that_cannot_be_trained_on_is_one_error(
    here: Path, make, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(here / "photos")
    assert main(["new", "photos"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("photos.yaml").exists()


def test_folder_without_classes_has_commands_that_run_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(here, {"flat photos": 20}, size=60)
    (here / "flat photos/broken.jpg").write_bytes(b"no image")
    assert main(["new", "flat photos"]) == 0
    printed = capsys.readouterr().out
    assert "flat photos: 21 images without classes, median 60 x " in printed
    assert "wrote flat_photos.yaml: DINO, 48 px, 300 epochs, 4 images a step\n  because: no classes" in printed
    convert, train, embed = printed_commands(printed)
    assert convert[5:] == ["--unlabelled", "--max-bad-fraction", "0.05"]
    assert main([*convert[1:], "--workers", "1"]) == 0
    small = ["max_duration=2ba", "model.depth=1", "head.out_dim=64", "data.num_workers=0", "schedule.t_warmup=1ba"]
    assert run_train([*train[2:], *small]) == 0
    (here / "flat photos/broken.jpg").unlink()
    assert main([*embed[1:], "--workers", "0"]) == 0
    assert np.load("flat_photos_features.npz")["features"].shape == (20, 192)


def test_folders_that_are_no_classes_are_looked_at_as_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(here / "photos", {"2024": 8, "2025": 8})
    assert main(["new", "photos", "--unlabelled"]) == 0
    assert printed_commands(capsys.readouterr().out)[0][-1] == "--unlabelled"
    assert config.load("photos.yaml").recipe == "dino"
    Path("labels.csv").touch()
    assert main(["new", "labels.csv", "--unlabelled"]) == 2
    assert "error: --unlabelled must be left out with a list" in capsys.readouterr().err


def test_converted_images_go_beside_a_folder_that_holds_datasets(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(here / "photos", {"ant": 12, "bee": 12})
    monkeypatch.chdir(here / "photos")
    assert main(["new", "."]) == 0
    convert, *_ = printed_commands(capsys.readouterr().out)
    assert convert[3:5] == [".", "../photos_mds"]
    assert config.load("photos.yaml", ["model.num_classes=2"]).data.local == "../photos_mds"


def test_no_torch_is_imported() -> None:
    code = "import sys\nfrom vitcomposer.commands.start import new\n"
    code += "from vitcomposer.survey import duplicates, page, photos, rules\n"
    code += "print(sorted({'torch', 'composer', 'streaming', 'numba'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "[]\n"
