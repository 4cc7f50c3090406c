"""Stochastic depth that skips the work of the dropped samples, against dropping by a factor of 0."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from vitcomposer.models import build_model, layers
from vitcomposer.models.layers import SUBSET_ABOVE, Block, SelfAttention, add_on_subset, kept_samples

TINY = {"depth": 4, "embed_dim": 48, "num_heads": 4, "patch_size": 8, "drop_path_mode": "constant"}
LOCAL = {"convit_tiny": {"local_up_to_layer": 2}}


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


def tiny(name: str, drop_path_rate: float) -> nn.Module:
    options = {**TINY, **LOCAL.get(name, {})}
    model = build_model(name, num_classes=5, image_size=32, drop_path_rate=drop_path_rate, **options)
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize(
    ("batch", "rate", "kept"),
    [
        (10, 0.4, 6),
        (256, 0.4, 154),
        (16, 0.5, 8),
        (64, 0.3, 45),
        (4, 0.4, None),  # 2 of 4 would be a rate of 0.5
        (1, 0.4, None),
        (256, SUBSET_ABOVE, None),  # too little to skip
        (256, 0.0, None),
    ],
)
def test_kept_samples_follow_the_rate_or_leave_it_to_the_factor(batch: int, rate: float, kept: int | None) -> None:
    assert kept_samples(batch, rate) == kept


@pytest.mark.parametrize("batch", [3, 7, 12, 20, 100, 333])
@pytest.mark.parametrize("rate", [0.15, 0.3, 0.5, 0.8])
def test_share_kept_is_within_five_percent(batch: int, rate: float) -> None:
    kept = kept_samples(batch, rate)
    assert kept is None or 0.95 <= kept / batch / (1 - rate) <= 1.05
    assert kept is not None or batch * (1 - rate) < 10


def test_every_sample_is_kept_equally_often() -> None:
    torch.manual_seed(0)
    draws, batch, kept = 6000, 10, 6
    x = torch.zeros(batch, 1)
    counts = sum(add_on_subset(x, torch.ones_like, kept).ne(0).double() for _ in range(draws))
    share = counts / draws
    spread = (0.6 * 0.4 / draws) ** 0.5
    assert counts.sum().item() == draws * kept
    assert (share - 0.6).abs().max().item() < 4 * spread


def test_expectation_is_the_whole_branch() -> None:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU()).double()
    x = torch.randn(10, 6, dtype=torch.float64)
    with torch.no_grad():
        draws = torch.stack([add_on_subset(x, branch, 7) for _ in range(4000)])
        whole = x + branch(x)
    error = (draws.mean(0) - whole).abs() / (draws.std(0) / 4000**0.5 + 1e-12)
    assert error.max().item() < 5


def test_block_has_the_same_mean_and_spread_as_dropping_by_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(12, 3, qkv_bias=True)
    block = Block(attention, 12, 24, drop_path_rate=0.4).double()
    x = torch.randn(10, 5, 12, dtype=torch.float64)
    results = []
    for above in (SUBSET_ABOVE, 1.0):
        monkeypatch.setattr(layers, "SUBSET_ABOVE", above)
        with torch.no_grad():
            results.append(torch.stack([block(x) for _ in range(800)]))
    subset, factor = results
    error = (subset.mean(0) - factor.mean(0)).abs() / ((subset.var(0) + factor.var(0)) / 800).sqrt()
    assert error.max().item() < 5
    torch.testing.assert_close(subset.std(0).mean(), factor.std(0).mean(), rtol=0.05, atol=0)


def test_only_kept_samples_have_a_gradient_through_the_branch() -> None:
    torch.manual_seed(0)
    x = torch.randn(10, 4, requires_grad=True)
    y = add_on_subset(x, lambda part: 3 * part, 6)
    y.sum().backward()
    kept = y.detach().ne(x.detach()).all(dim=1)
    assert kept.sum().item() == 6 and x.grad is not None
    expected = torch.where(kept, 1 + 3 * 10 / 6, 1.0).unsqueeze(1).expand(-1, 4)
    torch.testing.assert_close(x.grad, expected)


def test_parameters_learn_from_the_kept_samples_alone() -> None:
    torch.manual_seed(0)
    branch, x = nn.Linear(4, 4).double(), torch.randn(10, 4, dtype=torch.float64)
    y = add_on_subset(x, branch, 6)
    y.sum().backward()
    kept = y.detach().ne(x).any(dim=1)
    weight = branch.weight.grad
    assert weight is not None
    torch.testing.assert_close(weight, (10 / 6 * x[kept].sum(0)).expand(4, -1))


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "convit_tiny"])
def test_step_at_rate_04_does_six_tenths_of_the_work(name: str) -> None:
    def flops(rate: float) -> int:
        model = tiny(name, rate)
        with FlopCounterMode(display=False) as counter:
            model(images(10)).sum().backward()
        return counter.get_total_flops()

    # Blocks only shrink: patch embedding and head are whole. 1.5 leaves room for them.
    assert flops(0.0) / flops(0.4) > 1.5


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "deit_tiny_distilled_patch16", "convit_tiny"])
def test_subset_compiles_to_one_graph(name: str) -> None:
    torch.manual_seed(0)
    options = {**TINY, "depth": 2, **({"local_up_to_layer": 1} if name == "convit_tiny" else {})}
    model = build_model(name, num_classes=5, image_size=32, drop_path_rate=0.4, **options)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for _ in range(3):
        outputs = compiled(images(10))
        (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()
    assert counter.frame_count == 1


def test_draws_follow_the_global_generator() -> None:
    model, batch = tiny("vit_tiny_patch16", 0.4), images(10)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(batch))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_evaluation_computes_every_sample() -> None:
    model, batch = tiny("convit_tiny", 0.4), images(10)
    whole = tiny("convit_tiny", 0.0)
    whole.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(batch), whole.eval()(batch))


def test_subset_runs_under_autocast() -> None:
    model = tiny("convit_tiny", 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        model(images(10)).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
