"""Losses of all methods, as functions and modules of tensors alone."""

from vitcomposer.losses.contrastive import info_nce, moco_contrastive
from vitcomposer.losses.dino import DINOLoss
from vitcomposer.losses.distillation import DistillationLoss, TeacherAnswers
from vitcomposer.losses.sinkhorn import sinkhorn
from vitcomposer.losses.supervised import LogitAdjustedCrossEntropy, binary_cross_entropy, soft_target_cross_entropy
from vitcomposer.losses.swav import SwAVLoss

__all__ = [
    "DINOLoss",
    "DistillationLoss",
    "LogitAdjustedCrossEntropy",
    "SwAVLoss",
    "TeacherAnswers",
    "binary_cross_entropy",
    "info_nce",
    "moco_contrastive",
    "sinkhorn",
    "soft_target_cross_entropy",
]
