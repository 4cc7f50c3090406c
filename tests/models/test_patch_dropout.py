"""Patch dropout: a random subset of the patches enters the blocks in training."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from vitcomposer.models import build_model
from vitcomposer.models.vit import VisionTransformer

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 4, "patch_size": 8}
NAMES = [("vit_tiny_patch16", 1), ("deit_tiny_distilled_patch16", 2), ("deit3_small_patch16", 1)]


def tiny(name: str = "vit_tiny_patch16", **options: object) -> VisionTransformer:
    model = build_model(name, num_classes=5, image_size=32, **TINY, **options)
    assert isinstance(model, VisionTransformer)
    return model


def embedded_whole(model: VisionTransformer, images: Tensor) -> Tensor:
    kept, model.num_patches_kept = model.num_patches_kept, None
    tokens = model.embed(images)
    model.num_patches_kept = kept
    return tokens


@pytest.mark.parametrize(("name", "prefix"), NAMES)
def test_prefix_stays_and_each_sample_keeps_that_many_patches(name: str, prefix: int) -> None:
    torch.manual_seed(0)
    model, images = tiny(name), torch.randn(3, 3, 32, 32)
    model.num_patches_kept = 5
    tokens, whole = model.embed(images), embedded_whole(model, images)
    assert tokens.shape == (3, prefix + 5, 48)
    assert torch.equal(tokens[:, :prefix], whole[:, :prefix])
    subsets = []
    for sample in range(3):
        matches = (tokens[sample, prefix:, None] == whole[sample, None, prefix:]).all(dim=-1)
        # Every kept token is one patch with its own position, and none is there twice.
        assert torch.equal(matches.sum(dim=1), torch.ones(5, dtype=torch.int64)) and matches.sum(dim=0).max() == 1
        subsets.append(matches.any(dim=0))
    assert not torch.equal(subsets[0], subsets[1]) or not torch.equal(subsets[0], subsets[2])


def test_model_without_class_token_drops_too() -> None:
    model = tiny(class_token=False, pool="avg")
    model.num_patches_kept = 4
    assert model.embed(torch.randn(2, 3, 32, 32)).shape == (2, 4, 48)


def test_every_patch_is_kept_equally_often() -> None:
    torch.manual_seed(0)
    model = tiny()
    model.num_patches_kept = 6
    with torch.no_grad():
        model.pos_embed[0, 1:] = torch.arange(16.0).unsqueeze(1) + 1  # tokens say which patch they are
        model.patch_embed.proj.weight.zero_()
        tokens = model.embed(torch.zeros(8000, 3, 32, 32))[:, 1:, 0]
    share = (tokens.round().long() - 1).flatten().bincount(minlength=16) / 8000
    assert share.sum().item() == pytest.approx(6)
    assert (share - 6 / 16).abs().max().item() < 4 * (6 / 16 * 10 / 16 / 8000) ** 0.5


@pytest.mark.parametrize("kept", [None, 16, 100])
def test_keeping_all_changes_nothing(kept: int | None) -> None:
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    expected = model.embed(images)
    model.num_patches_kept = kept
    assert torch.equal(model.embed(images), expected)


def test_evaluation_keeps_all() -> None:
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    expected = model.eval()(images)
    model.num_patches_kept = 3
    assert torch.equal(model(images), expected)


def test_each_level_compiles_to_one_graph() -> None:
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for level, kept in enumerate((4, 8, 12), start=1):
        model.num_patches_kept = kept
        for _ in range(2):
            compiled(images).sum().backward()
        assert counter.frame_count == level
