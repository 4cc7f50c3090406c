"""DistillationLoss against sums written out in numpy, float64; and what its limits are."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vitcomposer.losses import (
    DistillationLoss,
    TeacherAnswers,
    binary_cross_entropy,
    soft_target_cross_entropy,
)

BATCH, CLASSES = 6, 9


def draw(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(BATCH, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def answers_of(logits: Tensor, k: int, seed: int = 0) -> TeacherAnswers:
    """The k highest logits of every image, in an order of its own."""
    values, classes = logits.topk(CLASSES, dim=1)
    order = torch.rand(BATCH, k, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    rest = values[:, k:].logsumexp(dim=1).float()
    return TeacherAnswers(classes[:, :k].gather(1, order).int(), values[:, :k].gather(1, order).half(), rest)


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def probabilities(answers: TeacherAnswers, image: int, temperature: float) -> np.ndarray:
    """What a teacher says of an image at a temperature: the rest are equal logits of that log-sum-exp."""
    stored = dict(zip(answers.classes[image].tolist(), answers.logits[image].tolist(), strict=True))
    others = CLASSES - len(stored)
    each = answers.rest[image].item() - math.log(others) if others else math.nan
    return softmax(np.array([stored.get(c, each) for c in range(CLASSES)]) / temperature)


def one_hot(answers: TeacherAnswers, image: int) -> np.ndarray:
    best = int(answers.classes[image][answers.logits[image].argmax()])
    return np.eye(CLASSES)[best]


def mixed(rows: list[np.ndarray], lam: Tensor | None) -> list[np.ndarray]:
    if lam is None:
        return rows
    return [w * row + (1 - w) * other for w, row, other in zip(lam.tolist(), rows, rows[::-1], strict=True)]


def closed_form(  # noqa: PLR0913
    logits: Tensor, answers: TeacherAnswers, lam: Tensor | None, *, kind: str, temperature: float, kl: str
) -> float:
    """The teacher's term alone."""
    student = logits.detach().numpy()
    if kind == "hard":
        teacher = mixed([one_hot(answers, i) for i in range(BATCH)], lam)
        return float(np.mean([-np.sum(t * np.log(softmax(s))) for s, t in zip(student, teacher, strict=True)]))
    teacher = mixed([probabilities(answers, i, temperature) for i in range(BATCH)], lam)
    total = sum(np.sum(t * np.log(t / softmax(s / temperature))) for s, t in zip(student, teacher, strict=True))
    return float(total * temperature**2 / (BATCH if kl == "batch" else BATCH * CLASSES))


def loss_of(label_loss: Any = soft_target_cross_entropy, **options: Any) -> DistillationLoss:
    return DistillationLoss(label_loss, **{"kind": "soft", "alpha": 0.3, "temperature": 3.0, "kl": "batch", **options})


LAM = torch.tensor([0.3, 0.9, 1.0, 0.5, 0.75, 0.0])
VARIANTS = [
    *itertools.product(["hard"], [1.0], ["batch"], [CLASSES, 3], [False, True]),
    *itertools.product(["soft"], [1.0, 3.0], ["batch", "elements"], [CLASSES, 3], [False, True]),
]


@pytest.mark.parametrize("label_loss", [soft_target_cross_entropy, binary_cross_entropy])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("kind", "temperature", "kl", "k", "mixes"), VARIANTS)
def test_loss_equals_the_closed_form(label_loss, heads, kind, temperature, kl, k, mixes):
    outputs = (draw(0), draw(1))[:heads]
    answers, lam = answers_of(draw(2), k), LAM if mixes else None
    targets = draw(3).softmax(dim=1).where(draw(3) > 0, 0.0)
    found = loss_of(label_loss, kind=kind, temperature=temperature, kl=kl)(
        outputs[0] if heads == 1 else outputs, targets, answers, lam
    )
    teacher = closed_form(outputs[-1], answers, lam, kind=kind, temperature=temperature, kl=kl)
    student = outputs[0].numpy()
    if label_loss is binary_cross_entropy:
        present = targets.numpy() > 0
        label = -np.mean(np.where(present, np.log(1 / (1 + np.exp(-student))), np.log(1 / (1 + np.exp(student)))))
    else:
        label = -np.sum(targets.numpy() * np.log([softmax(row) for row in student])) / BATCH
    assert found.item() == pytest.approx(0.7 * label + 0.3 * teacher, rel=2e-7 if lam is not None else 1e-12)


