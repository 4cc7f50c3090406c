"""SwAV's loss and queue against loops over the equations, in float64."""

import pytest
import torch
from torch import Tensor

from vitcomposer.losses import SwAVLoss, sinkhorn
from vitcomposer.losses.cross_view import cross_view_entropy

CROPS, BATCH, WIDTH, PROTOTYPES = 4, 6, 5, (7, 9)
EPSILON, ITERATIONS, TEMPERATURE = 0.05, 3, 0.1


def new_loss(**changes) -> SwAVLoss:
    arguments = {"num_crops": CROPS, "temperature": TEMPERATURE, "epsilon": EPSILON, "iterations": ITERATIONS}
    return SwAVLoss(**{**arguments, **changes})


def unit(rows: int, columns: int, seed: int) -> Tensor:
    values = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=1)


def prototypes() -> list[Tensor]:
    return [unit(count, WIDTH, seed=count) for count in PROTOTYPES]


def batch(seed: int = 0, images: int = BATCH) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Arguments of the loss: scores, embeddings, prototypes."""
    embeddings = unit(CROPS * images, WIDTH, seed)
    return [embeddings @ weight.T for weight in prototypes()], embeddings, prototypes()


def codes_of(scores: Tensor) -> Tensor:
    return sinkhorn(scores, epsilon=EPSILON, iterations=ITERATIONS)


def by_hand(all_scores: list[Tensor], codes: list[list[Tensor]], assign: tuple[int, ...] = (0, 1)) -> Tensor:
    """recipes' equation, one crop, image and prototype at a time; ``codes[head][a]`` belong to crop ``assign[a]``."""
    total, terms = torch.zeros((), dtype=torch.float64), 0
    for scores, head_codes in zip(all_scores, codes, strict=True):
        images = len(scores) // CROPS
        for a, crop in enumerate(assign):
            for other in set(range(CROPS)) - {crop}:
                for image in range(images):
                    log_probability = (scores[other * images + image] / TEMPERATURE).log_softmax(dim=0)
                    total = total - (head_codes[a][image] * log_probability).sum()
                    terms += 1
    return total / terms


def codes_by_hand(all_scores: list[Tensor], assign: tuple[int, ...] = (0, 1)) -> list[list[Tensor]]:
    return [[codes_of(scores.view(CROPS, -1, scores.shape[1])[crop]) for crop in assign] for scores in all_scores]


@pytest.mark.parametrize("assign", [(0, 1), (0,), (2, 0, 3)])
def test_loss_and_gradient_equal_the_equation(assign):
    scores, embeddings, weights = batch()
    ours = [s.clone().requires_grad_() for s in scores]
    theirs = [s.clone().requires_grad_() for s in scores]
    loss = new_loss(crops_for_assign=assign)(ours, embeddings, weights)
    expected = by_hand(theirs, codes_by_hand(scores, assign), assign)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_gradient_equals_finite_differences():
    """Codes are constants, so only crops without codes can be moved with the codes as they are."""
    scores, embeddings, weights = batch()
    large, small = scores[0][: 2 * BATCH], scores[0][2 * BATCH :]
    loss = new_loss()
    assert torch.autograd.gradcheck(
        lambda moved: loss([torch.cat((large, moved))], embeddings, weights[:1]), small.clone().requires_grad_()
    )
    codes = torch.stack(codes_by_hand(scores)[0])
    logits = scores[0].view(CROPS, BATCH, -1).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda moved: cross_view_entropy(codes, moved, (0, 1)), logits)


def test_gradient_does_not_flow_through_the_codes():
    scores, embeddings, weights = batch()
    scores = [scores[0].requires_grad_()]
    loss = SwAVLoss(num_crops=2, temperature=TEMPERATURE, epsilon=EPSILON, iterations=3, crops_for_assign=(0,))
    two_crops = scores[0][: 2 * BATCH]
    loss([two_crops], embeddings[: 2 * BATCH], weights[:1]).backward()
    gradient = scores[0].grad
    assert gradient is not None
    assert (gradient[:BATCH] == 0).all(), "crop 0 only gives codes"
    assert (gradient[BATCH : 2 * BATCH] != 0).any()


def test_swapped_large_crops_leave_the_loss_unchanged():
    scores, embeddings, weights = batch()
    order = torch.cat((torch.arange(BATCH, 2 * BATCH), torch.arange(BATCH), torch.arange(2 * BATCH, CROPS * BATCH)))
    swapped = new_loss()([s[order] for s in scores], embeddings[order], weights)
    torch.testing.assert_close(swapped, new_loss()(scores, embeddings, weights))


def test_permuted_images_leave_the_loss_unchanged():
    scores, embeddings, weights = batch()
    images = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    order = (torch.arange(CROPS)[:, None] * BATCH + images).flatten()
    permuted = new_loss()([s[order] for s in scores], embeddings[order], weights)
    torch.testing.assert_close(permuted, new_loss()(scores, embeddings, weights))


