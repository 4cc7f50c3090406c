"""Composer algorithms: those of Composer that help a ViT, and those it lacks."""

from vitcomposer.algorithms.build import ALLOWED, REJECTED, build_algorithms
from vitcomposer.algorithms.ema import EMA_LABEL, EvaluationEMA, averaged_weights
from vitcomposer.algorithms.sam import ResumableSAM

__all__ = [
    "ALLOWED",
    "EMA_LABEL",
    "REJECTED",
    "EvaluationEMA",
    "ResumableSAM",
    "averaged_weights",
    "build_algorithms",
]
