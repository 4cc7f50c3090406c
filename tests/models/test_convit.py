"""ConViT against timm and against equations 6 and 7 of arXiv:2103.10697."""

import math

import pytest
import timm
import torch
from torch import nn

from vitcomposer.models import build_model
from vitcomposer.models.convit import GPSA, ConViT
from vitcomposer.models.positions import axis_offsets

SMALL = {"embed_dim": 36, "depth": 3, "num_heads": 9, "patch_size": 8, "local_up_to_layer": 2}


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * max(0.1, parameter.std(correction=0).item()) * torch.randn_like(parameter))


def first_gpsa(model: nn.Module) -> GPSA:
    return next(module for module in model.modules() if isinstance(module, GPSA))


def offsets(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    device = torch.device("cpu")
    return axis_offsets(rows, device=device, dtype=dtype), axis_offsets(columns, device=device, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance", "gradient_tolerance"),
    [("convit_tiny", torch.float64, 1e-12, 1e-10), ("convit_small", torch.float32, 1e-5, 1e-4)],
)
def test_logits_and_gradients_equal_timm(
    name: str, dtype: torch.dtype, tolerance: float, gradient_tolerance: float
) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(name).to(dtype)
    perturb(reference)
    model = build_model(name, num_classes=1000, image_size=224).to(dtype)
    model.load_state_dict(reference.state_dict(), strict=True)
    if dtype == torch.float64:
        # timm builds its relative positions in float32; they are small integers, so nothing but the dtype is missing.
        for module in reference.modules():
            if hasattr(module, "get_rel_indices"):
                module.rel_indices = module.get_rel_indices(196).to(dtype)
    images, direction = torch.randn(2, 3, 224, 224, dtype=dtype), torch.randn(2, 1000, dtype=dtype)
    logits, expected = model.train()(images), reference.train()(images)
    assert relative_error(logits, expected) < tolerance
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    expected_gradients = dict(reference.named_parameters())
    for key, parameter in model.named_parameters():
        if key.endswith("pos_proj.bias"):  # its true gradient is zero: the softmax cancels a constant
            continue
        assert parameter.grad is not None and expected_gradients[key].grad is not None
        assert relative_error(parameter.grad, expected_gradients[key].grad) < gradient_tolerance, key


def test_avg_pool_equals_timm() -> None:
    reference = timm.create_model("convit_tiny", global_pool="avg", depth=3, local_up_to_layer=2).eval()
    perturb(reference)
    options = {"depth": 3, "local_up_to_layer": 2, "pool": "avg"}
    model = build_model("convit_tiny", num_classes=1000, image_size=224, **options).eval()
    model.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(model(images), reference(images))


def test_axis_offsets_are_key_minus_query() -> None:
    table, _ = offsets(5, 1)
    assert table.shape == (5, 5) and table[4, 1].item() == -3


@pytest.mark.parametrize("strength", [1.0, 2.5])
@pytest.mark.parametrize("num_heads", [4, 9, 16])
def test_local_init_is_a_gaussian_around_the_offset_of_each_head(num_heads: int, strength: float) -> None:
    options = {"embed_dim": 4 * num_heads, "depth": 2, "local_up_to_layer": 1, "num_heads": num_heads}
    model = build_model("convit_tiny", num_classes=2, image_size=112, locality_strength=strength, **options)
    attention = first_gpsa(model.double())
    side = math.isqrt(num_heads)
    positional = attention.positional_attention(*offsets(7, 7))
    row_of, column_of = (axis.flatten() for axis in torch.meshgrid(*2 * [torch.arange(7.0).double()], indexing="ij"))
    for h1 in range(side):
        for h2 in range(side):
            column, row = h2 - (side - 1) / 2, h1 - (side - 1) / 2
            distance = (column_of - column_of[:, None] - column).square() + (row_of - row_of[:, None] - row).square()
            expected = (-strength * distance).softmax(dim=-1)
            torch.testing.assert_close(positional[h1 + side * h2], expected)
    assert torch.equal(attention.v.weight, torch.eye(4 * num_heads, dtype=torch.float64))
    assert torch.equal(attention.gating_param, torch.ones(num_heads, dtype=torch.float64))


def test_each_head_looks_at_its_offset_from_every_inner_patch() -> None:
    attention = first_gpsa(build_model("convit_tiny", num_classes=2, image_size=56, **SMALL))
    positional = attention.positional_attention(*offsets(7, 7, torch.float32))
    positional = positional.reshape(3, 3, 7, 7, 49)  # [h2, h1, query]
    for h1 in range(3):
        for h2 in range(3):
            for row in range(1, 6):
                for column in range(1, 6):
                    target = 7 * (row + h1 - 1) + column + h2 - 1
                    assert positional[h2, h1, row, column].argmax().item() == target


def test_every_gpsa_layer_keeps_its_local_init_and_the_others_are_plain() -> None:
    model = build_model("convit_small", num_classes=2, image_size=32)
    gpsa = [isinstance(block.attn, GPSA) for block in model.blocks]
    assert gpsa == [True] * 10 + [False] * 2
    assert all(torch.equal(block.attn.v.weight, torch.eye(432)) for block in model.blocks[:10])


def test_local_init_switched_off_starts_as_random_attention() -> None:
    options = {**SMALL, "num_heads": 6}  # no square is needed then
    attention = first_gpsa(build_model("convit_tiny", num_classes=2, image_size=56, use_local_init=False, **options))
    assert attention.v.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert attention.pos_proj.weight.abs().max().item() < 0.1


@pytest.mark.parametrize("local_up_to_layer", [0, 1, 2])
def test_class_token_joins_before_the_first_plain_block(local_up_to_layer: int) -> None:
    options = {**SMALL, "local_up_to_layer": local_up_to_layer}
    model = build_model("convit_tiny", num_classes=2, image_size=32, **options)
    tokens = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[1]))
    model(torch.randn(1, 3, 32, 32))
    assert tokens == [16] * local_up_to_layer + [17] * (3 - local_up_to_layer)