def test_identical_crops_give_the_entropy_of_the_codes():
    """Exact where the prediction is the code: temperature = epsilon, and scores whose softmax is balanced already.

    Rows of a circulant matrix have one softmax up to a shift, so that every prototype's share is 1.
    """
    row = unit(1, 8, seed=1)[0]
    scores = torch.stack([row.roll(shift) for shift in range(8)])  # (B, K) with B = K
    codes = codes_of(scores)
    torch.testing.assert_close(codes, (scores / EPSILON).softmax(dim=1))
    loss = new_loss(temperature=EPSILON)([scores.repeat(CROPS, 1)], scores.repeat(CROPS, 1), [scores])
    entropy = -(codes * codes.log()).sum(dim=1).mean()
    torch.testing.assert_close(loss, entropy)


def test_identical_crops_never_go_below_the_entropy_of_the_codes():
    """Elsewhere the loss is the entropy plus the divergence of the prediction from the code."""
    embeddings = unit(BATCH, WIDTH, 0).repeat(CROPS, 1)
    scores = embeddings @ prototypes()[0].T
    codes = codes_of(scores[:BATCH])
    prediction = (scores[:BATCH] / TEMPERATURE).softmax(dim=1)
    entropy = -(codes * codes.log()).sum(dim=1).mean()
    divergence = (codes * (codes / prediction).log()).sum(dim=1).mean()
    assert divergence > 0.01
    torch.testing.assert_close(new_loss()([scores], embeddings, prototypes()[:1]), entropy + divergence)


def test_hard_codes_are_the_most_likely_prototypes():
    scores, embeddings, weights = batch()
    hard = [[torch.eye(c.shape[1]).double()[c.argmax(dim=1)] for c in head] for head in codes_by_hand(scores)]
    torch.testing.assert_close(new_loss()(scores, embeddings, weights, hard=True), by_hand(scores, hard))


def test_queue_is_newest_first_and_moves_in_training_only():
    loss = new_loss(queue_length=3 * BATCH, embedding_dim=WIDTH).double()
    batches = [batch(seed) for seed in range(4)]
    for arguments in batches:
        loss(*arguments)
    for index, crop in enumerate((0, 1)):
        newest_first = [b[1].view(CROPS, BATCH, WIDTH)[crop] for b in reversed(batches[1:])]
        assert torch.equal(loss.queue[index], torch.cat(newest_first))
    before = loss.queue.clone()
    loss.eval()(*batches[0])
    assert torch.equal(loss.queue, before)


@pytest.mark.parametrize("queue_length", [2 * BATCH, 2 * BATCH + 1, BATCH - 2])
def test_codes_with_a_queue_equal_those_of_one_larger_batch(queue_length):
    loss = new_loss(queue_length=queue_length, embedding_dim=WIDTH).double()
    earlier = [batch(seed) for seed in (1, 2, 3)]
    for arguments in earlier:
        loss(*arguments)
    scores, embeddings, weights = batch(4)
    weights = [unit(len(w), WIDTH, seed=50) for w in weights]  # the prototypes moved on meanwhile
    scores = [embeddings @ w.T for w in weights]
    codes = []
    for head_scores, weight in zip(scores, weights, strict=True):
        codes.append([])
        for crop in (0, 1):
            queued = torch.cat([b[1].view(CROPS, BATCH, WIDTH)[crop] for b in reversed(earlier)])[:queue_length]
            larger = torch.cat((head_scores.view(CROPS, BATCH, -1)[crop], queued @ weight.T))
            codes[-1].append(codes_of(larger)[:BATCH])
    without = new_loss()(scores, embeddings, weights)
    with_queue = loss(scores, embeddings, weights, use_queue=True)
    torch.testing.assert_close(with_queue, by_hand(scores, codes))
    assert not torch.isclose(with_queue, without)


def test_queue_restored_mid_way_gives_the_same_next_losses():
    first, second = (new_loss(queue_length=2 * BATCH, embedding_dim=WIDTH) for _ in range(2))
    for seed in range(3):
        first(*batch(seed))
    second.load_state_dict(first.state_dict())
    for seed in range(3, 6):
        assert torch.equal(first(*batch(seed), use_queue=True), second(*batch(seed), use_queue=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_computed_in_float32(dtype):
    scores, embeddings, weights = batch()
    half = [s.to(dtype) for s in scores]
    loss = new_loss(queue_length=BATCH, embedding_dim=WIDTH)
    loss(half, embeddings.to(dtype), weights)
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss(half, embeddings.to(dtype), weights, use_queue=True)
    assert result.dtype == torch.float32
    loss.load_state_dict(state)
    assert torch.equal(result, loss([s.float() for s in half], embeddings.to(dtype), weights, use_queue=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_crops": 1}, "num_crops must be at least 2, got 1"),
        ({"crops_for_assign": (0, 4)}, r"crops_for_assign must be crops in 0 .. 3, got \[0, 4\]"),
        ({"crops_for_assign": ()}, r"crops_for_assign must be crops in 0 .. 3, got \[\]"),
        ({"queue_length": 8}, "embedding_dim must be the head's last width for queue_length=8, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        new_loss(**arguments)
