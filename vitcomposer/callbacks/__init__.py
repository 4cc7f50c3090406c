"""Composer callbacks, which watch a run: what it shows, what it leaves in its folder and how it stops."""

from vitcomposer.callbacks.attention import AttentionMonitor, build_attention_monitor
from vitcomposer.callbacks.bad_images import BadImageCount
from vitcomposer.callbacks.batch_norm import SameStatistics
from vitcomposer.callbacks.best import Best
from vitcomposer.callbacks.checkpoints import Checkpoints
from vitcomposer.callbacks.knn import KNNMonitor, build_knn_monitor
from vitcomposer.callbacks.mirror import MirrorRun, build_mirror, finish_mirror
from vitcomposer.callbacks.numerics import NumericsMonitor
from vitcomposer.callbacks.predictions import KeptPredictions
from vitcomposer.callbacks.preemption import Preemption
from vitcomposer.callbacks.progress import Progress
from vitcomposer.callbacks.record import RunRecord
from vitcomposer.callbacks.step_seed import StepSeed
from vitcomposer.callbacks.throughput import Throughput
from vitcomposer.errors import NonFiniteError, SaveError
from vitcomposer.runs.environment import describe_environment

__all__ = [
    "AttentionMonitor",
    "BadImageCount",
    "Best",
    "Checkpoints",
    "KNNMonitor",
    "KeptPredictions",
    "MirrorRun",
    "NonFiniteError",
    "NumericsMonitor",
    "Preemption",
    "Progress",
    "RunRecord",
    "SameStatistics",
    "SaveError",
    "StepSeed",
    "Throughput",
    "build_attention_monitor",
    "build_knn_monitor",
    "build_mirror",
    "describe_environment",
    "finish_mirror",
]
