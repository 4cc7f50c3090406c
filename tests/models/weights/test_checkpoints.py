"""load_weights: formats, names, positions, heads, safety."""

import argparse
import datetime
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vitcomposer.models import build_model, load_weights

OPTIONS = {"depth": 2, "embed_dim": 32, "num_heads": 4}
CONVIT = {**OPTIONS, "local_up_to_layer": 1}


def small(name: str = "deit_tiny_patch16", *, seed: int = 0, num_classes: int = 5, image_size: int = 224, **options):
    torch.manual_seed(seed)
    options = {**(CONVIT if name.startswith("convit") else OPTIONS), **options}
    model = build_model(name, num_classes=num_classes, image_size=image_size, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_same_function(first: nn.Module, second: nn.Module, image_size: int = 224) -> None:
    images = torch.randn(2, 3, image_size, image_size)
    torch.testing.assert_close(first(images), second(images))


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16", "deit_tiny_distilled_patch16", "deit3_small_patch16", "convit_tiny"]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip_of_a_flat_state_dict(name: str, suffix: str, tmp_path: Path) -> None:
    source, target = small(name, seed=1), small(name, seed=2)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(source.state_dict(), path)
    report = load_weights(target, path)
    assert_same_function(source, target)
    assert report.matched == 1.0 and len(report.loaded) == len(source.state_dict())
    assert not (report.resized or report.replaced_heads or report.missing or report.unexpected)
    assert str(path) in str(report) and "100.0%" in str(report)


def wrapped_deit(state: dict[str, Tensor]) -> dict:
    return {"model": state, "optimizer": {"lr": 1}, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}


def wrapped_composer(state: dict[str, Tensor]) -> dict:
    """What Composer writes: weights under the wrapper's attribute, its clock, versions and random state."""
    state = {f"module.model.{key}": value for key, value in state.items()}
    clock = {"epoch": 1, "total_wct": datetime.timedelta(seconds=2)}
    rng = [{"numpy": np.random.get_state(), "torch": torch.get_rng_state()}]
    metadata = {"torch_version": torch.__version__}
    return {"state": {"model": state, "timestamp": clock, "metadata": metadata}, "rng": rng}


def wrapped_timm(state: dict[str, Tensor]) -> dict:
    return {"state_dict": {f"module.{key}": value for key, value in state.items()}, "arch": "x", "epoch": 1}


@pytest.mark.parametrize("wrap", [wrapped_deit, wrapped_composer, wrapped_timm])
def test_wrapped_checkpoints_load_safely(wrap, tmp_path: Path) -> None:
    source, target = small(seed=1), small(seed=2)
    torch.save(wrap(source.state_dict()), tmp_path / "checkpoint.pt")
    assert load_weights(target, tmp_path / "checkpoint.pt").matched == 1.0
    assert_same_function(source, target)


def pretraining(state: dict[str, Tensor], other: dict[str, Tensor], trunk: str, other_trunk: str) -> dict:
    """A Composer checkpoint of pre-training: the trunk that is meant to be used, a second one and a head."""
    head = {"module.head.weight": torch.zeros(3, 3), "module.queue": torch.zeros(2)}
    trunks = {f"module.{trunk}.{key}": value for key, value in state.items()}
    return wrapped_composer({}) | {
        "state": {"model": head | {f"module.{other_trunk}.{key}": value for key, value in other.items()} | trunks}
    }


def official_moco(state: dict[str, Tensor], other: dict[str, Tensor]) -> dict:
    encoders = {"base_encoder": state, "momentum_encoder": other}
    return {"state_dict": {f"module.{name}.{key}": v for name, enc in encoders.items() for key, v in enc.items()}}


def official_dino(state: dict[str, Tensor], other: dict[str, Tensor]) -> dict:
    student, teacher = ({f"module.backbone.{key}": v for key, v in trunk.items()} for trunk in (other, state))
    return {"student": student, "teacher": {key.removeprefix("module."): v for key, v in teacher.items()}, "epoch": 3}


PRETRAINED = {
    "swav": lambda state, other: pretraining(state, {}, "trunk", "none"),
    "moco": lambda state, other: pretraining(state, other, "trunk", "momentum_trunk"),
    "dino": lambda state, other: pretraining(state, other, "teacher_trunk", "trunk"),
    "official moco": official_moco,
    "official dino": official_dino,
}


@pytest.mark.parametrize("kind", PRETRAINED)
@pytest.mark.parametrize("num_classes", [0, 5])
def test_trunk_of_pretraining_loads(kind: str, num_classes: int, tmp_path: Path) -> None:
    source, other = (small(seed=seed, num_classes=0) for seed in (1, 2))
    target = small(seed=3, num_classes=num_classes)
    head = target.head.weight.clone() if num_classes else None
    torch.save(PRETRAINED[kind](source.state_dict(), other.state_dict()), tmp_path / "run.pt")
    report = load_weights(target, tmp_path / "run.pt")
    assert report.matched == 1.0 and len(report.loaded) == len(source.state_dict())
    assert report.missing == (("head.weight", "head.bias") if num_classes else ())
    assert torch.equal(target.head.weight, head) if head is not None else True
    target.reset_classifier(0)
    assert_same_function(source, target)


def test_trunk_of_a_resnet_loads_and_its_head_stays_new(tmp_path: Path) -> None:
    source, target = (build_model("resnet18", num_classes=n, image_size=32).eval() for n in (7, 5))
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.add_((0.01 * torch.rand_like(tensor.float())).to(tensor.dtype))
    torch.save(wrapped_composer(source.state_dict()), tmp_path / "resnet.pt")
    report = load_weights(target, tmp_path / "resnet.pt")
    assert report.matched == 1.0 and report.replaced_heads == ("fc.bias", "fc.weight")
    source.reset_classifier(0), target.reset_classifier(0)
    assert_same_function(source, target, 32)


class Payload:
    """Would run code when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def test_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "code_ran"
    torch.save({"model": small().state_dict(), "extra": Payload(marker)}, tmp_path / "bad.pth")
    model = small(seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"bad\.pth was not loaded: it needs \w+\.mkdir, .*torch\.save\(torch\.load\("):
        load_weights(model, tmp_path / "bad.pth")
    assert not marker.exists()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["text", "empty", "cut"])
def test_file_that_is_no_checkpoint_is_refused(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"notes{suffix}"
    torch.save(small().state_dict(), path)
    path.write_bytes({"text": b"no weights here", "empty": b"", "cut": path.read_bytes()[:5000]}[kind])
    with pytest.raises(ValueError, match=rf"notes{suffix} could not be read, is it a whole checkpoint\? \w"):
        load_weights(small(), path)


def test_safetensors_of_nothing_but_a_header_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    """Ten megabytes of names of empty tensors, which take 130 as Python has them."""
    entries = (f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(200_000))
    header = f"{{{','.join(entries)}}}".encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=rf"its header has {len(header)} bytes of the file's {len(header) + 8}"):
        load_weights(small(), tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="its header has 1152921504606846976 bytes"):
        load_weights(small(), tmp_path / "a.safetensors")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_weights(small(), tmp_path / "absent.pt")


@pytest.mark.parametrize("name", ["deit_tiny_patch16", "deit_tiny_distilled_patch16", "convit_tiny"])
def test_head_with_other_classes_is_left_out(name: str) -> None:
    source, target = small(name, seed=1, num_classes=1000), small(name, seed=2, num_classes=5)
    heads = [key for key in target.state_dict() if key.startswith("head")]
    before = {key: target.state_dict()[key].clone() for key in heads}
    report = load_weights(target, source.state_dict())
    assert report.replaced_heads == tuple(sorted(heads)) and report.matched == 1.0
    assert not report.missing and not report.unexpected
    assert all(torch.equal(target.state_dict()[key], before[key]) for key in heads)
    assert "left as initialised, other number of classes: head.bias" in str(report)
    source.reset_classifier(0), target.reset_classifier(0)
    assert_same_function(source, target)


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16", "deit_tiny_distilled_patch16", "deit3_small_patch16", "convit_tiny"]
)
def test_positions_are_resized_from_224_to_384(name: str) -> None:
    source, target = small(name, seed=1), small(name, seed=2, image_size=384)
    report = load_weights(target, source.state_dict())
    assert report.resized == ("pos_embed",) and "resized to the model's grid: pos_embed" in str(report)
    assert target.pos_embed.shape[1] == 24 * 24 + target.num_position_rows
    # The model resizes in its forward pass too, so both see a 384 image with the same positions.
    assert_same_function(source, target, 384)


def test_class_row_moves_into_the_token_of_a_model_without_that_row() -> None:
    source = small("deit_small_patch16", seed=1, init_values=0.1)
    target = small("deit3_small_patch16", seed=2)
    assert load_weights(target, source.state_dict()).resized == ("pos_embed",)
    assert_same_function(source, target)


def test_class_row_is_zero_where_the_source_has_none() -> None:
    source = small("deit3_small_patch16", seed=1)
    target = small("deit_small_patch16", seed=2, init_values=0.1)
    load_weights(target, source.state_dict())
    assert not target.pos_embed[:, 0].any()
    assert_same_function(source, target)


def test_source_state_dict_is_not_changed() -> None:
    state = small("deit_small_patch16", seed=1, init_values=0.1).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    load_weights(small("deit3_small_patch16", seed=2), state)
    assert state.keys() == before.keys() and all(torch.equal(state[key], before[key]) for key in state)


def test_official_deit3_names_are_mapped() -> None:
    source, target = small("deit3_small_patch16", seed=1), small("deit3_small_patch16", seed=2)
    official = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for key, value in source.state_dict().items()
    }
    assert "blocks.1.gamma_2" in official
    assert load_weights(target, {"model": official}).matched == 1.0
    assert_same_function(source, target)


@pytest.mark.parametrize("name", ["deit_tiny_patch16", "convit_tiny"])
def test_source_without_qkv_bias_gets_zeros_and_says_so(name: str) -> None:
    source, target = small(name, seed=1, qkv_bias=False), small(name, seed=2, qkv_bias=True)
    report = load_weights(target, source.state_dict())
    expected = {key for key in target.state_dict() if key.endswith(("qkv.bias", "qk.bias", ".v.bias"))}
    assert set(report.zeroed) == expected and not report.missing and report.matched == 1.0
    assert "zero, trained without: blocks.0.attn.q" in str(report)
    assert_same_function(source, target)


@pytest.mark.parametrize("name", ["deit_tiny_patch16", "convit_tiny"])
def test_qkv_bias_is_dropped_only_where_it_is_zero(name: str) -> None:
    source, target = small(name, seed=1, qkv_bias=True), small(name, seed=2, qkv_bias=False)
    with pytest.raises(ValueError, match=r"the model has no blocks\.0\.attn\.q\w+\.bias.*; set model\.qkv_bias=true"):
        load_weights(target, source.state_dict())
    with torch.no_grad():
        for key, value in source.state_dict().items():
            if key.endswith(("qkv.bias", "qk.bias", ".v.bias")):
                value.zero_()
    assert "blocks.1.attn.qkv.bias" in load_weights(target, source.state_dict()).unexpected
    assert_same_function(source, target)


def test_too_little_matched_names_file_and_share(tmp_path: Path) -> None:
    source = small(seed=1).state_dict()
    half = {key: value for key, value in source.items() if not key.startswith("blocks.1.")}
    torch.save(half, tmp_path / "half.pt")
    model = small(seed=2)
    with pytest.raises(
        ValueError, match=r"half\.pt fills 60\.0% of the model, at least 90\.0%.*blocks\.1\.norm1\.weight"
    ):
        load_weights(model, tmp_path / "half.pt")
    assert load_weights(model, tmp_path / "half.pt", min_matched=0.5).matched == pytest.approx(0.6)


def test_other_architecture_names_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"30 of 30 tensors have another shape \(.*\(1, 1, 64\) for \(1, 1, 32\)"):
        load_weights(small(), small(embed_dim=64).state_dict())
