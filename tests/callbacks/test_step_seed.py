"""What a step draws depends on seed, step and rank, not on what was drawn before."""

import random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from vitcomposer.callbacks import StepSeed


def draws(seed: int, batch: int) -> tuple[float, float, float]:
    torch.rand(3), np.random.rand(2), random.random()  # what went before must not matter
    state = cast(Any, SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=batch))))
    StepSeed(seed).batch_start(state, cast(Any, None))
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_a_step_draws_the_same_numbers_whenever_it_comes() -> None:
    assert draws(0, 7) == draws(0, 7)
    assert draws(0, 7) != draws(0, 8)
    assert draws(0, 7) != draws(1, 7)
