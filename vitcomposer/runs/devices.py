"""Says what this machine computes with: the kind of its device, and the precision that ``auto`` stands for."""

from dataclasses import replace
from typing import TypeVar

import torch

from vitcomposer.schema.recipe import Recipe

_Recipe = TypeVar("_Recipe", bound=Recipe)


def current_device() -> str:
    """What Composer calls the device of this rank."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def with_precision(cfg: _Recipe) -> _Recipe:
    """The configuration with a precision that is not ``auto``: bfloat16 on a GPU that computes with it, else float32.

    Raises:
        ConfigError: Something of the configuration does not go with that precision.
    """
    if cfg.precision != "auto":
        return cfg
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(cfg, precision="amp_bf16" if has_bf16 else "fp32")
