"""Optimizers, clipping and networks on shares of tensors on two ranks: what they do to whole tensors, in float64."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from composer.core import Event
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.gloo_ranks import on_ranks
from vitcomposer.algorithms.gradient_clipping import ParameterGradientClipping
from vitcomposer.models import build_model
from vitcomposer.models.trunks import blocks_in
from vitcomposer.optim import build_optimizer
from vitcomposer.schema import Optimizer
from vitcomposer.tasks import Head, LinearProbeTask
from vitcomposer.training.execution import (
    BY_NORM,
    CLIPPED,
    HAS_NORMS,
    SHAREABLE,
    compile_networks,
    recompute_activations,
)

RANKS, STEPS = 2, 3
TINY = {"image_size": 32, "patch_size": 8, "depth": 2}
# Of LAMB and LARS the kernels over all tensors, which GPUs take, and those for each by itself.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ("adamw", "sgd")} | {
    f"{name} {'all' if foreach else 'each'}": (name, {"foreach": foreach})
    for name in BY_NORM
    if name in SHAREABLE
    for foreach in (False, True)
}


class Weights(nn.Module):
    """Parameters that two ranks share unevenly, the first not at all."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"token": (1, 1, 8), "weight": (5, 4), "kernel": (6, 3, 2, 2), "bias": (7,)}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, nn.Parameter(value))

    def no_weight_decay(self) -> set[str]:
        return {"token"}


def weights(shared: bool) -> nn.Module:
    module: Any = Weights()
    return fully_shard(module) if shared else module


def set_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
        parameter.grad = grad  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def stepped(shared: bool, name: str, options: dict[str, Any]) -> list[Tensor]:
    module = weights(shared)
    chosen = Optimizer(name=name, lr=0.1, lr_batch_size=16, lr_scaling="none", weight_decay=0.05, options=options)
    optimizer = build_optimizer(module, chosen, global_train_batch_size=16)
    for step in range(STEPS):
        set_gradients(module, step)
        optimizer.step()
    return [whole(parameter.detach()) for parameter in module.parameters()]


def clipped(shared: bool, kind: str) -> list[Tensor]:
    module: Any = weights(shared)
    set_gradients(module, 0)
    state: Any = SimpleNamespace(model=module, fsdp_config_version=2 if shared else 0)
    logger: Any = None
    ParameterGradientClipping(kind, 0.5).apply(Event.AFTER_TRAIN_BATCH, state, logger)
    return [whole(parameter.grad) for parameter in module.parameters()]


def resnet() -> nn.Module:
    """Whose batch norms know the images of their rank alone."""
    return build_model("resnet18", num_classes=5, image_size=32)


def convit() -> nn.Module:
    network = build_model("convit_tiny", **TINY, num_classes=5, local_up_to_layer=1)
    recompute_activations(nn.Sequential(network), 0.5)
    return network


def probe() -> nn.Module:
    """Two classifiers on a trunk that does not learn, one behind a batch norm without parameters."""
    heads = [Head("lastCLS", 1.0, False), Head("concatCLS2", 1.0, True)]
    return LinearProbeTask(build_model("deit_tiny_patch16", **TINY, num_classes=0), heads, num_classes=5)


NETWORKS = (resnet, convit, probe)


def share(module: nn.Module) -> None:
    """As Composer does with what ``share_blocks`` gives it."""
    for block in blocks_in(module):
        fully_shard(block)
    for network in module.children() if isinstance(module, LinearProbeTask) else [module]:
        fully_shard(network)  # in float64 it takes the mean over the ranks by itself, with gloo too


def loss_of(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    if isinstance(module, LinearProbeTask):
        batch = {"image": images, "label": labels}
        return module.loss(module(batch), batch)
    return nn.functional.cross_entropy(module(images), labels)


def trained(make: Callable[[], nn.Module], shared: bool, *, compiled: bool = False) -> list[Tensor]:
    """Norms of the weights after some steps, and a transformer's loss in evaluation.

    Args:
        compiled: Where it is shared; that of one rank is eager.
    """
    torch.manual_seed(0)
    module = make().double().train()
    batches = [(torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(5, (4,))) for _ in range(RANKS)]
    mine = [batches[dist.get_rank()]] if shared else batches
    if shared:
        share(module)
        if compiled:
            compile_networks([module], shared=True)
    chosen = Optimizer(name="sgd", lr=0.1, lr_batch_size=16, lr_scaling="none", weight_decay=0.05)
    optimizer = build_optimizer(module, chosen, global_train_batch_size=16)
    for _ in range(STEPS):
        torch.stack([loss_of(module, *batch) for batch in mine]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    norms = [whole(parameter.detach()).norm()[None] for parameter in module.parameters()]
    if make is not convit:  # batch norms of one rank have seen other images than those of two
        return norms
    with torch.no_grad():
        return [*norms, loss_of(module.eval(), *batches[0])[None]]


def every_case(shared: bool) -> dict[str, list[Tensor]]:
    steps = {case: stepped(shared, *chosen) for case, chosen in OPTIMIZERS.items()}
    norms = {make.__name__: trained(make, shared, compiled=make is convit) for make in NETWORKS}
    return {**steps, **{kind: clipped(shared, kind) for kind in CLIPPED}, **norms}


def graphs_alone() -> Any:
    """Within it what is compiled becomes graphs that run as such."""
    return mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager"))


def on_this_rank() -> dict[str, list[Tensor]]:
    with graphs_alone():
        return {**every_case(shared=True), "graphs": [torch.tensor(counters["stats"]["unique_graphs"])]}


def compiled_resnet() -> list[Tensor]:
    with graphs_alone():
        return trained(resnet, shared=True, compiled=True)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    return on_ranks(on_this_rank, RANKS, tmp_path_factory.mktemp("shares"))


@pytest.fixture(scope="module")
def of_one() -> dict[str, list[Tensor]]:
    return every_case(shared=False)


def test_each_kind_of_block_was_a_graph_in_training_and_one_in_evaluation(
    of_ranks: list[dict[str, list[Tensor]]],
) -> None:
    """A local block whose activations are computed again, and a global one."""
    assert [of_rank["graphs"][0].item() for of_rank in of_ranks] == [4, 4]


def test_every_allowed_optimizer_is_compared() -> None:
    assert {name for name, _ in OPTIMIZERS.values()} == set(SHAREABLE)


@pytest.mark.parametrize("case", [*OPTIMIZERS, *CLIPPED, *(make.__name__ for make in NETWORKS)])
def test_shares_get_what_whole_tensors_get(
    case: str, of_ranks: list[dict[str, list[Tensor]]], of_one: dict[str, list[Tensor]]
) -> None:
    if case in OPTIMIZERS:
        start = [parameter.detach() for parameter in Weights().parameters()]
        assert not any(torch.equal(a, b) for a, b in zip(start, of_one[case], strict=True))
    # Norms of shares are rounded to float32 by torch 2.7.
    tolerance = 1e-9 if HAS_NORMS or case in [make.__name__ for make in NETWORKS] else 1e-6
    for of_rank in of_ranks:
        for found, expected in zip(of_rank[case], of_one[case], strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-12)


@pytest.mark.slow
def test_compiled_resnet_on_shares_takes_the_steps_of_an_eager_one(tmp_path: Path) -> None:
    expected = trained(resnet, shared=False)
    for found in on_ranks(compiled_resnet, RANKS, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
