"""``vitcomposer embed``: a row for each sound image, of what the head of the network gets."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import PHOTOS, VAL_PER_CLASS, read_photo
from vitcomposer.cli import main
from vitcomposer.evaluation.classifier import load

QUIET = ("--workers", "0")


def test_features_are_what_the_head_gets(
    trained_run: Path, photo_folder: Path, photo_mds: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features.npz"
    assert main(["embed", str(trained_run), str(photo_folder / "val"), "--out", str(out), *QUIET]) == 0
    found = np.load(out)
    paths = found["paths"].tolist()
    assert sorted(found) == ["features", "labels", "model", "paths", "weights"]
    assert found["features"].dtype == np.float32 and len(found["features"]) == len(PHOTOS) * VAL_PER_CLASS
    assert sorted(paths) == sorted(map(str, photo_folder.glob("val/*/*.jpg")))
    assert found["labels"].tolist() == [Path(path).parent.name for path in paths]
    assert str(found["model"]).startswith("deit_tiny") and str(found["weights"]).startswith(str(trained_run))
    model = load(trained_run, device="cpu")
    network: Any = model.trained.network
    with torch.inference_mode():
        shares = network.head(torch.from_numpy(found["features"])).softmax(dim=1)
    for row, prediction in zip(shares, model.predict(paths, top_k=8), strict=True):
        expected = [float(row[model.class_names.index(name)]) for name in prediction.classes]
        assert prediction.probabilities == pytest.approx(expected, abs=1e-5)
    shards = tmp_path / "shards.npz"
    assert main(["embed", str(trained_run), str(photo_mds / "val"), "--out", str(shards), *QUIET]) == 0
    stored = np.load(shards)
    assert sorted(stored["labels"].tolist()) == sorted(found["labels"].tolist())
    one = {tuple(row.round(4)): label for row, label in zip(found["features"], found["labels"], strict=True)}
    assert {tuple(r.round(4)): n for r, n in zip(stored["features"], stored["labels"], strict=True)} == one


def test_flat_folder_has_no_labels_and_broken_images_are_named(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    read_photo("coffee").save(photos / "a.jpg")
    (photos / "b.jpg").write_bytes((photos / "a.jpg").read_bytes()[:900])
    out = tmp_path / "features.npz"
    assert main(["embed", str(trained_run), str(photos), "--out", str(out), *QUIET]) == 1
    said = capsys.readouterr()
    assert f"broken: {photos / 'b.jpg'}" in said.err and "1 images" in said.out
    found = np.load(out)
    assert "labels" not in found and found["paths"].tolist() == [str(photos / "a.jpg")]
    pytest.importorskip("pyarrow")
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    assert main(["embed", str(trained_run), str(photos), "--out", str(tmp_path / "f.parquet"), *QUIET]) == 1
    table = parquet.read_table(tmp_path / "f.parquet")
    assert np.array_equal(np.array(table["features"].to_pylist(), np.float32), found["features"])


def test_what_cannot_be_embedded_is_refused_in_one_line(
    trained_run: Path, photo_folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for folder, out, message in (
        (tmp_path, "f.csv", "--out must be a file that ends in .npz or .parquet"),
        (tmp_path, "f.parquet", "needs pyarrow: pip install pyarrow, or name a file that ends in .npz"),
        (tmp_path, "nowhere/f.npz", "Make the folder first."),
        (photo_folder, "f.npz", f"FOLDER must be the folder of one split, got '{photo_folder}'. Give one of them"),
        (tmp_path / "nowhere", "f.npz", "There is no"),
    ):
        assert main(["embed", str(trained_run), str(folder), "--out", str(tmp_path / out), *QUIET]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
