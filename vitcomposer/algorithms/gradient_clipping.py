"""Clips gradients, as Composer does or each parameter's by its own norm."""

import torch
from composer.algorithms import GradientClipping
from composer.core import Event, State
from composer.loggers import Logger

PER_PARAMETER = "norm_per_parameter"


class ParameterGradientClipping(GradientClipping):
    """Composer's, with one more ``clipping_type``: ``norm_per_parameter`` bounds the norm of each parameter's gradient.

    A gradient g becomes g * min(1, threshold / (|g| + 1e-6)), as DINO clips (arXiv:2104.14294, its ``clip_gradients``);
    ``norm`` takes the norm over all parameters together.
    """

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if self.clipping_type != PER_PARAMETER:
            super().apply(event, state, logger)
        elif event == Event.AFTER_TRAIN_BATCH:
            for gradient in [p.grad for p in state.model.parameters() if p.grad is not None]:
                # All on the device: a comparison in Python would wait for it once per parameter.
                norm = torch.linalg.vector_norm(gradient)
                gradient.mul_((self.clipping_threshold / (norm + 1e-6)).clamp(max=1.0))
