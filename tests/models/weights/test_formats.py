"""load_weights: state dicts of timm at two sizes, layouts of others, and sources that are another network."""

from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitcomposer.models import build_model, load_weights

SIZE = {"depth": 2, "embed_dim": 32, "num_heads": 4}
# Ours, timm's, and what timm's network is made with where its names mean something else.
FAMILIES = {
    "deit": ("deit_tiny_patch16", "deit_tiny_patch16_224"),
    "deit distilled": ("deit_tiny_distilled_patch16", "deit_tiny_distilled_patch16_224"),
    "deit3": ("deit3_small_patch16", "deit3_small_patch16_224"),
    "convit": ("convit_tiny", "convit_tiny"),
    "vit augreg": ("vit_small_patch32", "vit_small_patch32_224.augreg_in21k_ft_in1k"),
    "dino": ("vit_small_patch16", "vit_small_patch16_224.dino"),
}


def noisy(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ours(name: str, *, seed: int = 0, num_classes: int = 5, image_size: int = 32, **options):
    local = {"local_up_to_layer": 1} if name.startswith("convit") else {}
    return noisy(
        build_model(name, num_classes=num_classes, image_size=image_size, **{**SIZE, **local, **options}), seed
    )


def timms(name: str, image_size: int) -> nn.Module:
    size = {**SIZE, "embed_dim": 8, "local_up_to_layer": 1} if name == "convit_tiny" else SIZE  # a width per head
    return timm.create_model(name, num_classes=5, img_size=image_size, **size)


def resized_by_timm(state: dict[str, Tensor], target: nn.Module, name: str) -> dict[str, Tensor]:
    if name != "convit_tiny":
        return checkpoint_filter_fn(dict(state), target)
    # timm resizes its other transformers as they are loaded, its ConViT not at all.
    return {**state, "pos_embed": resample_abs_pos_embed(state["pos_embed"], [24, 24], num_prefix_tokens=0)}


def assert_equal_logits(first: nn.Module, second: nn.Module, image_size: int) -> None:
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(first(images), second(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_timm_give_its_logits_at_224_and_384(family: str, tmp_path: Path) -> None:
    own, name = FAMILIES[family]
    reference = noisy(timms(name, 224))
    torch.save(reference.state_dict(), tmp_path / "timm.pth")
    model = ours(own, seed=1, image_size=224)
    report = load_weights(model, tmp_path / "timm.pth", min_matched=1.0)
    assert not (report.missing or report.unexpected or report.resized or report.replaced_heads or report.zeroed)
    assert_equal_logits(model, reference, 224)

    larger = timms(name, 384).eval()
    larger.load_state_dict(resized_by_timm(reference.state_dict(), larger, name))
    model = ours(own, seed=1, image_size=384)
    assert load_weights(model, tmp_path / "timm.pth", min_matched=1.0).resized == ("pos_embed",)
    assert_equal_logits(model, larger, 384)


def swav(state: dict[str, Tensor]) -> dict:
    """The official file: flat, as it was under DistributedDataParallel, its head beside the trunk."""
    head = {"projection_head.0.weight": torch.zeros(3, 3), "prototypes.weight": torch.zeros(3, 3)}
    return {f"module.{key}": value for key, value in {**state, **head}.items()}


def vissl(state: dict[str, Tensor]) -> dict:
    heads = {"0.projection_head.0.weight": torch.zeros(3, 3), "0.prototypes0.weight": torch.zeros(3, 3)}
    return {"classy_state_dict": {"base_model": {"model": {"trunk": state, "heads": heads}}, "phase_idx": 1}}


def vissl_resnet(state: dict[str, Tensor]) -> dict:
    return vissl({f"_feature_blocks.{key}": value for key, value in state.items()})


def vissl_convit(state: dict[str, Tensor]) -> dict:
    """Other names, gates of four dimensions, and relative positions repeated ten times and divided by ten."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("cls_token", "class_token").replace("pos_embed", "pos_embedding")
        key = key.replace("mlp.fc", "mlp.linear_").replace("attn.gating_param", "attn.alpha")
        value = value.view(1, -1, 1, 1) if key.endswith("alpha") else value
        renamed[key] = value.repeat(1, 10) if key.endswith("pos_proj.weight") else value
    return vissl(renamed)


def dino_student(state: dict[str, Tensor]) -> dict:
    head = {"module.head.mlp.0.weight": torch.zeros(3, 3)}
    return {"student": {**{f"module.backbone.{key}": value for key, value in state.items()}, **head}, "epoch": 3}


LAYOUTS = {
    "swav": ("resnet18", swav),
    "swav of vissl": ("resnet18", vissl_resnet),
    "vit of vissl": ("vit_tiny_patch16", vissl),
    "convit of vissl": ("convit_tiny", vissl_convit),
    "dino, the student alone": ("vit_small_patch16", dino_student),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trunk_in_the_layout_of_others_loads(layout: str, tmp_path: Path) -> None:
    name, wrap = LAYOUTS[layout]
    build = (
        (lambda n, seed: noisy(build_model(name, num_classes=n, image_size=32), seed))
        if name == "resnet18"
        else (lambda n, seed: ours(name, num_classes=n, seed=seed))
    )
    source, target = build(0, 1), build(5, 2)
    torch.save(wrap(source.state_dict()), tmp_path / "others.torch")
    report = load_weights(target, tmp_path / "others.torch", min_matched=1.0)
    assert len(report.loaded) == len(source.state_dict()) and len(report.missing) == 2, report
    assert len(report.unexpected) == (1 if "dino" in layout else 2), report.unexpected
    target.reset_classifier(0)
    assert_equal_logits(source, target, 32)


def test_distilled_into_plain_leaves_its_token_and_second_head_out() -> None:
    source, target = ours("deit_tiny_distilled_patch16", seed=1), ours("deit_tiny_patch16", seed=2, image_size=64)
    report = load_weights(target, source.state_dict())
    assert report.unexpected == ("dist_token", "head_dist.bias", "head_dist.weight") and not report.missing
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0]) and torch.equal(
        target.head.weight, source.head.weight
    )
    assert "left out, in the source but not in the model: dist_token, head_dist.bias, head_dist.weight" in str(report)


def test_plain_into_distilled_leaves_token_and_second_head_as_initialised() -> None:
    source, target = ours("deit_tiny_patch16", seed=1), ours("deit_tiny_distilled_patch16", seed=2)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    report = load_weights(target, source.state_dict())
    assert report.missing == ("dist_token", "head_dist.weight", "head_dist.bias") and report.resized == ("pos_embed",)
    assert all(torch.equal(target.state_dict()[key], before[key]) for key in report.missing)
    assert torch.equal(target.pos_embed[:, 2:], source.pos_embed[:, 1:])
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0]) and not target.pos_embed[:, 1].any()


VIT = "vit_tiny_patch16"
MISMATCHES = {
    "blocks more": ((VIT, {"depth": 3}), (VIT, {}), r"no blocks\.2\.norm1\.weight, .* more; choose the model\.name"),
    "a ViT": ((VIT, {}), ("convit_tiny", {}), r"fills 84\.4% .*Missing: blocks\.0\.attn\.gating_param"),
    "a ConViT": (("convit_tiny", {}), (VIT, {}), r"no blocks\.0\.attn\.gating_param, .*; choose the model\.name"),
    "LayerScale": ((VIT, {"init_values": 0.1}), (VIT, {}), r"no blocks\.0\.ls1\.gamma, .*model\.init_values=1e-4"),
    "learned positions": ((VIT, {}), (VIT, {"position_embedding": "sincos"}), r"position_embedding=learned"),
    "narrower MLP": ((VIT, {"mlp_ratio": 2.0}), (VIT, {}), r"blocks\.0\.mlp\.fc1\.weight \(64, 32\) for \(128, 32\)"),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_another_architecture_fails_with_the_first_mismatches(kind: str) -> None:
    source, target, error = MISMATCHES[kind]
    model = ours(target[0], seed=2, **target[1])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=error):
        load_weights(model, ours(source[0], seed=1, **source[1]).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_positions_of_no_square_grid_are_refused() -> None:
    state = ours("vit_tiny_patch16").state_dict()
    state["pos_embed"] = torch.zeros(1, 14 * 10 + 1, 32)
    with pytest.raises(ValueError, match="has 141 rows of positions, which are no square grid"):
        load_weights(ours("vit_tiny_patch16"), state)
