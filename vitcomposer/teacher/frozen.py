"""Runs the frozen teacher of a distillation beside the student."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcomposer.errors import ConfigError
from vitcomposer.losses import TeacherAnswers
from vitcomposer.schema import Distill
from vitcomposer.teacher.network import build_teacher

Channels = tuple[float, float, float]
_AUTOCAST = {"fp32": None, "amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


class FrozenTeacher:
    """A frozen network behind its own image size, normalisation and precision.

    No ``nn.Module``, so that a task which holds one neither saves, averages, shards nor wraps it.

    Args:
        network: From images (B, 3, image_size, image_size) to logits, in evaluation mode.
        precision: ``fp32``, ``amp_bf16`` or ``amp_fp16``, whatever that of the student is.
        mean, std: Of the images that ``network`` was trained on.
        student_mean, student_std: Of the images that it gets.
    """

    def __init__(  # noqa: PLR0913 (named at the call)
        self,
        network: nn.Module,
        *,
        image_size: int,
        precision: str,
        mean: Channels,
        std: Channels,
        student_mean: Channels,
        student_std: Channels,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.image_size = image_size
        self._dtype = _AUTOCAST[precision]
        # (x * student_std + student_mean - mean) / std as one product and one sum, in float64 so as to round once.
        own, theirs = torch.tensor([mean, std]).double(), torch.tensor([student_mean, student_std]).double()
        self._is_same = (mean, std) == (student_mean, student_std)
        self._scale = (theirs[1] / own[1]).float().view(3, 1, 1)  # of (B, 3, H, W)
        self._shift = ((theirs[0] - own[0]) / own[1]).float().view(3, 1, 1)
        self._device: torch.device | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherAnswers:
        """All logits for images (B, 3, H, W) as the student gets them, on their device."""
        if self._device != images.device:
            self._move(images.device)
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=self._dtype is not None):
            logits = self.network(self.prepare(images))
        return TeacherAnswers.of_logits(logits.float())  # logits (B, K)

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) of the student in the teacher's normalisation, (B, 3, image_size, image_size) float32."""
        if not self._is_same:
            images = torch.addcmul(self._shift, images, self._scale)
        size = (self.image_size, self.image_size)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)

    def _move(self, device: torch.device) -> None:
        """Once: the task is moved by Composer, and this is none of its modules."""
        self.network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        self._device = device


def build_frozen_teacher(cfg: Distill) -> FrozenTeacher:
    """The teacher of a yaml, from its file.

    Raises:
        ConfigError: A file that is missing or does not fit; keys are ``teacher.*``.
    """
    teacher = cfg.teacher
    size = teacher.image_size or cfg.model.image_size
    try:
        network = build_teacher(
            teacher.name, teacher.weights, num_classes=cfg.model.num_classes, image_size=size, **teacher.options
        )
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    return FrozenTeacher(
        network,
        image_size=size,
        precision=teacher.precision or cfg.precision,
        mean=teacher.mean,
        std=teacher.std,
        student_mean=cfg.augment.mean,
        student_std=cfg.augment.std,
    )
