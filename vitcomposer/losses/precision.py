"""Computes losses in float32 even where autocast hands over bfloat16 or float16."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32; float64 stays float64.

    A sum over thousands of classes, or a division by a small temperature, is too much for the 8 or 11 bits of a half.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
