"""``vitcomposer preview``: its pixels are those that the network of a run gets in its first step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from tests.conftest import run_train, tiny_photo_overrides
from vitcomposer import cli, config
from vitcomposer.data.batch import CROPS
from vitcomposer.preview.page import SIGNATURE
from vitcomposer.tasks import ClassificationTask, SwAVTask

YAML = "deit_ti"
ONE_STEP = ["max_duration=1ba", "schedule.t_warmup=0ba", "run.progress_bar=false"]
SYNTHETIC = ["data.source=synthetic", "data.synthetic_samples=128", "data.num_workers=0", "precision=fp32"]


def first_batch(monkeypatch: pytest.MonkeyPatch, task: type, argv: list[str]) -> Any:
    """What the network of a run is given in its first step."""
    seen: list[Any] = []
    forward: Any = task.forward

    def remember(self: Any, batch: dict[str, Any]) -> Any:
        if self.training and not seen:
            given = batch.get("image", batch.get(CROPS))
            seen.append([each.clone() for each in given] if isinstance(given, list) else given.clone())
        return forward(self, batch)

    monkeypatch.setattr(task, "forward", remember)
    assert run_train(argv) == 0
    return seen[0]


def denormalised(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """uint8 (S, S, 3) of a float32 image (3, S, S)."""
    pixels = image.permute(1, 2, 0).double().numpy() * std + mean  # (S, S, 3)
    return np.rint(255 * pixels).clip(0, 255).astype(np.uint8)


def is_within(page: np.ndarray, tile: np.ndarray) -> bool:
    """Whether a picture (H, W, 3) has another one somewhere, pixel by pixel."""
    size = len(tile)
    found = np.ones([side - size + 1 for side in page.shape[:2]], bool)
    for y, x in [(0, 0), (size // 2, size // 3), (size - 1, size - 1)]:
        found &= (page[y : y + found.shape[0], x : x + found.shape[1]] == tile[y, x]).all(axis=-1)
    return any((page[y : y + size, x : x + size] == tile).all() for y, x in np.argwhere(found))


def enlarged(tile: np.ndarray, factor: int) -> np.ndarray:
    return tile.repeat(factor, axis=0).repeat(factor, axis=1)


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("staged", [False, True], ids=["mixed", "curriculum"])
def test_views_are_those_of_the_first_step(
    photo_mds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, staged: bool
) -> None:
    keys = [*tiny_photo_overrides(photo_mds, tmp_path, "run"), "augment.random_erasing=1.0", "augment.flip_prob=1.0"]
    stages = "algorithms={Curriculum: {image_sizes: [16, 32], compute: [0.5, 0.5]}}"
    keys += ["mixing.mixup_alpha=0", "mixing.cutmix_alpha=0", stages] if staged else []
    out = tmp_path / "out.png"
    assert cli.main(["preview", YAML, *keys, "--out", str(out), "--count", "16"]) == 0
    written, drawn, following = capsys.readouterr().out.splitlines()
    assert written == f"{out}: 16 training views (step 0) beside their originals, 8 validation views"
    assert drawn.startswith("crops keep ") and "; flip 100 %; erased 100 %" in drawn
    assert ("; mixed " in drawn) is not staged and following.startswith(f"Next: vitcomposer check {YAML} data.local=")
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    length = [] if staged else ONE_STEP
    images = first_batch(monkeypatch, ClassificationTask, [YAML, *keys, *length])
    assert images.shape == ((16, 3, 16, 16) if staged else (16, 3, 32, 32))
    page, augment = read(out), config.load(YAML, keys).augment
    tiles = [enlarged(denormalised(image, augment.mean, augment.std), 3) for image in images]
    assert [is_within(page, tile) for tile in tiles] == [True] * 16
    changed = tiles[0].copy()
    changed[-1, -1] ^= 1
    assert not is_within(page, changed)


def test_crops_are_those_of_the_first_step_by_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    keys = [*SYNTHETIC, f"run.folder={tmp_path / 'runs'}", "monitor=null"]
    out = tmp_path / "out.png"
    assert cli.main(["preview", "swav_demo", *keys, "--out", str(out), "--count", "5"]) == 0
    written, *areas, _ = capsys.readouterr().out.splitlines()
    assert written == f"{out}: 5 images with their crops (step 0) beside their originals"
    assert [line.partition(" keep")[0] for line in areas] == ["crops of 16 px", "crops of 8 px"]
    low, _, high, *_ = areas[1].partition("keep ")[2].split()
    assert 25 <= float(low) < float(high) <= 66  # of scales from 0.3 to 0.6, in whole pixels
    groups = first_batch(monkeypatch, SwAVTask, ["swav_demo", *keys, *ONE_STEP])
    assert [tuple(group.shape) for group in groups] == [(128, 3, 16, 16), (256, 3, 8, 8)]
    page, crops = read(out), config.load("swav_demo", keys).crops
    shown = [group[row] for group in groups for row in range(len(group)) if row % 64 < 5]
    tiles = [enlarged(denormalised(crop, crops.mean, crops.std), 6) for crop in shown]
    assert [is_within(page, tile) for tile in tiles] == [True] * 30


def test_only_a_picture_of_its_own_is_written_over(tmp_path: Path, capsys: Any) -> None:
    small = ["model.image_size=32", "evaluation.global_batch_size=16", "init.weights=null"]
    command = ["preview", "probe_knn", *SYNTHETIC, *small]
    mine, own, text = tmp_path / "mine.png", tmp_path / "new/own.png", tmp_path / "text.png"
    Image.new("RGB", (4, 4)).save(mine)
    text.write_text("no picture")
    for path in (mine, text):
        before = path.read_bytes()
        assert cli.main([*command, "--out", str(path)]) == 2
        assert capsys.readouterr().err.startswith("error: --out must be a new file, or one that `vitcomposer preview`")
        assert path.read_bytes() == before
    for _ in range(2):
        assert cli.main([*command, "--out", str(own)]) == 0
        assert capsys.readouterr().out.startswith(f"{own}: 8 validation views\n")
    assert Image.open(own).info["Software"] == SIGNATURE
    for wrong in (["--out", "picture.jpg"], ["--count", "0"], ["data.source=mds", "data.local=nowhere"]):
        assert cli.main([*command, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
