"""A classifier that learns from labels and from a teacher (DeiT, arXiv:2012.12877), as a ComposerModel.

Beside what ``ClassificationTask`` needs, a batch holds ``unmixed`` where the teacher sees each image by itself, or the
answers of a cache: ``teacher_classes``, ``teacher_logits`` and ``teacher_rest``, see ``losses.TeacherAnswers``.
"""

from typing import Any

from torch import Tensor, nn

from vitcomposer.data.batch import MIX_LAM, TEACHER_CLASSES, TEACHER_LOGITS, TEACHER_REST, UNMIXED
from vitcomposer.losses import DistillationLoss, TeacherAnswers
from vitcomposer.tasks.classification import ClassificationTask
from vitcomposer.teacher.frozen import FrozenTeacher


class DistillationTask(ClassificationTask):
    """A classifier trained by a ``DistillationLoss`` and measured as every other.

    Args:
        teacher: Asked about every training batch; None where the batches bring its answers.
        sees_unmixed: The answers are about each image by itself, so they are mixed as the labels are.
    """

    loss_function: DistillationLoss

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: DistillationLoss,
        num_classes: int,
        teacher: FrozenTeacher | None,
        sees_unmixed: bool,
    ) -> None:
        super().__init__(model, loss=loss, num_classes=num_classes)
        self.teacher = teacher
        self.sees_unmixed = sees_unmixed

    def loss(self, outputs: Tensor | tuple[Tensor, ...], batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        lam = batch.get(MIX_LAM) if self.sees_unmixed else None
        return self.loss_function(outputs, batch["target"], self.answers(batch), lam)

    def answers(self, batch: dict[str, Tensor]) -> TeacherAnswers:
        """What the teacher says about a training batch: of its B images as they are, or as the student sees them."""
        if self.teacher is None:
            return TeacherAnswers(batch[TEACHER_CLASSES], batch[TEACHER_LOGITS], batch[TEACHER_REST])
        return self.teacher(batch[UNMIXED if self.sees_unmixed else "image"])