def test_each_head_gets_the_gradient_of_its_own_term_only():
    targets, answers = draw(3).softmax(dim=1), answers_of(draw(2), CLASSES)
    heads = draw(0).requires_grad_(), draw(1).requires_grad_()
    loss_of(alpha=0.3, temperature=2.0)(heads, targets, answers).backward()
    label = 0.7 * (heads[0].softmax(1) - targets) / BATCH
    teacher = (answers.logits.double().scatter(1, answers.classes.long(), answers.logits.double()) / 2).softmax(1)
    distilled = 0.3 * 2.0 * ((heads[1] / 2).softmax(1) - teacher) / BATCH
    assert heads[0].grad is not None and heads[1].grad is not None
    torch.testing.assert_close(heads[0].grad, label.detach())
    torch.testing.assert_close(heads[1].grad, distilled.detach())


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_gradient_equals_finite_differences(kind):
    answers, targets = answers_of(draw(2), 3), draw(3).softmax(dim=1)
    loss = loss_of(kind=kind)
    assert torch.autograd.gradcheck(
        lambda logits: loss(logits, targets, answers, LAM.double()), draw(0).requires_grad_()
    )


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_alpha_goes_from_the_labels_alone_to_the_teacher_alone(kind):
    targets, answers, heads = draw(3).softmax(dim=1), answers_of(draw(2), CLASSES), (draw(0), draw(1))
    label = soft_target_cross_entropy(heads[0], targets)
    assert loss_of(kind=kind, alpha=0.0)(heads, targets, answers) == label
    teacher = closed_form(heads[1], answers, None, kind=kind, temperature=3.0, kl="batch")
    assert loss_of(kind=kind, alpha=1.0)(heads, targets, answers).item() == pytest.approx(teacher, rel=1e-12)


def test_soft_at_high_temperature_is_the_distance_of_centred_logits():
    """Hinton et al., arXiv:1503.02531, section 2.1."""
    answers = answers_of(draw(2), CLASSES)
    stored = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    stored = stored.scatter(1, answers.classes.long(), answers.logits.double())
    centred = [logits - logits.mean(dim=1, keepdim=True) for logits in (draw(0), stored)]
    expected = (centred[0] - centred[1]).square().sum() / (2 * CLASSES * BATCH)
    found = loss_of(alpha=1.0, temperature=1e4)(draw(0), stored, answers)
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)


def test_soft_at_low_temperature_is_hard_and_an_equal_teacher_says_nothing():
    answers, targets = answers_of(draw(2), CLASSES), draw(3).softmax(dim=1)
    hard = loss_of(kind="hard", alpha=1.0)(draw(0) / 1e-2, targets, answers)
    soft = loss_of(alpha=1.0, temperature=1e-2)(draw(0), targets, answers) / 1e-2**2
    assert soft.item() == pytest.approx(hard.item(), rel=1e-3)
    student = draw(2).half().double().requires_grad_()
    nothing = loss_of(alpha=1.0)(student, targets, answers)
    nothing.backward()
    assert abs(nothing.item()) < 1e-14 and student.grad is not None and student.grad.abs().max() < 1e-14


def test_temperature_and_kl_do_not_change_hard():
    answers, targets = answers_of(draw(2), CLASSES), draw(3).softmax(dim=1)
    plain = loss_of(kind="hard", temperature=1.0)(draw(0), targets, answers)
    assert loss_of(kind="hard", temperature=7.0, kl="elements")(draw(0), targets, answers) == plain


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_order_of_the_stored_classes_says_nothing_even_between_equals(kind):
    logits, targets = draw(2).round(), draw(3).softmax(dim=1)
    first, second = answers_of(logits, CLASSES, seed=0), answers_of(logits, CLASSES, seed=1)
    assert not torch.equal(first.classes, second.classes)
    assert (logits == logits.amax(1, keepdim=True)).sum() > BATCH, "some images have two best classes"
    loss = loss_of(kind=kind)
    assert loss(draw(0), targets, first) == loss(draw(0), targets, second)


def test_rest_of_equal_logits_is_the_whole_answer():
    logits = draw(2).half().double()
    order = logits.argsort(dim=1, descending=True)
    logits = logits.scatter(1, order[:, 3:], -2.0)
    few, whole = answers_of(logits, 3), answers_of(logits, CLASSES)
    targets = draw(3).softmax(dim=1)
    found = [loss_of(temperature=2.0)(draw(0), targets, answers).item() for answers in (few, whole)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # the rest is float32


def test_answers_of_live_logits_are_in_the_form_of_a_cache():
    answers = TeacherAnswers.of_logits(draw(2).float())
    assert (answers.classes.dtype, answers.logits.dtype, answers.rest.dtype) == (
        torch.int32,
        torch.float16,
        torch.float32,
    )
    assert answers.classes[3].tolist() == list(range(CLASSES)) and answers.rest.tolist() == [-math.inf] * BATCH
    assert torch.equal(answers.logits, draw(2).float().half())


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_half_precision_logits_are_computed_in_float32(kind):
    half, targets, answers = draw(0).bfloat16(), draw(3).softmax(dim=1).float(), answers_of(draw(2), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_of(kind=kind)(half, targets, answers, LAM)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss_of(kind=kind)(half.float(), targets, answers, LAM))
