"""Distillation losses, from labels and a teacher: DeiT (arXiv:2012.12877, section 4)."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcomposer.losses.precision import at_least_float32
from vitcomposer.losses.supervised import soft_target_cross_entropy


class TeacherAnswers(NamedTuple):
    """What a teacher says about B images of K classes: all its logits, or the k highest and what is left.

    Attributes:
        classes: int32 (B, k), each once in a row.
        logits: float16 (B, k), of those classes.
        rest: float32 (B,), log-sum-exp of the other K - k logits; -inf where k is K.
    """

    classes: Tensor
    logits: Tensor
    rest: Tensor

    @staticmethod
    def of_logits(logits: Tensor) -> "TeacherAnswers":
        """All of the logits (B, K), rounded to float16 as a cache stores them."""
        count, num_classes = logits.shape
        classes = torch.arange(num_classes, dtype=torch.int32, device=logits.device).expand(count, -1)
        return TeacherAnswers(classes, logits.half(), logits.new_full((count,), -math.inf, dtype=torch.float32))


class DistillationLoss(nn.Module):
    """``(1 - alpha) * label loss + alpha * teacher loss``: eq. 2 of the paper for soft, eq. 3 for hard.

    hard: cross-entropy with the teacher's best class. soft: ``temperature ** 2`` times the divergence of the student's
    from the teacher's distribution, both at that temperature, ``KL(teacher, student)``.

    Args:
        label_loss: From logits and soft targets (B, K) to a scalar.
        temperature: Of soft; hard does not depend on it.
        kl: ``batch`` divides the sum over images and classes by the images (eq. 2), ``elements`` by images times
            classes, as DeiT's code does.
    """

    def __init__(
        self,
        label_loss: Callable[[Tensor, Tensor], Tensor],
        *,
        kind: Literal["hard", "soft"],
        alpha: float,
        temperature: float,
        kl: Literal["batch", "elements"],
    ) -> None:
        super().__init__()
        self.label_loss = label_loss
        self.kind = kind
        self.alpha = alpha
        self.temperature = temperature
        self.kl = kl

    def forward(
        self,
        outputs: Tensor | tuple[Tensor, ...],
        targets: Tensor,
        answers: TeacherAnswers,
        lam: Tensor | None = None,
    ) -> Tensor:
        """The mean over the batch; nothing of the teacher gets a gradient.

        Args:
            outputs: Logits (B, K) that learn from both, or those of two heads: from the labels and from the teacher.
            targets: (B, K), smoothed and mixed.
            answers: Of the teacher for the B images.
            lam: (B,), where the teacher saw each image by itself and the student saw ``lam`` of it mixed with its
                partner of the reversed batch: the answers are mixed as the labels were.
        """
        class_logits, teacher_logits = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        label = self.label_loss(class_logits, targets)
        teacher = self._hard if self.kind == "hard" else self._soft
        return (1 - self.alpha) * label + self.alpha * teacher(teacher_logits, answers, lam)

    def _hard(self, logits: Tensor, answers: TeacherAnswers, lam: Tensor | None) -> Tensor:
        logits, best = at_least_float32(logits), _best_class(answers)
        if lam is None:
            return F.cross_entropy(logits, best)  # eq. 3
        one_hot = best[:, None] == torch.arange(logits.shape[1], device=logits.device)  # (B, K)
        return soft_target_cross_entropy(logits, _mix(one_hot.to(logits.dtype), lam))

    def _soft(self, logits: Tensor, answers: TeacherAnswers, lam: Tensor | None) -> Tensor:
        logits = at_least_float32(logits)
        taught = _all_logits(answers, logits.shape[1], logits.dtype)  # (B, K)
        probabilities = (taught / self.temperature).softmax(dim=1)
        if lam is not None:
            probabilities = _mix(probabilities, lam)
        divergence = F.kl_div((logits / self.temperature).log_softmax(dim=1), probabilities, reduction="sum")
        # Gradients of the divergence shrink with temperature ** 2, which the factor makes up for (eq. 2).
        count = logits.shape[0] if self.kl == "batch" else logits.numel()
        return divergence * (self.temperature**2 / count)


def _best_class(answers: TeacherAnswers) -> Tensor:
    """int64 (B,): the class of the highest logit, the first of equals in whichever order they are stored."""
    highest = answers.logits == answers.logits.amax(dim=1, keepdim=True)
    return answers.classes.where(highest, torch.iinfo(torch.int32).max).amin(dim=1).long()


def _all_logits(answers: TeacherAnswers, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(B, K), with what is left spread evenly over the classes that are not stored."""
    stored = answers.logits.to(dtype)  # (B, k)
    others = num_classes - stored.shape[1]
    # (B,): n equal logits have the log-sum-exp of one of them plus log n.
    each = answers.rest.to(dtype) - math.log(max(others, 1))
    return each[:, None].expand(-1, num_classes).scatter(1, answers.classes.long(), stored)


def _mix(targets: Tensor, lam: Tensor) -> Tensor:
    # Targets (B, K); the partner of image b is image B - 1 - b, as in the mixing of images and labels.
    return targets * lam[:, None] + targets.flip(0) * (1 - lam[:, None])
