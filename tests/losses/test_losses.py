"""Losses against timm and closed forms, in float64 where the loss allows it."""

import pytest
import torch
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import SoftTargetCrossEntropy

from vitcomposer.losses import LogitAdjustedCrossEntropy, binary_cross_entropy, soft_target_cross_entropy

BATCH, CLASSES = 6, 9


def soft_targets(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Two classes per image with shares of 0.3 and 0.7, as CutMix leaves them."""
    first, second = torch.arange(BATCH) % CLASSES, (torch.arange(BATCH) + 4) % CLASSES
    one_hot = torch.nn.functional.one_hot
    return (0.3 * one_hot(first, CLASSES) + 0.7 * one_hot(second, CLASSES)).to(dtype)


def random_logits(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(BATCH, CLASSES, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("ours", "timms"),
    [
        (soft_target_cross_entropy, SoftTargetCrossEntropy()),
        (binary_cross_entropy, BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)),
    ],
)
def test_loss_and_gradient_equal_timm(ours, timms):
    mine, theirs = random_logits().requires_grad_(), random_logits().requires_grad_()
    loss, reference = ours(mine, soft_targets()), timms(theirs, soft_targets())
    torch.testing.assert_close(loss, reference, rtol=1e-13, atol=0)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [soft_target_cross_entropy, binary_cross_entropy])
def test_gradient_equals_finite_differences(loss):
    assert torch.autograd.gradcheck(lambda logits: loss(logits, soft_targets()), random_logits().requires_grad_())


def test_soft_target_gradient_is_softmax_minus_target_over_batch():
    logits = random_logits().requires_grad_()
    soft_target_cross_entropy(logits, soft_targets()).backward()
    torch.testing.assert_close(logits.grad, (logits.detach().softmax(-1) - soft_targets()) / BATCH)


def test_soft_target_on_one_hot_targets_equals_cross_entropy():
    labels = torch.arange(BATCH) % CLASSES
    one_hot = torch.nn.functional.one_hot(labels, CLASSES).double()
    expected = torch.nn.functional.cross_entropy(random_logits(), labels)
    torch.testing.assert_close(soft_target_cross_entropy(random_logits(), one_hot), expected)


def test_soft_target_at_zero_logits_is_log_of_classes():
    loss = soft_target_cross_entropy(torch.zeros(BATCH, CLASSES), soft_targets(torch.float32))
    assert loss.item() == pytest.approx(torch.tensor(float(CLASSES)).log().item(), rel=1e-6)


def test_binary_cross_entropy_ignores_how_much_above_zero():
    binarised = (soft_targets() > 0).double()
    assert torch.equal(
        binary_cross_entropy(random_logits(), soft_targets()), binary_cross_entropy(random_logits(), binarised)
    )


def test_binary_cross_entropy_takes_smoothed_targets_for_all_present():
    smoothed = 0.9 * soft_targets() + 0.1 / CLASSES
    everything = torch.ones(BATCH, CLASSES, dtype=torch.float64)
    assert torch.equal(
        binary_cross_entropy(random_logits(), smoothed), binary_cross_entropy(random_logits(), everything)
    )


@pytest.mark.parametrize("loss", [soft_target_cross_entropy, binary_cross_entropy])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(loss, dtype):
    half = random_logits(torch.float32).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(half, soft_targets(torch.float32))
    assert result.dtype == torch.float32
    assert torch.equal(result, loss(half.float(), soft_targets(torch.float32)))


@pytest.mark.parametrize("loss", [soft_target_cross_entropy, binary_cross_entropy])
def test_large_logits_stay_finite(loss):
    logits = (1e4 * random_logits(torch.float32)).requires_grad_()
    result = loss(logits, soft_targets(torch.float32))
    result.backward()
    assert result.isfinite() and logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_logit_adjustment_is_equation_10_of_its_paper(tau: float) -> None:
    """arXiv:2007.07314, in float64, with soft targets too; its gradient is that of the probabilities."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([200, 10, 0, 37])
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    targets = torch.cat([torch.eye(4, dtype=torch.float64)[[0, 1, 3]], targets[3:] / targets[3:].sum(1, keepdim=True)])
    shares = torch.tensor([200, 10, 1, 37], dtype=torch.float64) / 248  # a class without any counts as if it had one
    odds = logits.detach().exp() * shares**tau
    expected = -(targets * (odds / odds.sum(1, keepdim=True)).log()).sum(1).mean()
    loss = LogitAdjustedCrossEntropy(counts, tau)(logits, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    torch.testing.assert_close(logits.grad, (odds / odds.sum(1, keepdim=True) - targets) / 6, rtol=1e-12, atol=1e-15)


def test_logit_adjustment_of_0_is_cross_entropy_and_half_precision_is_computed_in_float32() -> None:
    logits, targets = torch.randn(5, 3), torch.eye(3)[[0, 1, 2, 0, 1]]
    counts = torch.tensor([1000, 10, 1])
    assert torch.equal(
        LogitAdjustedCrossEntropy(counts, 0.0)(logits, targets), soft_target_cross_entropy(logits, targets)
    )
    half = LogitAdjustedCrossEntropy(counts, 1.0)(logits.bfloat16(), targets)
    assert half.dtype == torch.float32
    assert torch.equal(half, LogitAdjustedCrossEntropy(counts, 1.0)(logits.bfloat16().float(), targets))
    assert LogitAdjustedCrossEntropy(counts, 1.0).state_dict() == {}
