"""Composer callbacks: what a run shows, what it leaves behind and how it stops."""

from vitcomposer.callbacks.attention import AttentionMonitor, build_attention_monitor
from vitcomposer.callbacks.knn import KNNMonitor, build_knn_monitor
from vitcomposer.callbacks.preemption import Preemption
from vitcomposer.callbacks.progress import Progress
from vitcomposer.callbacks.record import RunRecord, describe_environment
from vitcomposer.callbacks.step_seed import StepSeed
from vitcomposer.callbacks.throughput import Throughput

__all__ = [
    "AttentionMonitor",
    "KNNMonitor",
    "Preemption",
    "Progress",
    "RunRecord",
    "StepSeed",
    "Throughput",
    "build_attention_monitor",
    "build_knn_monitor",
    "describe_environment",
]
