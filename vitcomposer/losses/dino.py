"""DINO's loss (arXiv:2104.14294): the student's crops learn the centred and sharpened output of the teacher."""

import torch
from torch import Tensor, nn

from vitcomposer.collectives import all_reduce, rank_and_world_size
from vitcomposer.losses.cross_view import cross_view_entropy

GLOBAL_CROPS = 2


class DINOLoss(nn.Module):
    """Eq. 3 and Algorithm 1 of the paper: the mean cross-entropy over all pairs of a global crop and another crop.

    The buffer ``center`` (1, out_dim) follows the teacher's mean output over all ranks, from the step after on.

    Args:
        out_dim: K, width of both outputs.
        student_temperature: 0.1 in the paper.
        center_momentum: 0.9 in the paper.
    """

    center: Tensor

    def __init__(self, out_dim: int, *, student_temperature: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temperature: float) -> Tensor:
        """The mean over this rank's images. In training the center moves on.

        Args:
            student_logits: (V * B, K) of all crops, crop-major, the two global crops first.
            teacher_logits: (2 * B, K) of the two global crops; they get no gradient.
            teacher_temperature: Of this step: 0.04 to 0.07 in the paper.
        """
        # Logits are divided by temperatures down to 0.04, which would magnify what half precision rounds off.
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        teacher_logits = teacher_logits.detach().to(dtype)
        # Centring alone would lead to a uniform output, sharpening alone to one class (section 3.1).
        targets = ((teacher_logits - self.center) / teacher_temperature).softmax(dim=-1)  # (2 * B, K)
        targets = targets.view(GLOBAL_CROPS, -1, targets.shape[-1])  # (2, B, K)
        student = student_logits.to(dtype).view(-1, *targets.shape[1:]) / self.student_temperature  # (V, B, K)
        loss = cross_view_entropy(targets, student, range(GLOBAL_CROPS))
        if self.training:
            self._move_center(teacher_logits)
        return loss

    @torch.no_grad()
    def _move_center(self, teacher_logits: Tensor) -> None:
        # Every rank has as many crops, so the mean of the ranks' means is that of all crops.
        mean = all_reduce(teacher_logits.mean(dim=0, keepdim=True)) / rank_and_world_size()[1]
        self.center.lerp_(mean.to(self.center.dtype), 1 - self.center_momentum)  # eq. 4
