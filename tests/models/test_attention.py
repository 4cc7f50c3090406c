"""Attention maps against a softmax written out, what they make of the values, and the measures taken of them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitcomposer.models import build_model
from vitcomposer.models.attention import (
    BlockAttention,
    attention_map,
    attention_rollout,
    nonlocality,
    observe_attention,
    positional_attention,
    seen_by_output,
)
from vitcomposer.models.transformer import ImageTransformer

SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
LOCAL: dict[str, Any] = {"patch_size": 4, "embed_dim": 36, "depth": 3, "local_up_to_layer": 2}


def network(name: str = "deit_tiny_patch16", **options: Any) -> Any:
    """Every weight away from its start, in float64."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, image_size=16, **{**SMALL, **options})
    assert isinstance(model, ImageTransformer)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double()


def convit(**options: Any) -> Any:
    return network("convit_tiny", local_up_to_layer=2, **options)


def images(height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).double()


def maps_of(model: Any, pictures: Tensor) -> list[BlockAttention]:
    return observe_attention(model, pictures, lambda block: block)


@pytest.mark.parametrize(
    "model", [network(), network("deit_tiny_distilled_patch16"), convit()], ids=["vit", "distilled", "convit"]
)
@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_map_is_a_softmax_that_makes_the_block_s_output(model: Any, size: tuple[int, int]) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.attn.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
        for block in model.blocks
    ]
    blocks = maps_of(model, images(*size))
    for hook in hooks:
        hook.remove()
    assert len(blocks) == len(seen) == 3
    for layer, (found, (x, output)) in enumerate(zip(blocks, seen, strict=True)):
        attention = model.blocks[layer].attn
        batch, tokens, width = x.shape
        assert found.map.shape == (2, 4, tokens, tokens) and found.grid == (size[0] // 4, size[1] // 4)
        assert found.num_prefix_tokens == tokens - size[0] * size[1] // 16
        torch.testing.assert_close(found.map.sum(dim=-1), torch.ones(2, 4, tokens).double())
        local = layer < 2 and hasattr(model.config, "local_up_to_layer")
        assert (found.gate is not None) == local
        projected = attention.v(x) if local else attention.qkv(x)[..., 2 * width :]
        value = projected.reshape(batch, tokens, 4, -1)
        mixed = torch.einsum("bhij,bjhk->bihk", found.map, value).flatten(2)
        torch.testing.assert_close(attention.proj(mixed), output)
        if not local:
            query, key, _ = attention.qkv(x).reshape(batch, tokens, 3, 4, -1).unbind(dim=2)
            scores = torch.einsum("bihk,bjhk->bhij", query, key) / math.sqrt(width / 4)
            torch.testing.assert_close(found.map, scores.exp() / scores.exp().sum(dim=-1, keepdim=True))


def test_nonlocality_equals_a_double_loop() -> None:
    for model in (network(), convit()):
        for block in maps_of(model, images(24, 16)):
            rows, columns = block.grid
            first, count = block.num_prefix_tokens, rows * columns
            expected = torch.zeros(4).double()
            for i in range(count):
                for j in range(count):
                    distance = math.hypot(i // columns - j // columns, i % columns - j % columns)
                    expected += block.map[:, :, first + i, first + j].mean(dim=0) * distance / count
            torch.testing.assert_close(nonlocality(block), expected)


def test_nonlocality_of_known_attention() -> None:
    grid = (3, 3)
    itself = BlockAttention(torch.eye(9).expand(1, 2, 9, 9), grid, 0, None)
    assert nonlocality(itself).tolist() == [0.0, 0.0]
    to_first = torch.zeros(1, 1, 10, 10)
    to_first[..., 1] = 1.0  # every token looks at the patch in the corner, behind the class token
    distances = [math.hypot(i, j) for i in range(3) for j in range(3)]
    found = nonlocality(BlockAttention(to_first, grid, 1, None))
    assert found.item() == pytest.approx(sum(distances) / 9)


def test_local_start_looks_at_its_offsets_with_the_gate_of_one() -> None:
    torch.manual_seed(0)
    model = build_model("convit_tiny", num_classes=5, image_size=32, num_heads=9, **LOCAL)
    assert isinstance(model, ImageTransformer)
    gates = [block.gate for block in observe_attention(model, images(32, 32).float(), lambda block: block)]
    assert [gate is None for gate in gates] == [False, False, True]
    for gate, positions in zip(gates, positional_attention(model, (8, 8)), strict=False):
        torch.testing.assert_close(gate, torch.full((9,), 1 / (1 + math.exp(-1))))
        for head in range(9):
            looked_at = positions[head, 4 * 8 + 4].argmax().item()
            # head = row + 3 column of a 3 x 3 convolution
            assert divmod(looked_at, 8) == (4 + head % 3 - 1, 4 + head // 3 - 1)


def test_rollout_is_the_product_and_the_class_token_joins_as_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [4, 4, 5, 5]
    maps = [torch.rand(2, 3, n, n, generator=generator).double().softmax(dim=-1) for n in sizes]
    found = attention_rollout(maps)
    steps = [m.mean(dim=1) / 2 + torch.eye(m.shape[-1]) / 2 for m in maps]
    before = steps[1] @ steps[0]
    joined = torch.zeros(2, 5, 5).double()
    joined[:, 0, 0], joined[:, 1:, 1:] = 1.0, before
    torch.testing.assert_close(found, steps[3] @ steps[2] @ joined)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 5).double())


def test_output_is_read_from_the_class_token_or_the_mean_of_the_patches() -> None:
    for model, prefix in ((network(), 1), (network("deit_tiny_distilled_patch16"), 2)):
        last = maps_of(model, images())[-1].map
        assert torch.equal(seen_by_output(model, last), last[:, :, 0, prefix:])
    for prefix in (0, 1):
        model = network(pool="avg", class_token=prefix == 1)
        last = maps_of(model, images())[-1].map
        torch.testing.assert_close(seen_by_output(model, last), last[:, :, prefix:, prefix:].mean(dim=2))


def test_looking_changes_neither_modes_nor_random_numbers_nor_outputs() -> None:
    model = network(drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = model(images())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    maps_of(model, images())
    assert torch.equal(torch.get_rng_state(), state) and [module.training for module in model.modules()] == modes
    assert torch.equal(model(images()), before)
    with pytest.raises(RuntimeError, match="stop"):
        observe_attention(model, images(), lambda block: (_ for _ in ()).throw(RuntimeError("stop")))
    assert [module.training for module in model.modules()] == modes
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


def test_half_precision_gives_maps_in_float32() -> None:
    model = network().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = maps_of(model, images().float())
    assert all(block.map.dtype == torch.float32 for block in found)
    assert attention_map(model.blocks[0].attn.bfloat16(), torch.randn(1, 5, 32).bfloat16()).dtype == torch.float32


def test_network_without_attention_is_refused() -> None:
    resnet = build_model("resnet50", num_classes=0, image_size=32)
    with pytest.raises(ValueError, match="must be a ViT, DeiT or ConViT.* got a ResNet.*Choose another"):
        observe_attention(resnet, images(), lambda block: block)
