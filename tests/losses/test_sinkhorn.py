"""Sinkhorn against a float64 reference written from the equations (arXiv:2006.09882, eq. 3 to 5)."""

import math

import pytest
import torch
from torch import Tensor

from vitcomposer.losses import sinkhorn

SAMPLES, PROTOTYPES = 24, 10


def reference(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Q = diag(u) exp(C^T Z / epsilon) diag(v): all prototypes get 1 / K, then all samples 1 / B, in turns."""
    q = (scores.double().T / epsilon).exp()  # (K, B)
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / len(q)
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q / q.sum(dim=0)).T


def cosines(dtype: torch.dtype = torch.float64) -> Tensor:
    """Scores in [-1, 1] that reach both ends."""
    scores = torch.rand(SAMPLES, PROTOTYPES, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores[0, 0], scores[1, 1] = 1.0, -1.0
    return scores.to(dtype)


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.03])
def test_codes_equal_the_equations(epsilon, iterations):
    expected = reference(cosines(), epsilon, iterations)
    torch.testing.assert_close(sinkhorn(cosines(), epsilon=epsilon, iterations=iterations), expected)
    single = sinkhorn(cosines(torch.float32), epsilon=epsilon, iterations=iterations)
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.double(), reference(cosines(torch.float32), epsilon, iterations), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("iterations", [1, 3])
def test_every_sample_sums_to_one(iterations):
    codes = sinkhorn(cosines(torch.float32), epsilon=0.05, iterations=iterations)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(SAMPLES), atol=1e-6, rtol=0)
    assert (codes >= 0).all()


def test_prototypes_share_alike_after_many_iterations_and_not_after_one():
    share = SAMPLES / PROTOTYPES
    after_many = sinkhorn(cosines(), epsilon=0.05, iterations=2000).sum(dim=0)
    torch.testing.assert_close(after_many, torch.full((PROTOTYPES,), share, dtype=torch.float64))
    after_one = sinkhorn(cosines(), epsilon=0.05, iterations=1).sum(dim=0)
    assert (after_one - share).abs().max() > 0.05 * share


@pytest.mark.parametrize("epsilon", [0.03, 0.005])
def test_worst_cosines_in_float32_equal_float64(epsilon):
    scores = cosines(torch.float32)
    scores[2] = -1.0  # far from every prototype: exp(-2 / 0.005) is 0 in float32 beside the best
    scores[:, 3] = -1.0  # a prototype that nobody is near
    codes = sinkhorn(scores, epsilon=epsilon, iterations=3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.double(), reference(scores, epsilon, 3), atol=2e-4, rtol=0)


@pytest.mark.parametrize("epsilon", [0.03, 0.005])
def test_extreme_scores_stay_finite(epsilon):
    scores = 1e4 * cosines(torch.float32)
    codes = sinkhorn(scores, epsilon=epsilon, iterations=20)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(SAMPLES), atol=1e-5, rtol=0)


def test_shifted_scores_have_the_same_codes():
    expected = sinkhorn(cosines(), epsilon=0.05, iterations=3)
    torch.testing.assert_close(sinkhorn(cosines() + 7.0, epsilon=0.05, iterations=3), expected)
    by_prototype = cosines() + torch.arange(PROTOTYPES) / PROTOTYPES
    torch.testing.assert_close(sinkhorn(by_prototype, epsilon=0.05, iterations=3), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_computed_in_float32(dtype):
    half = cosines().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sinkhorn(half, epsilon=0.05, iterations=3)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, sinkhorn(half.float(), epsilon=0.05, iterations=3))


def test_codes_have_no_gradient():
    assert not sinkhorn(cosines().requires_grad_(), epsilon=0.05, iterations=3).requires_grad


def test_equal_scores_give_uniform_codes():
    codes = sinkhorn(torch.zeros(4, 5), epsilon=0.05, iterations=3)
    assert codes == pytest.approx(torch.full((4, 5), 1 / 5)) and math.isclose(codes.sum().item(), 4, rel_tol=1e-6)
