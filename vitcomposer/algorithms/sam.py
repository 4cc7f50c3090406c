"""Sharpness-aware minimization (SAM) that can be resumed."""

import warnings
from typing import Any

import torch
from composer.algorithms import SAM
from composer.algorithms.sam import SAMOptimizer
from composer.core import Event, State
from composer.loggers import Logger
from torch.optim import Optimizer


class ResumableSAM(SAM):
    """Composer's sharpness-aware minimization (arXiv:2010.01412), with checkpoints that can be resumed.

    Composer's wrapper saves its own perturbation and not the moments of the optimizer it wraps, so a resumed run starts
    them at zero. Here a checkpoint holds the wrapped optimizer, as if there were no SAM, and the count of steps follows
    the batch, so resuming on as many ranks is exact. Every ``interval``-th step costs two forward and backward passes.
    """

    def __init__(self, rho: float = 0.05, epsilon: float = 1e-12, interval: int = 1) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="SAM has known issues")  # the one that this class mends
            super().__init__(rho, epsilon, interval)

    def apply(self, event: Event, state: State, logger: Logger | None) -> None:
        (optimizer,) = state.optimizers
        super().apply(event, state, logger)  # for the gradient scaler that can call the closure twice
        # Composer files an optimizer under its class name, and this event comes after the load into the plain one.
        name = type(optimizer).__qualname__
        cls = type(name, (_SAMOptimizer,), {"__qualname__": name})
        wrapped = cls(optimizer, rho=self.rho, epsilon=self.epsilon, interval=self.interval)
        wrapped.global_step = int(state.timestamp.batch)
        state.optimizers = (wrapped,)


class _SAMOptimizer(SAMOptimizer):
    """Returns from the climb to the very weights it left, where Composer's subtracts the perturbation again.

    Ranks climb along their own gradients, so what that subtraction rounds off would let their weights drift apart.
    """

    def __init__(self, base_optimizer: Optimizer, **options: Any) -> None:
        super().__init__(base_optimizer, **options)
        # Saving an optimizer with an empty state makes torch take a trial step, which SAM cannot without a closure.
        for parameter in self._parameters():
            self.state[parameter]["weight"] = parameter.detach().clone()

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb by rho along the gradient (eq. 2 of the paper), from weights that are kept."""
        for parameter in self._parameters():
            self.state[parameter]["weight"].copy_(parameter)
        super().first_step()
        for parameter in self._parameters():
            self.state[parameter].pop("e_w", None)

    @torch.no_grad()
    def sub_e_w(self) -> None:
        """Return to the weights before the climb."""
        for parameter in self._parameters():
            parameter.copy_(self.state[parameter]["weight"])

    @torch.no_grad()
    def second_step(self) -> None:
        """Step from there by the gradient at the top of the climb."""
        self.sub_e_w()
        self.base_optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self.base_optimizer.state_dict()
