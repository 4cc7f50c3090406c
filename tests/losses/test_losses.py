"""Losses against timm and closed forms, in float64 where the loss allows it."""

import pytest
import torch
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import SoftTargetCrossEntropy

from vitcomposer.losses import binary_cross_entropy, soft_target_cross_entropy

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
