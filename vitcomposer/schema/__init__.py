"""Defines the keys of a yaml: frozen dataclasses, one per block and one per recipe.

A field that decides accuracy has no default, so a yaml is the method section of a paper on one page. Mechanics
(workers, logging, caching) have defaults. Ranges of one block are checked in its ``__post_init__``; what needs two
blocks is checked in the recipe's class.
"""

from vitcomposer.schema.blocks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_PIXELS,
    Augment,
    Data,
    Evaluation,
    Mixing,
    Optimizer,
    Run,
    Schedule,
    require_plain_address,
)
from vitcomposer.schema.dino import DINO
from vitcomposer.schema.distill import Distill, Distillation, Teacher, TeacherCache
from vitcomposer.schema.moco import MoCo
from vitcomposer.schema.model import Init, Model
from vitcomposer.schema.paths import expand_home
from vitcomposer.schema.probe import KNN, Heads, Neighbors, Probe
from vitcomposer.schema.self_supervised import Crops, SelfSupervised
from vitcomposer.schema.simclr import SimCLR
from vitcomposer.schema.supervised import Supervised
from vitcomposer.schema.swav import SwAV

__all__ = [
    "CONFIGS",
    "DINO",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "KNN",
    "MAX_PIXELS",
    "Augment",
    "Crops",
    "Data",
    "Distill",
    "Distillation",
    "Evaluation",
    "Heads",
    "Init",
    "Mixing",
    "MoCo",
    "Model",
    "Neighbors",
    "Optimizer",
    "Probe",
    "Run",
    "Schedule",
    "SelfSupervised",
    "SimCLR",
    "Supervised",
    "SwAV",
    "Teacher",
    "TeacherCache",
    "expand_home",
    "require_plain_address",
]

CONFIGS: dict[str, type] = {
    "supervised": Supervised,
    "distill": Distill,
    "swav": SwAV,
    "simclr": SimCLR,
    "moco": MoCo,
    "dino": DINO,
    "probe": Probe,
    "knn": Neighbors,
}
