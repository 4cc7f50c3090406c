"""SimCLR's and MoCo-v3's losses against loops over the equations, in float64."""

import math

import pytest
import torch
from torch import Tensor

from vitcomposer.losses import info_nce, moco_contrastive

BATCH, WIDTH = 5, 6


def embeddings(seed: int) -> Tensor:
    return torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cosine(first: Tensor, second: Tensor) -> float:
    return float(first @ second / (first.norm() * second.norm()))


def simclr_by_hand(views: list[Tensor], temperature: float) -> float:
    """arXiv:2002.05709, eq. 1, with each other view of the image as the positive in turn."""
    losses = []
    for view in range(len(views)):
        for image in range(BATCH):
            anchor = views[view][image]
            negatives = sum(
                math.exp(cosine(anchor, other[i]) / temperature) for other in views for i in range(BATCH) if i != image
            )
            for other in range(len(views)):
                if other != view:
                    positive = math.exp(cosine(anchor, views[other][image]) / temperature)
                    losses.append(-math.log(positive / (positive + negatives)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_equals_the_equation(views, temperature):
    given = [embeddings(seed) for seed in range(views)]
    assert info_nce(*given, temperature=temperature).item() == pytest.approx(simclr_by_hand(given, temperature))


def test_simclr_of_two_views_is_cross_entropy_over_all_but_oneself():
    """The form of the paper's Algorithm 1: 2 N - 1 classes, the partner is the label."""
    z = torch.nn.functional.normalize(torch.cat((embeddings(0), embeddings(1))), dim=1)
    logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    labels = (torch.arange(2 * BATCH) + BATCH) % (2 * BATCH)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(info_nce(embeddings(0), embeddings(1), temperature=0.1), expected)


@pytest.mark.parametrize("views", [2, 3])
def test_simclr_gradient_equals_finite_differences(views):
    given = [embeddings(seed).requires_grad_() for seed in range(views)]
    assert torch.autograd.gradcheck(lambda *moved: info_nce(*moved, temperature=0.3), given)


def test_simclr_of_order_of_views_is_the_same():
    given = [embeddings(seed) for seed in range(3)]
    torch.testing.assert_close(info_nce(*given[::-1], temperature=0.2), info_nce(*given, temperature=0.2))


def test_moco_equals_the_algorithm():
    queries, keys, temperature = embeddings(0), embeddings(1), 0.2
    expected = 0.0
    for image in range(BATCH):
        logits = [cosine(queries[image], keys[key]) / temperature for key in range(BATCH)]
        expected -= math.log(math.exp(logits[image]) / sum(math.exp(logit) for logit in logits)) / BATCH
    loss = moco_contrastive(queries, keys, temperature=temperature)
    assert loss.item() == pytest.approx(2 * temperature * expected)


def test_moco_gradient_equals_finite_differences_and_keys_have_none():
    queries, keys = embeddings(0).requires_grad_(), embeddings(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda moved: moco_contrastive(moved, keys.detach(), temperature=0.2), queries)
    moco_contrastive(queries, keys, temperature=0.2).backward()
    assert keys.grad is None and queries.grad is not None


@pytest.mark.parametrize("loss", [info_nce, moco_contrastive])
def test_length_of_the_embeddings_does_not_matter(loss):
    scale = torch.rand(BATCH, 1, dtype=torch.float64) + 0.5
    scaled = loss(scale * embeddings(0), embeddings(1), temperature=0.2)
    torch.testing.assert_close(scaled, loss(embeddings(0), embeddings(1), temperature=0.2))


@pytest.mark.parametrize("loss", [info_nce, moco_contrastive])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_computed_in_float32(loss, dtype):
    first, second = embeddings(0).to(dtype), embeddings(1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(first, second, temperature=0.1)
    assert result.dtype == torch.float32
    assert torch.equal(result, loss(first.float(), second.float(), temperature=0.1))


@pytest.mark.parametrize("loss", [info_nce, moco_contrastive])
def test_low_temperature_stays_finite(loss):
    first = embeddings(0).float().requires_grad_()
    result = loss(first, embeddings(1).float(), temperature=1e-3)
    result.backward()
    assert result.isfinite() and first.grad is not None and first.grad.isfinite().all()
