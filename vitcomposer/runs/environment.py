"""Records what a run ran on: versions, git commit, hardware."""

import os
import platform
from collections import Counter
from typing import Any

import torch
from composer.utils import dist
from torch.version import cuda as cuda_version

from vitcomposer.installed import git_state, version_of
from vitcomposer.runs.machine import cpu_model, driver_of_gpus
from vitcomposer.runs.typed import typed_command

PACKAGES = (
    "torch",
    "torchvision",
    "mosaicml",
    "mosaicml-streaming",
    "timm",
    "omegaconf",
    "numpy",
    "pillow",
)


def describe_environment() -> dict[str, Any]:
    """Source, versions and hardware of this process; nothing that names the host or its user."""
    commit, dirty = git_state()
    gpus = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "command": typed_command(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count()},
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": name, "count": count} for name, count in gpus.items()],
        "gpu_driver": driver_of_gpus() if gpus else None,
        "cuda": cuda_version if gpus else None,
        "world_size": dist.get_world_size(),
        "nodes": max(1, dist.get_world_size() // dist.get_local_world_size()),
    }
