"""``vitcomposer attention``: the pictures it draws, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from tests.conftest import read_photo
from vitcomposer.cli import main
from vitcomposer.models import build_model

SIZE = {"patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 9}
DATA = ["data.source=synthetic", "model.image_size=32", "model.num_classes=4"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two of one name."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "a" / "cat.jpg", folder / "b" / "cat.png"]
    for path in paths:
        path.parent.mkdir()
        read_photo("chelsea").save(path)
    return [str(path) for path in paths]


def weights(folder: Path, name: str, **options: Any) -> list[str]:
    """Overrides for a file of new weights, the head aside all away from zero."""
    torch.manual_seed(0)
    model: nn.Module = build_model(name, num_classes=4, image_size=32, **SIZE, **options)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    given = {"name": name, **SIZE, **options}
    keys = [f"model.{key}={'null' if value is None else value}" for key, value in given.items()]
    return [
        *DATA,
        *keys,
        f"init.weights={folder / 'model.pth'}",
    ]


def draw(argv: list[str], out: Path) -> dict[str, tuple[int, int]]:
    """Sizes of the pictures by name."""
    assert main(["attention", *argv, "--out", str(out)]) == 0
    sizes = {}
    for path in out.iterdir():
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 20, "drawn, not empty"
            sizes[path.name] = picture.size
    return sizes


def test_convit_gets_a_picture_for_each_image_and_its_positions(photos: list[str], tmp_path: Path) -> None:
    given = weights(tmp_path, "convit_tiny", local_up_to_layer=2)
    every = draw(["yamls/convit_ti.yaml", *photos, *given], tmp_path / "all")
    assert sorted(every) == ["cat-1.png", "cat-2.png", "layers.png", "positional.png"]
    some = draw(
        ["yamls/convit_ti.yaml", photos[0], *given, "--layers", "1", "2", "3", "--heads", "2", "4"], tmp_path / "some"
    )
    assert sorted(some) == ["cat.png", "layers.png", "positional.png"]
    assert some["cat.png"][1] > every["cat-1.png"][1], "three layers are higher than one with two lines of heads"
    assert some["positional.png"][0] < every["positional.png"][0], "two heads are narrower than nine"
    assert some["layers.png"] == every["layers.png"]


def test_model_without_class_token_or_labels_is_drawn(photos: list[str], tmp_path: Path) -> None:
    vit = weights(tmp_path, "vit_tiny_patch16", pool="avg", class_token=False)
    found = draw(["yamls/deit_ti.yaml", photos[0], *vit, "--heads", "1"], tmp_path / "vit")
    assert sorted(found) == ["cat.png", "layers.png"]
    trunk = [*weights(tmp_path, "vit_tiny_patch16"), "model.num_classes=0"]
    assert sorted(draw(["yamls/dino_vit_s.yaml", photos[0], *trunk], tmp_path / "dino")) == ["cat.png", "layers.png"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["nowhere.jpg"], "IMAGE must be an image file, nowhere.jpg cannot be read: No such file"),
        (["PHOTO", "--layers", "4"], "--layers must be from 1 to 3, got 4"),
        (["PHOTO", "--heads", "0"], "--heads must be from 1 to 9, got 0"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(
    more: list[str], message: str, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["yamls/deit_ti.yaml", *(photos[0] if part == "PHOTO" else part for part in more)]
    out = tmp_path / "out"
    given = weights(tmp_path, "deit_tiny_patch16")
    assert main(["attention", *argv, *given, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_resnet_is_refused(photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(build_model("resnet50", num_classes=4, image_size=32).state_dict(), tmp_path / "model.pth")
    keys = [*DATA, "model.name=resnet50", "model.drop_path_rate=0", f"init.weights={tmp_path / 'model.pth'}"]

    assert main(["attention", "yamls/deit_ti.yaml", photos[0], *keys, "--out", str(tmp_path / "out")]) == 2
    rule = "a ViT, DeiT or ConViT, or a network of timm of their shape, which have attention"
    assert f"SOURCE must be {rule}, got 'resnet50'" in capsys.readouterr().err
