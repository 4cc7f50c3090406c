"""``run.activation_checkpointing``: the same numbers bit for bit, less memory, one graph, only blocks that learn."""

import dataclasses
import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.conftest import ROOT
from vitcomposer import config
from vitcomposer.cost.estimate import costs_of
from vitcomposer.errors import ConfigError
from vitcomposer.models import build_model
from vitcomposer.models.layers import Block
from vitcomposer.models.transformer import num_recomputed
from vitcomposer.schema import Run
from vitcomposer.training.execution import compile_forward, recompute_activations

TINY = {"patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 4, "num_classes": 5, "image_size": 32}
RANDOM = {"drop_path_rate": 0.3, "drop_path_mode": "constant", "drop_rate": 0.1}
MODELS = {
    "deit_tiny_patch16": {},
    "deit_tiny_distilled_patch16": {"attn_drop_rate": 0.1},
    "convit_tiny": {"local_up_to_layer": 2},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name, **TINY, **RANDOM, **MODELS[name])
    for parameter in model.parameters():  # heads start at zero, and so would all gradients before them
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.train()


def step(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Loss and gradients of 20 images of each of two sizes, as multi-crop has them in one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = [model(torch.randn(20, 3, size, size)) for size in (32, 16)]
    parts = [part for output in outputs for part in (output if isinstance(output, tuple) else (output,))]
    loss = sum((part.square().mean() for part in parts), torch.zeros(()))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "next draw": torch.rand(3), **gradients}


def blocks_of(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_losses_and_gradients_stay_bit_for_bit(name: str, share: float) -> None:
    """With stochastic depth on a subset of the samples and dropout, which are drawn again in the backward pass."""
    model = build(name)
    expected = step(model)
    recompute_activations(nn.Sequential(model), share)
    assert [block.recompute for block in blocks_of(model)] == ([True] * 3 if share == 1 else [True, False, False])
    found = step(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert not torch.equal(step(model, seed=2)["loss"], expected["loss"])


def kept_bytes(model: nn.Module, images: Tensor) -> int:
    """Of what the forward pass keeps for the backward one, weights aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(images)
    del output
    return sum(kept.values())


def test_blocks_keep_their_input_alone() -> None:
    model = build_model("deit_tiny_patch16", **{**TINY, "depth": 6}, drop_path_rate=0.0).train()
    images = torch.randn(8, 3, 32, 32)
    whole = kept_bytes(model, images)
    recompute_activations(nn.Sequential(model), 0.5)
    half = kept_bytes(model, images)
    recompute_activations(nn.Sequential(model), 1.0)
    none = kept_bytes(model, images)
    of_input = 8 * 17 * 48 * 4
    assert whole - half == pytest.approx(half - none, rel=0.02)
    # What is left: the inputs of the blocks, and what patches, norm and head keep.
    assert 6 * of_input <= none < whole / 4


def test_evaluation_and_frozen_blocks_are_left_alone() -> None:
    model = build("deit_tiny_patch16")
    model.freeze_below(1)  # type: ignore[operator]
    recompute_activations(nn.Sequential(model), 1.0)
    assert [block.recompute for block in blocks_of(model)] == [False, False, True]
    with torch.no_grad():
        assert kept_bytes(model.eval(), torch.randn(2, 3, 32, 32)) == 0


@pytest.mark.parametrize(
    ("share", "blocks", "count"), [(0.0, 12, 0), (1.0, 12, 12), (0.01, 12, 1), (0.5, 12, 6), (1, 0, 0)]
)
def test_share_of_the_blocks(share: float, blocks: int, count: int) -> None:
    assert num_recomputed(share, blocks) == count


@pytest.mark.parametrize("network", [nn.Linear(2, 2), build_model("deit_tiny_patch16", **TINY).requires_grad_(False)])
def test_network_without_a_block_that_learns_is_refused(network: nn.Module) -> None:
    with pytest.raises(ConfigError, match="run.activation_checkpointing must be 0 where no transformer block learns"):
        recompute_activations(nn.Sequential(network), 1.0)


def test_share_above_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run.activation_checkpointing must be in \[0, 1\], got 2.0"):
        Run(name="x", activation_checkpointing=2.0)


@pytest.fixture
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Listening to torch's trace of its own compiler takes longer than the compiler.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_forward_is_one_graph_for_each_size(without_graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = build("convit_tiny")
    expected = step(model)
    recompute_activations(nn.Sequential(model), 1.0)
    compile_forward(model)
    found = step(model)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_plan_estimates_the_memory_that_is_left(tmp_path) -> None:
    cfg = config.load(ROOT / "yamls/vit_b.yaml")

    def activations(share: float, train_blocks: int | None = None) -> float:
        run = dataclasses.replace(cfg.run, activation_checkpointing=share)
        init = dataclasses.replace(cfg.init, train_blocks=train_blocks)
        changed = dataclasses.replace(cfg, run=run, init=init)
        costs = costs_of(changed, gpu="h100", gpus=8, images=1_281_167, results=tmp_path)
        return costs["memory_estimate"]["activations"]

    whole = activations(0.0)
    # Of 12 blocks of 34 bytes: one, and 12 inputs of 4; six, and 6 inputs.
    assert activations(1.0) == pytest.approx(whole * (34 + 12 * 4) / (12 * 34))
    assert activations(0.5) == pytest.approx(whole * (6 * 34 + 6 * 4) / (12 * 34))
