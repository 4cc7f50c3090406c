"""ViT, DeiT and DeiT III against timm, the published tables and closed forms."""

import math
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vitcomposer.models import build_model, model_names
from vitcomposer.models.layers import DropPath, drop_path_rates
from vitcomposer.models.positions import resize_positions, sincos_positions
from vitcomposer.models.vit import VisionTransformer

# Computed from the released models with 1000 classes at 224 pixels: recipes.md 2.1 and 3.1 (exact); DeiT III to 0.1 M.
PARAMETERS = {
    "deit_tiny_patch16": 5_717_416,
    "deit_small_patch16": 22_050_664,
    "deit_base_patch16": 86_567_656,
    "deit_tiny_distilled_patch16": 5_910_800,
    "deit_small_distilled_patch16": 22_436_432,
    "deit_base_distilled_patch16": 87_338_192,
    "convit_tiny": 5_710_512,
    "convit_tiny_plus": 9_972_912,
    "convit_small": 27_777_322,
    "convit_small_plus": 48_979_882,
    "convit_base": 86_540_040,
    "convit_base_plus": 153_134_856,
}
MILLIONS = {
    "deit3_small_patch16": 22.0,
    "deit3_medium_patch16": 38.8,
    "deit3_base_patch16": 86.6,
    "deit3_large_patch16": 304.4,
    "deit3_huge_patch14": 632.1,
}
TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def timm_name(name: str) -> str:
    return f"{name}_224" if name.startswith(("vit_", "deit")) else name


