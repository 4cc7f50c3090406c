"""Optimizers, clipping and a ResNet on shares of tensors on two ranks: what they do to whole tensors, in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from composer.core import Event
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.gloo_ranks import on_ranks
from vitcomposer.algorithms.gradient_clipping import ParameterGradientClipping
from vitcomposer.models import build_model
from vitcomposer.optim import build_optimizer
from vitcomposer.schema import Optimizer
from vitcomposer.training.execution import BLOCKS, BY_NORM, CLIPPED, HAS_NORMS, SHAREABLE

RANKS, STEPS = 2, 3
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


def resnet_trained(shared: bool) -> list[Tensor]:
    """Norms of the weights of a ResNet, whose batch norms know the images of their rank alone, after some steps."""
    torch.manual_seed(0)
    network = build_model("resnet18", num_classes=5, image_size=32).double()
    batches = [(torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(5, (4,))) for _ in range(RANKS)]
    if shared:
        for block in [module for module in network.modules() if isinstance(module, BLOCKS)]:
            fully_shard(block)
        fully_shard(network)  # in float64 it takes the mean over the ranks by itself, with gloo too
        batches = [batches[dist.get_rank()]]
    chosen = Optimizer(name="sgd", lr=0.1, lr_batch_size=16, lr_scaling="none", weight_decay=0.05)
    optimizer = build_optimizer(network, chosen, global_train_batch_size=16)
    for _ in range(STEPS):
        losses = [nn.functional.cross_entropy(network(images), labels) for images, labels in batches]
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(parameter.detach()).norm()[None] for parameter in network.parameters()]


def every_case(shared: bool) -> dict[str, list[Tensor]]:
    steps = {case: stepped(shared, *chosen) for case, chosen in OPTIMIZERS.items()}
    return {**steps, **{kind: clipped(shared, kind) for kind in CLIPPED}, "resnet": resnet_trained(shared)}


def on_this_rank() -> dict[str, list[Tensor]]:
    return every_case(shared=True)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    return on_ranks(on_this_rank, RANKS, tmp_path_factory.mktemp("shares"))


@pytest.fixture(scope="module")
def of_one() -> dict[str, list[Tensor]]:
    return every_case(shared=False)


def test_every_allowed_optimizer_is_compared() -> None:
    assert {name for name, _ in OPTIMIZERS.values()} == set(SHAREABLE)


@pytest.mark.parametrize("case", [*OPTIMIZERS, *CLIPPED, "resnet"])
def test_shares_get_what_whole_tensors_get(
    case: str, of_ranks: list[dict[str, list[Tensor]]], of_one: dict[str, list[Tensor]]
) -> None:
    if case in OPTIMIZERS:
        start = [parameter.detach() for parameter in Weights().parameters()]
        assert not any(torch.equal(a, b) for a, b in zip(start, of_one[case], strict=True))
    for of_rank in of_ranks:
        for found, expected in zip(of_rank[case], of_one[case], strict=True):
            # Norms of shares are rounded to float32 by torch 2.7.
            torch.testing.assert_close(found, expected, rtol=1e-9 if HAS_NORMS else 1e-6, atol=1e-12)
