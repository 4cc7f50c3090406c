"""Linear layers by oneDNN: the numbers of nn.Linear, also in gradients, compiled, recomputed and without gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitcomposer.models import cpu_linear
from vitcomposer.models.cpu_linear import SMALLEST_PRODUCT, CPULinear, speed_up_linears

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of PyTorch has no oneDNN",
)


@pytest.fixture(autouse=True)
def taken_for_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor that runs the tests may be one on which nothing changes."""
    monkeypatch.setattr(cpu_linear, "ONEDNN_IS_FASTER", True)


def gradients(layer: nn.Linear, x: Tensor) -> list[Tensor]:
    """Output, and gradients of a sum that weighs all outputs differently."""
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    found = [out.detach(), x.grad, layer.weight.grad, None if layer.bias is None else layer.bias.grad]
    return [tensor for tensor in found if tensor is not None]


def by_onednn(layer: nn.Linear) -> nn.Linear:
    changed = copy.deepcopy(layer)
    speed_up_linears(changed)
    assert type(changed) is CPULinear
    return changed


def gradient_of(layer: nn.Linear) -> Tensor:
    assert layer.weight.grad is not None
    return layer.weight.grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 197, 64), (600, 64), (2, 5, 61, 64)])
def test_outputs_and_gradients_are_as_close_to_float64_as_those_of_pytorch(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 96, bias=bias), torch.randn(shape)
    assert x.numel() * 96 >= SMALLEST_PRODUCT
    exact = gradients(copy.deepcopy(layer).double(), x.double())
    plain, ours = gradients(copy.deepcopy(layer), x), gradients(by_onednn(layer), x)
    assert len(ours) == len(exact) == (4 if bias else 3)
    for mine, theirs, reference in zip(ours, plain, exact, strict=True):
        error, usual = ((tensor - reference).abs().max().item() for tensor in (mine, theirs))
        assert mine.shape == reference.shape
        assert error <= 3 * usual + 1e-6 * reference.abs().max().item()


def test_a_product_goes_through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[tuple[int, ...]] = []
    true = cpu_linear._multiply
    monkeypatch.setattr(cpu_linear, "_multiply", lambda x, w, b: (products.append(tuple(w.shape)), true(x, w, b))[1])
    gradients(by_onednn(nn.Linear(64, 96)), torch.randn(600, 64))
    assert products == [(96, 64), (64, 96), (64, 600)]


@pytest.mark.parametrize("x", [torch.randn(4, 64), torch.randn(600, 64, dtype=torch.float64), torch.randn(0, 64)])
def test_small_products_and_other_types_are_pytorchs_own(x: Tensor) -> None:
    layer = nn.Linear(64, 96).to(x.dtype)
    for mine, theirs in zip(gradients(by_onednn(layer), x), gradients(layer, x), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("x", [torch.randn(64, 40, 30).permute(2, 1, 0), torch.randn(600, 3, 64)[:, 0]])
def test_operands_with_gaps_are_made_dense(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, true = nn.Linear(64, 96), cpu_linear._multiply

    def of_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert all(t.is_contiguous() or t.t().is_contiguous() for t in (x.flatten(0, -2), weight))
        return true(x, weight, bias)

    monkeypatch.setattr(cpu_linear, "_multiply", of_dense)
    for mine, theirs in zip(gradients(by_onednn(layer), x), gradients(layer, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_gradient_that_one_number_stands_for() -> None:
    """What ``sum`` gives: a view of one number, with strides of 0."""
    layer, x = nn.Linear(64, 96), torch.randn(600, 64)
    changed = by_onednn(layer)
    changed(x).sum().backward()
    torch.testing.assert_close(gradient_of(changed), x.sum(dim=0).expand(96, -1), rtol=1e-4, atol=1e-4)


def test_what_does_not_learn_has_no_gradient() -> None:
    layer = by_onednn(nn.Linear(64, 96))
    layer.weight.requires_grad_(False)
    x = torch.randn(600, 64)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((96,), 600.0))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_recomputed_activations_give_the_same_bits() -> None:
    layer, x = by_onednn(nn.Linear(64, 96)), torch.randn(600, 64, requires_grad=True)
    layer(x).square().sum().backward()
    kept = gradient_of(layer).clone()
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(gradient_of(layer), kept)


def test_names_of_parameters_stay_and_other_layers_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(4, 4), Special(4, 4), nn.Conv2d(3, 4, 1))
    names, weight = list(network.state_dict()), network[0].weight
    speed_up_linears(network)
    assert list(network.state_dict()) == names and network[0].weight is weight
    assert [type(layer) for layer in network] == [CPULinear, Special, nn.Conv2d]


def test_a_processor_on_which_pytorch_is_as_fast_keeps_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "ONEDNN_IS_FASTER", False)
    network = nn.Sequential(nn.Linear(4, 4))
    speed_up_linears(network)
    assert type(network[0]) is nn.Linear


@pytest.mark.slow
def test_one_graph_without_breaks() -> None:
    layer = by_onednn(nn.Linear(64, 96))
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(600, 64, requires_grad=True)
    compiled(x).square().sum().backward()
    found = gradient_of(layer).clone()
    layer.zero_grad()
    layer(x).square().sum().backward()
    torch.testing.assert_close(found, gradient_of(layer), rtol=1e-4, atol=1e-4)
