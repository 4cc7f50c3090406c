"""Switches schedule-free AdamW between the weights that it trains at and those that are measured and saved."""

from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from schedulefree import AdamWScheduleFree


class ScheduleFreeWeights(Algorithm):
    """Puts the average of schedule-free AdamW (arXiv:2405.15682) into the model wherever nothing is trained.

    Gradients are taken at ``y``, and what is learnt is the average ``x``: evaluations, checkpoints and the model after
    ``fit`` hold ``x``. The optimizer can go from one to the other, but not back to the very bits, so ``y`` is kept
    meanwhile, and lies in the checkpoint in the state of this algorithm: neither an evaluation nor a resume changes
    the training.
    """

    def __init__(self) -> None:
        self._trained: list[torch.Tensor] = []  # y in the order of the optimizer, while the model holds x

    def match(self, event: Event, state: State) -> bool:
        if event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT):
            savers = [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]
            return any(saver.save_interval(state, event) for saver in savers)
        return event in (Event.INIT, Event.BATCH_START, Event.EVAL_START, Event.FIT_END)

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        (optimizer,) = state.optimizers
        assert isinstance(optimizer, AdamWScheduleFree), "only its recipe adds this algorithm"
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if event == Event.INIT:
            optimizer.train()  # it refuses a step otherwise, and loading a checkpoint takes a trial step
        elif event == Event.BATCH_START:
            if self._trained:
                optimizer.train()
                for weight, trained in zip(weights, self._trained, strict=True):
                    weight.copy_(trained)
                self._trained = []
        elif not self._trained:
            self._trained = [weight.clone() for weight in weights]
            optimizer.eval()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "trained": self._trained}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        self._trained = state["trained"]