def test_attention_dropout_acts_on_the_whole_attention() -> None:
    torch.manual_seed(0)
    attention = GPSA(36, 9, attn_drop_rate=0.4).double()
    perturb(attention)
    table, x = offsets(4, 4), torch.randn(2, 16, 36, dtype=torch.float64)
    torch.manual_seed(1)
    ours = attention(x, *table)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(attention.attention_map(x, *table), 0.4)
    value = attention.v(x).view(2, -1, 9, 4).transpose(1, 2)
    torch.testing.assert_close(ours, attention.proj((dropped @ value).transpose(1, 2).flatten(2)))
    mean = attention(x[:1].expand(3000, -1, -1), *table).mean(0, keepdim=True)
    assert relative_error(mean, attention.eval()(x[:1], *table)) < 0.05


def test_positional_attention_is_float32_under_autocast() -> None:
    attention = GPSA(36, 9)
    attention.local_init(1.0)
    table = offsets(14, 14, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        factors = attention.positional_factors(*table)
    for factor, expected in zip(factors, attention.positional_factors(*table), strict=True):
        assert torch.equal(factor, expected) and factor.dtype == torch.float32
    # bfloat16 weights are widened too: the softmax must not be rounded, whatever the weights are stored in.
    assert all(factor.dtype == torch.float32 for factor in attention.bfloat16().positional_factors(*table))


def test_other_and_rectangular_images_use_their_own_grid() -> None:
    torch.manual_seed(0)
    model = build_model("convit_tiny", num_classes=4, image_size=32, **SMALL).eval()
    perturb(model)
    assert isinstance(model, ConViT) and "offset" not in " ".join(model.state_dict())
    seen = []
    first_gpsa(model).register_forward_hook(lambda module, inputs, output: seen.append(inputs[1:]))
    assert model(torch.randn(2, 3, 24, 48)).shape == (2, 4)
    assert all(torch.equal(*pair) for pair in zip(seen[0], offsets(3, 6, torch.float32), strict=True))
    before = model(images := torch.randn(2, 3, 32, 32))
    assert torch.equal(model(images), before)


def test_equals_a_larger_model_whose_positions_are_resized() -> None:
    small = build_model("convit_tiny", num_classes=4, image_size=32, **SMALL).eval()
    perturb(small)
    large = build_model("convit_tiny", num_classes=4, image_size=48, **SMALL).eval()
    weights = small.state_dict()
    grid = weights["pos_embed"].reshape(1, 4, 4, 36).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
    large.load_state_dict({**weights, "pos_embed": grid.flatten(2).transpose(1, 2)})
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(small(images), large(images))
