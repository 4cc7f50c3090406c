"""Copies a network without its numbers, to look at shapes and costs where nothing is computed."""

import copy
from typing import Any

import torch
from torch import nn


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose every tensor is on the meta device. ``deepcopy`` takes what its memo holds for a copy."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # vars() also finds tensors that are neither parameter nor buffer, such as cached relative positions.
        for held in (vars(module), module._parameters, module._buffers):
            for value in held.values():
                if isinstance(value, nn.Parameter):
                    memo[id(value)] = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
                elif isinstance(value, torch.Tensor):
                    memo[id(value)] = value.detach().to("meta")
    return copy.deepcopy(model, memo)
