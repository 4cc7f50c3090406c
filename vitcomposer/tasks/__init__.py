"""ComposerModels: what is a batch, a loss and a metric for each method."""

from vitcomposer.tasks.classification import Classification
from vitcomposer.tasks.dino import DINO
from vitcomposer.tasks.distillation import Distillation
from vitcomposer.tasks.moco import MoCo
from vitcomposer.tasks.probe import Embedding, Head, LinearProbe
from vitcomposer.tasks.self_supervised import SelfSupervisedTask
from vitcomposer.tasks.simclr import SimCLR
from vitcomposer.tasks.swav import SwAV
from vitcomposer.teacher.frozen import FrozenTeacher, build_frozen_teacher

__all__ = [
    "DINO",
    "Classification",
    "Distillation",
    "Embedding",
    "FrozenTeacher",
    "Head",
    "LinearProbe",
    "MoCo",
    "SelfSupervisedTask",
    "SimCLR",
    "SwAV",
    "build_frozen_teacher",
]
