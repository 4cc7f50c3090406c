"""The split form of gated positional self-attention against equations 6 and 7 of arXiv:2103.10697, and its memory."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vitcomposer.models.convit import GPSA
from vitcomposer.models.positions import axis_offsets


def offsets(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    device = torch.device("cpu")
    return axis_offsets(rows, device=device, dtype=dtype), axis_offsets(columns, device=device, dtype=dtype)


def random_gpsa(width: int, heads: int, dtype: torch.dtype) -> GPSA:
    """Local start, then every weight moved and every gate somewhere in -2 to 4."""
    attention = GPSA(width, heads).to(dtype)
    attention.local_init(1.0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        attention.gating_param.uniform_(-2.0, 4.0)
    return attention


def explicit(attention: GPSA, x: Tensor, rows: int, columns: int) -> Tensor:
    """The paper word for word: N x N relative positions through ``pos_proj``, the gated sum, its row sum, values."""
    batch, tokens, width = x.shape
    heads = attention.num_heads
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    dx, dy = column - column[:, None], row - row[:, None]
    relative = torch.stack((dx, dy, dx.square() + dy.square()), dim=-1).to(x.dtype)  # (N, N, 3)
    query, key, value = (
        part.reshape(batch, tokens, heads, -1).transpose(1, 2)
        for part in (*attention.qk(x).chunk(2, dim=-1), attention.v(x))
    )
    content = (query @ key.transpose(-2, -1) / (width // heads) ** 0.5).softmax(dim=-1)
    positional = attention.pos_proj(relative).permute(2, 0, 1).softmax(dim=-1)
    gate = attention.gating_param.sigmoid().view(-1, 1, 1)
    weights = (1 - gate) * content + gate * positional
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return attention.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))


def outputs_and_gradients(attention: GPSA, x: Tensor, direction: Tensor, output: Tensor) -> dict[str, Tensor]:
    # The true gradient of pos_proj.bias is zero: the softmax cancels it.
    names = {name: p for name, p in attention.named_parameters() if name != "pos_proj.bias"} | {"x": x}
    gradients = torch.autograd.grad((output * direction).sum(), list(names.values()))
    return {"output": output, **dict(zip(names, gradients, strict=True))}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.mark.parametrize("grid", [(6, 6), (10, 10), (14, 14), (24, 24), (6, 24)])  # 96, 160, 224, 384 and 96 x 384 px
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_split_form_equals_the_explicit_one_with_every_gradient(
    grid: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(sum(grid))
    attention = random_gpsa(72, 9, dtype)
    x = torch.randn(2, grid[0] * grid[1], 72, dtype=dtype, requires_grad=True)
    direction = torch.randn_like(x)
    ours = outputs_and_gradients(attention, x, direction, attention(x, *offsets(*grid, dtype)))
    attention, x = attention.double(), x.detach().double().requires_grad_()
    expected = outputs_and_gradients(attention, x, direction.double(), explicit(attention, x, *grid))
    for name, value in ours.items():
        assert relative_error(value, expected[name]) < tolerance, name


def test_attention_map_is_the_explicit_attention() -> None:
    torch.manual_seed(0)
    attention = random_gpsa(36, 9, torch.float64)
    x, table = torch.randn(3, 21, 36, dtype=torch.float64), offsets(3, 7, torch.float64)
    weights = attention.attention_map(x, *table)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 9, 21, dtype=torch.float64))
    value = attention.v(x).view(3, 21, 9, 4).transpose(1, 2)
    ours = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, explicit(attention, x, 3, 7), rtol=1e-12, atol=1e-12)


def test_split_form_passes_gradcheck() -> None:
    torch.manual_seed(0)
    attention = random_gpsa(8, 4, torch.float64)
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    inputs = (x, attention.v.weight, attention.pos_proj.weight, attention.gating_param)
    assert torch.autograd.gradcheck(lambda x, *_: attention(x, *offsets(2, 3, torch.float64)), inputs)


def test_no_tensor_of_tokens_by_tokens_is_allocated() -> None:
    batch, side, heads, width = 4, 14, 4, 64
    attention, table = GPSA(width, heads), offsets(side, side, torch.float32)
    x = torch.randn(batch, side * side, width, requires_grad=True)
    attention(x, *table).sum().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        attention(x, *table).sum().backward()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    # Every block that the allocator hands out, inside of kernels too.
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    tokens = side * side
    assert 4 * batch * tokens * 2 * width <= largest  # the profiler does see query and key
    assert largest < 4 * heads * tokens * tokens  # nor is one P for the batch


def test_positional_factors_hold_no_denormal_number() -> None:
    attention = GPSA(144, 9)
    attention.local_init(1.0)
    for factor in attention.positional_factors(*offsets(24, 24, torch.float32)):
        assert factor[factor > 0].min().item() >= 1e-30
        torch.testing.assert_close(factor.sum(-1), torch.ones(9, 24))