def perturb(model: nn.Module, std: float = 0.2) -> None:
    """Move every parameter, so that zero biases, unit norms and small gammas hide nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std * max(0.1, parameter.std(correction=0).item()))


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameter_count_is_the_published_one(name: str, expected: int) -> None:
    with torch.device("meta"):
        assert count(build_model(name, num_classes=1000, image_size=224)) == expected


@pytest.mark.parametrize(("name", "expected"), MILLIONS.items())
def test_deit3_parameter_count_is_the_published_one(name: str, expected: float) -> None:
    with torch.device("meta"):
        assert count(build_model(name, num_classes=1000, image_size=224)) / 1e6 == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("image_size", [224, 384])
def test_deit_base_384_parameter_count(image_size: int) -> None:
    with torch.device("meta"):
        model = build_model("deit_base_patch16", num_classes=1000, image_size=image_size)
    assert count(model) == {224: 86_567_656, 384: 86_859_496}[image_size]


@pytest.mark.parametrize("name", [name for name in model_names() if timm.is_model(timm_name(name))])
def test_state_dict_has_the_names_and_shapes_of_timm(name: str) -> None:
    with torch.device("meta"):
        ours = build_model(name, num_classes=1000, image_size=224).state_dict()
        theirs = timm.create_model(timm_name(name), num_classes=1000).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_every_published_name_is_checked_against_timm_or_a_table() -> None:
    checked = {name for name in model_names() if timm.is_model(timm_name(name))} | PARAMETERS.keys() | MILLIONS.keys()
    assert checked == set(model_names())


@pytest.mark.parametrize(
    "name", ["vit_small_patch16", "deit_small_patch16", "deit_small_distilled_patch16", "deit3_small_patch16"]
)
def test_logits_and_gradients_equal_timm(name: str) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(timm_name(name))
    perturb(reference)
    model = build_model(name, num_classes=1000, image_size=224)
    model.load_state_dict(reference.state_dict(), strict=True)
    images, direction = torch.randn(2, 3, 224, 224), torch.randn(2, 1000)
    for module in (model, reference):
        module.eval()
    logits, expected = model(images), reference(images)
    assert relative_error(logits, expected) < 1e-5
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    expected_gradients = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and expected_gradients[key].grad is not None
        assert relative_error(parameter.grad, expected_gradients[key].grad) < 1e-4, key


def test_distilled_heads_equal_timm_in_training() -> None:
    reference = timm.create_model("deit_tiny_distilled_patch16_224", depth=2)
    reference.set_distilled_training(True)
    perturb(reference)
    model = build_model("deit_tiny_distilled_patch16", num_classes=1000, image_size=224, depth=2)
    model.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 224, 224)
    for ours, expected in zip(model.train()(images), reference.train()(images), strict=True):
        torch.testing.assert_close(ours, expected)
    class_logits, dist_logits = model(images)
    torch.testing.assert_close(model.eval()(images), (class_logits + dist_logits) / 2)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "deit3_small_patch16", "deit_tiny_distilled_patch16"])
@pytest.mark.parametrize("size", [(160, 160), (256, 192)])
def test_other_image_size_equals_timm_dynamic_img_size(name: str, size: tuple[int, int]) -> None:
    reference = timm.create_model(timm_name(name), depth=1, num_classes=5, dynamic_img_size=True).eval()
    perturb(reference)
    model = build_model(name, num_classes=5, image_size=224, depth=1).eval()
    model.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(model(images), reference(images))


def test_resized_positions_equal_timm() -> None:
    from timm.layers import resample_abs_pos_embed

    positions = torch.randn(1, 2 + 14 * 14, 24)
    expected = resample_abs_pos_embed(positions, [24, 10], [14, 14], num_prefix_tokens=2)
    ours = resize_positions(positions, old_grid=(14, 14), new_grid=(24, 10), num_prefix_rows=2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("class_token", [True, False])
def test_avg_pool_equals_timm_with_the_norm_before_the_mean(class_token: bool) -> None:
    reference = timm.create_model(
        "vit_tiny_patch16_224", depth=2, global_pool="avg", fc_norm=False, class_token=class_token
    ).eval()
    perturb(reference)
    options = {"depth": 2, "pool": "avg", "class_token": class_token}
    model = build_model("vit_tiny_patch16", num_classes=1000, image_size=224, **options).eval()
    model.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(model(images), reference(images))


def test_sincos_positions_follow_the_closed_form() -> None:
    positions = sincos_positions((3, 5), 16)
    assert positions.shape == (1, 15, 16)
    for row in range(3):
        for column in range(5):
            omega = [10000 ** (-index / 3) for index in range(4)]
            expected = [f(axis * w) for axis in (column, row) for f in (math.sin, math.cos) for w in omega]
            torch.testing.assert_close(positions[0, 5 * row + column], torch.tensor(expected), atol=1e-6, rtol=0)


def test_sincos_model_has_no_position_parameter_and_none_for_the_class_token() -> None:
    model = build_model("vit_tiny_patch16", num_classes=3, image_size=64, position_embedding="sincos", **TINY)
    assert "pos_embed" not in model.state_dict() and "pos_embed" not in model.no_weight_decay()
    assert isinstance(model, VisionTransformer)
    images = torch.randn(2, 3, 64, 64)
    tokens = model.embed(images)
    torch.testing.assert_close(tokens[:, :1], model.cls_token.expand(2, -1, -1))
    patches, _ = model.patch_embed(images)
    torch.testing.assert_close(
        tokens[:, 1:] - patches, sincos_positions((8, 8), 48).expand(2, -1, -1), atol=1e-6, rtol=0
    )
    assert model(torch.randn(2, 3, 96, 48)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16", {}),
        ("vit_tiny_patch16", {"pool": "avg", "position_embedding": "sincos"}),
        ("vit_tiny_patch16", {"pool": "avg", "class_token": False}),
        ("deit_tiny_distilled_patch16", {}),
        ("deit3_small_patch16", {}),
        ("convit_tiny", {"num_heads": 4, "local_up_to_layer": 1}),
        ("convit_tiny", {"num_heads": 4, "local_up_to_layer": 1, "pool": "avg"}),
    ],
)
def test_no_parameter_lacks_a_gradient(name: str, options: dict) -> None:
    torch.manual_seed(0)
    model = build_model(name, num_classes=7, image_size=32, **{**TINY, **options})
    perturb(model)
    outputs = model(torch.randn(4, 3, 32, 32))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(F.cross_entropy(logits, torch.arange(4)) for logits in outputs).backward()
    lacking = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    # The softmax of the positional scores cancels their bias, see GPSA.
    assert [key for key in lacking if not key.endswith("pos_proj.bias")] == []
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "deit_tiny_distilled_patch16", "convit_tiny"])
def test_feature_interface(name: str) -> None:
    options = {**TINY, "num_heads": 4, **({"local_up_to_layer": 1} if name == "convit_tiny" else {})}
    model = build_model(name, num_classes=7, image_size=32, **options).eval()
    assert (model.num_features, model.embed_dim, model.patch_size, model.image_size) == (48, 48, 8, 32)
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 16 + model.num_prefix_tokens, 48)
    torch.testing.assert_close(tokens.mean(-1), model.norm.bias.mean().expand(tokens.shape[:2]), atol=1e-5, rtol=0)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 48)
    assert torch.equal(model.forward_head(tokens), model(images))
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(images), model.forward_head(tokens, pre_logits=True))
    featurizer = build_model(name, num_classes=0, image_size=32, **options)
    assert not [key for key in featurizer.state_dict() if key.startswith("head")]


def test_no_weight_decay_names_are_parameters() -> None:
    expected = {
        "deit_tiny_distilled_patch16": {"cls_token", "dist_token", "pos_embed"},
        "deit3_small_patch16": {"cls_token", "pos_embed"},
        "convit_tiny": {"cls_token", "pos_embed", "blocks.0.attn.gating_param"},
    }
    for name, names in expected.items():
        options = {"depth": 2, "local_up_to_layer": 1} if name == "convit_tiny" else {"depth": 2}
        model = build_model(name, num_classes=7, image_size=32, **options)
        assert model.no_weight_decay() == names <= dict(model.named_parameters()).keys()


def test_layer_scale_starts_at_the_published_value_and_can_be_switched_off() -> None:
    model = build_model("deit3_small_patch16", num_classes=2, image_size=32, depth=1)
    assert torch.equal(model.state_dict()["blocks.0.ls1.gamma"], torch.full((384,), 1e-4))
    without = build_model("deit3_small_patch16", num_classes=2, image_size=32, depth=1, init_values=0)
    assert not [key for key in without.state_dict() if "ls1" in key]


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("deit_tiny_patch16", None, [0.0, 0.1, 0.2, 0.3]),
        ("deit3_small_patch16", None, [0.3] * 4),
        ("deit_tiny_patch16", "constant", [0.3] * 4),
        ("deit3_small_patch16", "linear", [0.0, 0.1, 0.2, 0.3]),
    ],
)
def test_drop_path_schedule(name: str, mode: str | None, expected: list[float]) -> None:
    model = build_model(name, num_classes=2, image_size=32, depth=4, drop_path_rate=0.3, drop_path_mode=mode)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx(expected)


def test_drop_path_rates_of_one_block() -> None:
    assert drop_path_rates(0.1, 1, "linear") == [0.1]


def test_drop_path_drops_samples_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    y = drop(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert y.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(x), x)


def test_dropout_is_active_in_training_only() -> None:
    model = build_model("vit_tiny_patch16", num_classes=0, image_size=32, **TINY, drop_rate=0.1, attn_drop_rate=0.1)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "convit_tiny"])
@pytest.mark.parametrize("size", [32, 48])
def test_compiles_without_a_graph_break(name: str, size: int) -> None:
    options = {**TINY, "num_heads": 4, **({"local_up_to_layer": 1} if name == "convit_tiny" else {})}
    model = build_model(name, num_classes=5, image_size=32, drop_path_rate=0.1, **options)
    perturb(model)
    torch._dynamo.reset()
    images = torch.randn(2, 3, size, size)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled(images).sum().backward()
    torch.testing.assert_close(compiled.eval()(images), model.eval()(images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "convit_tiny"])
def test_runs_in_bfloat16_with_and_without_autocast(name: str) -> None:
    torch.manual_seed(0)
    options = {**TINY, "num_heads": 4, **({"local_up_to_layer": 1} if name == "convit_tiny" else {})}
    model = build_model(name, num_classes=5, image_size=32, **options)
    perturb(model)
    images = torch.randn(2, 3, 48, 48)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(images), expected) < 0.03
    assert relative_error(model.bfloat16()(images.bfloat16()).float(), expected) < 0.05


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deit_smal_patch16", {}, r"model\.name .*'deit_smal_patch16'. Did you mean 'deit_small_patch16'\?"),
        ("deit_small_patch16_224", {}, r"Did you mean 'deit_small_patch16'\?"),
        ("xception", {}, r"model\.name .*'xception'\. Known: convit_base, "),
        ("vit_tiny_patch16", {"drop_path": 0.1}, r"model\.drop_path is not .*Did you mean 'drop_path_"),
        ("vit_tiny_patch16", {"dist_token": True}, r"model\.dist_token is not an option of vit_tiny_patch16"),
        ("vit_tiny_patch16", {"locality_strength": 1.0}, r"model\.locality_strength is an option of the convit models"),
        ("convit_tiny", {"class_token": False}, r"model\.class_token is an option of the vit and deit models"),
        ("vit_tiny_patch16", {"embed_dim": 100}, r"model\.embed_dim .*model\.num_heads=3, got 100; use 99 or 102"),
        ("vit_tiny_patch16", {"patch_size": 24}, r"model\.image_size .*patch_size=24, got 224; use 216 or 240"),
        ("vit_tiny_patch16", {"depth": 0}, r"model\.depth must be a whole number from 1 to 1000, got 0"),
        ("vit_tiny_patch16", {"depth": 1_000_000_000}, r"model\.depth must be a whole number from 1 to 1000"),
        ("vit_tiny_patch16", {"depth": 1e9}, r"model\.depth must be a whole number from 1 to 1000"),
        ("vit_tiny_patch16", {"embed_dim": 3 << 40}, r"model\.embed_dim must be a whole number from 1 to 65536"),
        ("vit_tiny_patch16", {"mlp_ratio": 1e9}, r"model\.mlp_ratio must be above 0 and at most 256"),
        ("vit_tiny_patch16", {"mlp_ratio": float("nan")}, r"model\.mlp_ratio must be above 0 and at most 256"),
        ("vit_tiny_patch16", {"drop_path_rate": 1.0}, r"model\.drop_path_rate must be in \[0, 1\), got 1\.0"),
        ("vit_tiny_patch16", {"mlp_ratio": 0}, r"model\.mlp_ratio must be above 0 .*got 0"),
        ("vit_tiny_patch16", {"init_values": -1}, r"model\.init_values must not be negative, got -1"),
        ("vit_tiny_patch16", {"pool": "gap"}, r"model\.pool must be token or avg, got 'gap'"),
        ("vit_tiny_patch16", {"drop_path_mode": "step"}, r"model\.drop_path_mode must be linear or constant"),
        (
            "vit_tiny_patch16",
            {"position_embedding": "rope"},
            r"model\.position_embedding must be learned or sincos or sincos_moco3",
        ),
        ("vit_tiny_patch16", {"class_token": False}, r"model\.class_token=false; use model\.pool=avg"),
        ("deit_tiny_distilled_patch16", {"pool": "avg"}, r"use the name without _distilled"),
        (
            "vit_tiny_patch16",
            {"embed_dim": 102, "position_embedding": "sincos"},
            r"model\.embed_dim must be a multiple of 4 .*got 102; use 100 or 104",
        ),
        ("convit_tiny", {"num_heads": 3}, r"model\.num_heads .*got 3; use 1 or 4, or model\.use_local_init=false"),
        ("convit_tiny", {"depth": 4}, r"model\.local_up_to_layer must be in 0 \.\. 3 for model\.depth=4, got 10"),
        ("convit_tiny", {"locality_strength": 0.0}, r"model\.locality_strength must be above 0, got 0\.0"),
    ],
)
def test_bad_option_is_named_with_its_remedy(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=10, image_size=224, **options)


def test_sizes_that_no_network_has_are_refused_before_it_is_built() -> None:
    for name in ("vit_tiny_patch16", "convit_tiny"):
        with pytest.raises(ValueError, match=r"model\.image_size must be such that there are at most 1048576 patches"):
            build_model(name, num_classes=10, image_size=1 << 30)
        with pytest.raises(ValueError, match=r"model\.num_classes must be at most 16777216, got 1000000000"):
            build_model(name, num_classes=1_000_000_000, image_size=224)
        with pytest.raises(ValueError, match=r"model\.depth=999, .* need at least 44\d,\d+,\d+ weights, far more"):
            build_model(name, num_classes=10, image_size=224, depth=999, most_weights=5_717_416)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "deit_tiny_distilled_patch16", "convit_tiny"])
def test_network_fits_into_the_weights_that_it_has(name: str) -> None:
    model = build_model(name, num_classes=10, image_size=32)
    weights = sum(parameter.numel() for parameter in model.parameters())
    build_model(name, num_classes=10, image_size=32, most_weights=weights)
    assert 0.95 * weights < model.config.least_weights(10) < weights


def test_negative_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.num_classes must not be negative, got -1"):
        build_model("vit_tiny_patch16", num_classes=-1, image_size=224)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "convit_tiny"])
def test_image_that_does_not_fit_the_patches_is_refused(name: str) -> None:
    model = build_model(name, num_classes=10, image_size=64)
    with pytest.raises(ValueError, match=r"model\.patch_size=16, got 70 x 64; crop to 64 x 64"):
        model(torch.randn(1, 3, 70, 64))


def test_none_keeps_the_published_value() -> None:
    options = {"depth": None, "locality_strength": None, "init_values": None}
    model = build_model("deit3_small_patch16", num_classes=10, image_size=32, **options)
    assert len(model.blocks) == 12 and "blocks.11.ls2.gamma" in model.state_dict()


def test_model_names_are_sorted_and_unique() -> None:
    names = model_names()
    assert len(names) == 28 and all(first < second for first, second in pairwise(names))
