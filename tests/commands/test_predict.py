"""``vitcomposer predict``: an answer for each sound image in its place, timm's probabilities, broken images named."""

import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
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
    turned[0x0112] = 6  # to be shown turned by 90 degrees, which neither ImageNet's training nor timm does
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
    for path, answer in zip(paths, answers, strict=True):
        with Image.open(path) as image, torch.inference_mode():
            expected = trained.network(transform(image.convert("RGB"))[None]).softmax(dim=1)[0]
        assert answer["path"] == str(path)
        assert [entry["class"] for entry in answer["classes"]] == [NAMES[e["index"]] for e in answer["classes"]]
        found = torch.tensor([entry["probability"] for entry in sorted(answer["classes"], key=lambda e: e["index"])])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


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
