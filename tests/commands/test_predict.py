"""``vitcomposer predict``: an answer for each sound image in its place, timm's probabilities, broken images named."""

import csv
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.transforms_factory import create_transform

from tests.conftest import PHOTOS, read_photo
from vitcomposer.cli import main
from vitcomposer.evaluation.trained import load_trained

NAMES = sorted(PHOTOS)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_201_files_four_of_them_broken_give_197_answers_four_names_and_status_1(
    trained_run: Path, photo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = sorted(photo_folder.glob("*/*/*.jpg"))
    for at in range(197):
        shutil.copy(photos[at], tmp_path / f"{at:03}{photos[at].suffix}")
    (tmp_path / "below").mkdir()
    (tmp_path / "050 cut.jpg").write_bytes(photos[0].read_bytes()[:1500])
    (tmp_path / "below" / "empty.png").touch()
    (tmp_path / "text.webp").write_text("no image")
    (tmp_path / "notes.txt").write_text("is not meant")
    os.mkfifo(tmp_path / "pipe.jpg")
    for at in range(3):
        (tmp_path / f"circle{at}").symlink_to(".")
    out = tmp_path / "answers.csv"
    assert main(["predict", str(trained_run), str(tmp_path), "--workers", "2", "--out", str(out)]) == 1
    rows = rows_of(out.read_text())
    assert [row["path"] for row in rows] == [str(tmp_path / f"{at:03}.jpg") for at in range(197)]
    assert list(rows[0]) == ["path", *(f"{key}_{at}" for at in range(1, 6) for key in ("class", "probability"))]
    for row in rows:
        shares = [float(row[f"probability_{at}"]) for at in range(1, 6)]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1.0001
        assert {row[f"class_{at}"] for at in range(1, 6)} <= set(NAMES)
    lines = capsys.readouterr().err.splitlines()
    broken = [line for line in lines if line.startswith("broken: ")]
    assert [line.split(": ")[1] for line in broken] == [
        str(tmp_path / name) for name in ("050 cut.jpg", "pipe.jpg", "text.webp", "below/empty.png")
    ]
    assert lines[-1] == "197 images classified, 4 cannot be read"
    assert (
        f"{tmp_path}: links back to a folder that they lie in (3): circle0, circle1, circle2. They are left out."
        in lines
    )


def test_probabilities_are_those_of_timms_pipeline_on_every_kind_of_file(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = read_photo("coffee")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees, as the photographs of its training would have been
    paths = [tmp_path / name for name in ("a.jpg", "b.png", "c.webp", "d.jpg", "e.gif", "f.jpg", "g.JPEG")]
    photo.save(paths[0], quality=90)
    photo.convert("RGBA").save(paths[1])
    photo.resize((90, 300)).save(paths[2])
    photo.save(paths[3], exif=turned)
    photo.quantize(32).save(paths[4])
    photo.convert("CMYK").save(paths[5])
    photo.convert("L").save(paths[6], progressive=True)
    more = ["--top-k", "8", "--format", "jsonl", "--workers", "0", "--batch-size", "3"]
    assert main(["predict", str(trained_run), *map(str, paths), *more]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    trained = load_trained(trained_run)
    options = {"interpolation": "bicubic", "crop_pct": 0.875, "mean": trained.mean, "std": trained.std}
    transform = cast(Callable[[Image.Image], torch.Tensor], create_transform((3, 32, 32), **options))
    kept = json.loads(predicted(trained_run, paths[3], capsys, "--exif", "keep", *more))
    for path, answer in [*zip(paths, answers, strict=True), (paths[3], kept)]:
        with Image.open(path) as image, torch.inference_mode():
            shown = image if answer is kept else ImageOps.exif_transpose(image)
            expected = trained.network(transform(shown.convert("RGB"))[None]).softmax(dim=1)[0]
        assert answer["path"] == ("FILE" if answer is kept else str(path))
        assert [entry["class"] for entry in answer["classes"]] == [NAMES[e["index"]] for e in answer["classes"]]
        found = torch.tensor([entry["probability"] for entry in sorted(answer["classes"], key=lambda e: e["index"])])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def predicted(run: Path, path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The answer about one file, without its name."""
    assert main(["predict", str(run), str(path), "--workers", "0", *options]) == 0
    return capsys.readouterr().out.replace(str(path), "FILE")


def test_images_of_more_than_8_bits_are_scaled_or_refused_and_never_white(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = np.asarray(read_photo("coffee").convert("L").resize((80, 60)))
    white = {"white.png": np.full((60, 80), 255, np.uint8), "8.png": grey}
    deep = grey.astype(np.uint16) * 257
    same = {"16.png": deep, "16.tiff": deep}
    ranged = {"i.tiff": deep.astype(np.int32), "f.tiff": deep.astype(np.float32)}
    for name, values in {**white, **same, **ranged}.items():
        Image.fromarray(values).save(tmp_path / name)
        (tmp_path / "train" / name).mkdir(parents=True)  # a class of each
        Image.fromarray(values).save(tmp_path / "train" / name / name)
    answer = predicted(trained_run, tmp_path / "8.png", capsys)
    assert answer != predicted(trained_run, tmp_path / "white.png", capsys)
    assert [predicted(trained_run, tmp_path / name, capsys) for name in same] == [answer] * 2
    for name in ranged:
        assert main(["predict", str(trained_run), str(tmp_path / name), "--workers", "0"]) == 1
        assert "have no range that is known" in capsys.readouterr().err
        assert predicted(trained_run, tmp_path / name, capsys, "--range", "0", "65535") == answer
    convert = ["convert", "folder", str(tmp_path / "train"), "--val-fraction", "0", "--workers", "1"]
    assert main([*convert[:3], str(tmp_path / "refused"), *convert[3:], "--strict"]) == 2
    assert "have no range that is known" in capsys.readouterr().err
    assert main([*convert[:3], str(tmp_path / "mds"), *convert[3:], "--range", "0", "65535"]) == 0
    capsys.readouterr()
    assert main(["predict", str(trained_run), str(tmp_path / "mds/train"), "--workers", "0"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert Counter(row["probability_1"] for row in rows)[rows_of(answer)[0]["probability_1"]] == 5


def test_shards_files_and_a_list_on_stdin_are_answered_in_the_order_given(
    trained_run: Path, photo_mds: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary
) -> None:
    first, second = sorted(photo_folder.glob("val/*/*.jpg"))[:2]
    listed = f"{second}\n{first}\n\n{second}\n/nowhere/caf\udce9.jpg\n".encode(errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    inputs = [str(first), "-", str(photo_mds / "val"), str(second)]
    more = ["--top-k", "1", "--workers", "2", "--batch-size", "20", "--weights", "raw"]
    assert main(["predict", str(trained_run), *inputs, *more]) == 1
    output = capsysbinary.readouterr()
    rows = rows_of(output.out.decode())
    shards = [f"{photo_mds / 'val'}:{at}" for at in range(48)]
    assert [row["path"] for row in rows] == [*map(str, (first, second, first, second)), *shards, str(second)]
    of_files = {row["path"]: row["probability_1"] for row in rows}
    assert of_files[str(first)] in {of_files[name] for name in shards}  # the same photograph from its shard
    assert len({tuple(row.values()) for row in rows if row["path"] == str(second)}) == 1
    assert b"broken: /nowhere/caf" in output.err and b"No such file" in output.err


def test_what_nothing_can_be_predicted_on_is_refused(
    trained_run: Path, photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for inputs, message in (
        ([str(tmp_path)], "must hold images"),
        ([str(tmp_path / "x.jpg")], "There is no"),
        ([str(photo_mds)], f"the splits train, val. Give one: {photo_mds / 'train'}"),
        ([str(photo_mds / "val"), "--top-k", "9"], "--top-k must be from 1 to 8, the classes, got 9"),
        ([str(photo_mds / "val"), "--top-k", "0"], "--top-k must be from 1 to 8, the classes, got 0"),
    ):
        assert main(["predict", str(trained_run), *inputs, "--workers", "0"]) == 2
        assert message in capsys.readouterr().err
