"""Exported models: safetensors in timm, ONNX in onnxruntime and torch.export give the logits of the network."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.conftest import PHOTOS, ROOT, run_train, tiny_photo_overrides
from tests.test_folder_lock import hold_by_parent
from vitcomposer import folder_lock
from vitcomposer.cli import main
from vitcomposer.evaluation.trained import Trained, load_trained
from vitcomposer.export.folder import write_folder
from vitcomposer.export.graph import check_onnx
from vitcomposer.models import build_model
from vitcomposer.schema import IMAGENET_MEAN, IMAGENET_STD, Model


def tiny(name: str, *, image_size: int | None = None, **options: object) -> Trained:
    """Weights drawn at random, head included: that of a new model is zero."""
    if not name.startswith("resnet"):
        options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, **options}
    if name.startswith("convit"):
        options = {"local_up_to_layer": 1, **options}
    model = Model(name=name, num_classes=5, image_size=32, drop_path_rate=0.0, **options)  # type: ignore[arg-type]
    network = build_model(**model.options())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return Trained(
        network=network.eval(),
        model=model,
        image_size=image_size or 32,
        crop_ratio=0.875,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        class_names=None,
        source=name,
        averaged=False,
    )


@pytest.fixture(scope="module")
def run(photo_mds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    overrides = tiny_photo_overrides(photo_mds, runs, "tiny")
    overrides += ["optimizer.lr=0.02", "algorithms.EMA.smoothing=0.5", "run.eval_interval=2ep"]
    assert run_train([str(ROOT / "yamls/deit_ti.yaml"), *overrides]) == 0
    return runs / "tiny"


def test_every_format_gives_the_predictions_of_the_network_on_the_val_split(
    run: Path, photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    from vitcomposer.evaluation.accuracy import measure, open_labelled

    out = tmp_path / "export"
    assert main(["export", str(run), "--out", str(out), "--format", "safetensors", "onnx", "torch-export"]) == 0
    assert capsys.readouterr().out.count("logits differ by") == 3

    trained, again = load_trained(run), load_trained(out)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    networks = {
        "ours": trained.network,
        "again": again.network,
        "timm": timm.create_model(f"local-dir:{out}", pretrained=True).eval(),
        "onnx": lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]),
        "program": torch.export.load(out / "model.pt2").module(),
    }
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in networks}

    def keeping(name: str):
        return lambda images: seen[name].append(networks[name](images)) or seen[name][-1]

    data = open_labelled(str(photo_mds), trained, batch_size=20, workers=0)
    scores = measure({name: keeping(name) for name in networks}, data)
    logits = {name: torch.cat(parts) for name, parts in seen.items()}
    assert logits["ours"].argmax(dim=1).unique().numel() > 1, "a model that says one class proves nothing"
    for name in networks:
        assert scores[name].top1 == scores["ours"].top1, name
        assert (logits[name] - logits["ours"]).abs().max() <= 1e-4, name

    fields = [field.name for field in dataclasses.fields(Trained) if field.name not in ("network", "source", "model")]
    assert [getattr(again, name) for name in fields] == [getattr(trained, name) for name in fields]
    assert again.class_names == PHOTOS
    facts = json.loads(session.get_modelmeta().custom_metadata_map["vitcomposer.json"])
    assert facts["label_names"] == list(PHOTOS) and facts["mean"] == list(trained.mean)
    summary = json.loads((run / "summary.json").read_text())
    card = (out / "README.md").read_text()
    better = max(summary["top1"], summary["top1_ema"])
    assert f"| top-1 | {100 * better:.2f} % |" in card and "Classes, in the order" in card
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16", {}),
        ("vit_small_patch32", {"pool": "avg", "class_token": False, "position_embedding": "sincos"}),
        ("vit_base_patch16", {"pool": "avg", "mlp_ratio": 3.0, "image_size": 48}),
        ("deit_tiny_patch16", {"position_embedding": "sincos_moco3", "qkv_bias": False, "image_size": 48}),
        ("deit_small_distilled_patch16", {"image_size": 48}),
        ("deit_tiny_distilled_patch16", {"position_embedding": "sincos", "combine_heads": "probabilities"}),
        ("deit3_small_patch16", {"image_size": 24}),
        ("deit3_huge_patch14", {"qkv_bias": False}),
        ("convit_small", {"image_size": 48}),
        ("convit_tiny_plus", {"pool": "avg", "qkv_bias": True}),
        ("resnet18", {"image_size": 48}),
    ],
)
def test_safetensors_are_the_same_network_in_timm(name: str, options: dict[str, object], tmp_path: Path) -> None:
    trained = tiny(name, **options)  # type: ignore[arg-type]
    differences = write_folder(trained, tmp_path / "out")
    assert differences["model.safetensors"] <= 1e-5

    file = tmp_path / "out" / "model.safetensors"
    page = json.loads((tmp_path / "out" / "config.json").read_text())
    overlay = dict(page["pretrained_cfg"], file=str(file))
    by_name = timm.create_model(
        page["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, **page["model_args"]
    )
    filled = timm.create_model(page["architecture"], num_classes=page["num_classes"], **page["model_args"])
    timm.models.load_checkpoint(filled, str(file))
    images = torch.randn(2, 3, trained.image_size, trained.image_size)
    with torch.no_grad():
        expected = trained.network(images)
        assert expected.std(dim=0).max() > 1e-2, "logits that ignore the image prove nothing"
        torch.testing.assert_close(load_trained(tmp_path / "out").network(images), expected, rtol=0, atol=1e-5)
        if options.get("combine_heads") == "probabilities":
            assert "mean of its two heads' logits" in (tmp_path / "out" / "README.md").read_text()
            trained.network.config = dataclasses.replace(trained.network.config, combine_heads="logits")
            expected = trained.network(images)
        for network in (by_name, filled):
            torch.testing.assert_close(network.eval()(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convit_tiny", {"init_values": 0.1, "image_size": 48}),
        ("convit_tiny", {"stem": "conv", "image_size": 48}),
        ("deit_tiny_distilled_patch16", {}),
        ("deit_tiny_distilled_patch16", {"combine_heads": "probabilities"}),
    ],
)
def test_onnx_is_the_same_network(name: str, options: dict[str, object], tmp_path: Path) -> None:
    trained = tiny(name, **options)  # type: ignore[arg-type]
    assert write_folder(trained, tmp_path / "out", formats=["onnx"])["model.onnx"] <= 1e-5
    assert "architecture" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_convit_with_layer_scale_is_refused_for_timm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.init_values must be 0 .* Use --format onnx or torch-export"):
        write_folder(tiny("convit_tiny", init_values=0.1), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_network_with_a_convolutional_stem_is_read_by_vitcomposer_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, out = tiny("convit_tiny", stem="conv"), tmp_path / "out"
    assert write_folder(trained, out) == {"model.safetensors": 0.0}
    assert "note: timm has no network with a convolutional stem" in capsys.readouterr().out
    assert "architecture" not in json.loads((out / "config.json").read_text())
    card = (out / "README.md").read_text()
    assert "timm.create_model" not in card and "vitcomposer predict FOLDER IMAGES" in card
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_trained(out).network(images), trained.network.eval()(images))


def test_export_replaces_another_only_when_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(tiny("vit_tiny_patch16"), out, formats=["safetensors", "onnx"])
    (out / "mine.txt").write_text("kept")
    before = (out / "model.safetensors").read_bytes()
    other = tiny("deit3_small_patch16")
    with pytest.raises(ValueError, match=r"--out must be a folder without model.safetensors.*add --force"):
        write_folder(other, out)
    assert (out / "model.safetensors").read_bytes() == before
    write_folder(other, out, force=True)
    assert load_trained(out).model.name == "deit3_small_patch16"
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "mine.txt", "model.safetensors"]


def test_export_into_the_folder_of_a_run_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--out", str(run)]) == 2
    assert "--out must be a folder of its own" in capsys.readouterr().err


def test_file_that_answers_differently_is_not_left(tmp_path: Path) -> None:
    trained = tiny("vit_tiny_patch16")
    trained.network.head.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"model.safetensors must give the network's logits within 0.0001"):
        write_folder(trained, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages_names_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs onnxruntime, not installed. pip install 'vitcomposer\[onnx\]'"):
        write_folder(tiny("vit_tiny_patch16"), tmp_path / "out", formats=["onnx"])
    assert not list(tmp_path.iterdir())


def test_onnx_larger_than_a_message_is_refused() -> None:
    with torch.device("meta"):
        network = build_model("vit_huge_patch14", num_classes=10, image_size=224)
    with pytest.raises(ValueError, match=r"holds 2 GB of weights, these are 2.5 GB"):
        check_onnx(network)


def test_target_has_one_writer_and_what_killed_ones_left_goes(tmp_path: Path) -> None:
    out, left, other = tmp_path / "out", tmp_path / ".out.4711.partial", tmp_path / ".out2.4711.partial"
    for folder in (left, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of it")
    lock = folder_lock.beside(out)
    hold_by_parent(lock)
    with pytest.raises(ValueError, match=r"out is being written by pid \d+ on .* Wait, stop it, or name another --out"):
        write_folder(tiny("deit_tiny_patch16"), out)
    assert left.exists() and not out.exists()
    lock.unlink()
    write_folder(tiny("deit_tiny_patch16"), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


def test_kill_while_an_export_is_replaced_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KillError(BaseException):
        pass

    out, old, new = tmp_path / "out", tiny("deit_tiny_patch16"), tiny("deit_tiny_patch16", embed_dim=64)
    moves = len(["README.md", "config.json", "model.safetensors"])
    for survived in range(moves + 1):
        write_folder(old, out, force=True)
        left, replace = [survived], os.replace

        def move(source: Path, target: Path, left: list[int] = left, replace: Any = replace) -> None:
            if source.parent.name.endswith(".partial"):
                if not left[0]:
                    raise KillError
                left[0] -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", move)
            try:
                write_folder(new, out, force=True)
            except KillError:
                assert survived < moves
        if survived < moves:
            with pytest.raises(ValueError, match="it is neither"):
                load_trained(out)
        else:
            assert load_trained(out).model.embed_dim == 64
