"""DINO's loss and center against loops over Algorithm 1 (arXiv:2104.14294), in float64."""

import pytest
import torch
from torch import Tensor

from vitcomposer.losses import DINOLoss

CROPS, BATCH, OUT = 5, 4, 7
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


def new_loss() -> DINOLoss:
    return DINOLoss(OUT, student_temperature=STUDENT_TEMPERATURE, center_momentum=0.9).double()


def logits(crops: int, seed: int) -> Tensor:
    return torch.randn(crops * BATCH, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    total, terms = torch.zeros((), dtype=torch.float64), 0
    for view in range(2):
        for crop in range(student.shape[0] // BATCH):
            if crop == view:
                continue
            for image in range(BATCH):
                target = ((teacher[view * BATCH + image] - center) / TEACHER_TEMPERATURE).softmax(dim=0)
                prediction = (student[crop * BATCH + image] / STUDENT_TEMPERATURE).softmax(dim=0)
                total = total - (target * prediction.log()).sum()
                terms += 1
    return total / terms


@pytest.mark.parametrize("crops", [2, CROPS])
def test_loss_equals_the_algorithm(crops):
    loss = new_loss()
    loss.center.copy_(logits(1, seed=5)[:1])
    student, teacher, center = logits(crops, 0), logits(2, 1), loss.center[0].clone()
    torch.testing.assert_close(loss(student, teacher, TEACHER_TEMPERATURE), by_hand(student, teacher, center))


def test_center_follows_the_mean_of_the_teacher_from_the_next_step_on():
    loss, expected = new_loss(), torch.zeros(OUT, dtype=torch.float64)
    for seed in range(3):
        student, teacher = logits(CROPS, seed), logits(2, 10 + seed) + 1.0
        value = loss(student, teacher, TEACHER_TEMPERATURE)
        torch.testing.assert_close(value, by_hand(student, teacher, expected))
        expected = 0.9 * expected + 0.1 * teacher.mean(dim=0)
        torch.testing.assert_close(loss.center[0], expected)
    loss.eval()(logits(CROPS, 0), logits(2, 1), TEACHER_TEMPERATURE)
    torch.testing.assert_close(loss.center[0], expected)


def test_gradient_equals_finite_differences_and_the_teacher_has_none():
    loss, student = new_loss().eval(), logits(CROPS, 0).requires_grad_()
    teacher = logits(2, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda moved: loss(moved, teacher.detach(), TEACHER_TEMPERATURE), student)
    loss(student, teacher, TEACHER_TEMPERATURE).backward()
    assert teacher.grad is None and student.grad is not None


def test_swapped_global_crops_leave_the_loss_unchanged():
    student, teacher = logits(CROPS, 0), logits(2, 1)
    student_order = torch.cat((torch.arange(BATCH, 2 * BATCH), torch.arange(BATCH), torch.arange(2 * BATCH, 5 * BATCH)))
    swapped = new_loss()(student[student_order], teacher[student_order[: 2 * BATCH]], TEACHER_TEMPERATURE)
    torch.testing.assert_close(swapped, new_loss()(student, teacher, TEACHER_TEMPERATURE))


def test_half_precision_logits_are_computed_in_float32():
    student, teacher = logits(CROPS, 0).bfloat16(), logits(2, 1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = new_loss().float()(student, teacher, TEACHER_TEMPERATURE)
    assert result.dtype == torch.float32
    assert torch.equal(result, new_loss().float()(student.float(), teacher.float(), TEACHER_TEMPERATURE))
