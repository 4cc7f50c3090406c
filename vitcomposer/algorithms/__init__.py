"""Composer algorithms, which change how a network is trained: Composer's that help a ViT, and those it lacks."""

from vitcomposer.algorithms.build import ALLOWED, build_algorithms, build_stage_algorithms
from vitcomposer.algorithms.curriculum import Curriculum
from vitcomposer.algorithms.ema import EvaluationEMA
from vitcomposer.algorithms.patch_dropout import PatchDropout
from vitcomposer.algorithms.sam import ResumableSAM
from vitcomposer.algorithms.self_supervised import BeginStep, CosineWeightDecay, FreezeAtStart, MomentumEncoder
from vitcomposer.models.weights.averages import EMA_LABEL, averaged_weights

__all__ = [
    "ALLOWED",
    "EMA_LABEL",
    "BeginStep",
    "CosineWeightDecay",
    "Curriculum",
    "EvaluationEMA",
    "FreezeAtStart",
    "MomentumEncoder",
    "PatchDropout",
    "ResumableSAM",
    "averaged_weights",
    "build_algorithms",
    "build_stage_algorithms",
]
