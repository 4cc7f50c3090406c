"""Seeds the random numbers of each step by the step alone, so that a resumed run draws the same ones."""

import random

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from vitcomposer.data.random import random_key


class StepSeed(Callback):
    """Seeds the global generators before every step from (seed, step, rank).

    Stochastic depth and dropout draw from torch's generator, some of Composer's algorithms from numpy's. Composer 0.32
    restores none of them when a run with a StreamingDataset resumes inside an epoch, so the resumed run would drop
    other blocks. Seeded by the step, they are those of the run that was never interrupted.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        key = random_key(self.seed, state.timestamp.batch.value, dist.get_global_rank())
        # torch.manual_seed notes down a stack of calls for each kind of device that is not in use: 1.6 ms of each step.
        torch.default_generator.manual_seed(key)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(key)
        np.random.seed(key & 0xFFFFFFFF)
        random.seed(key)
