"""Says for each method what is a batch, a loss and a metric, as Composer's Trainer wants it (ComposerModel)."""

from vitcomposer.tasks.classification import ClassificationTask
from vitcomposer.tasks.dino import DINOTask
from vitcomposer.tasks.distillation import DistillationTask
from vitcomposer.tasks.moco import MoCoTask
from vitcomposer.tasks.probe import EmbeddingTask, Head, LinearProbeTask
from vitcomposer.tasks.self_supervised import SelfSupervisedTask
from vitcomposer.tasks.simclr import SimCLRTask
from vitcomposer.tasks.swav import SwAVTask
from vitcomposer.teacher.frozen import FrozenTeacher, build_frozen_teacher

__all__ = [
    "DINOTask",
    "ClassificationTask",
    "DistillationTask",
    "EmbeddingTask",
    "FrozenTeacher",
    "Head",
    "LinearProbeTask",
    "MoCoTask",
    "SelfSupervisedTask",
    "SimCLRTask",
    "SwAVTask",
    "build_frozen_teacher",
]
