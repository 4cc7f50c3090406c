"""Sums and collects tensors over all ranks; where there is one rank, at no cost.

All ranks of the group have to call the functions, in the same order: a rank that leaves one out is waited for. W is the
number of ranks of the group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """This process among those of ``group``, None for all; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """``tensor`` combined over all ranks, in place and without gradient."""
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(tensor, op)
    return tensor


def gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Every rank's ``tensor``, of one shape, as (W, *shape), without gradient."""
    _, world_size = rank_and_world_size(group)
    if world_size == 1:
        return tensor.detach()[None]
    # One flat buffer: a list of outputs would be copied together once more.
    flat = tensor.new_empty(world_size * tensor.numel())
    dist.all_gather_into_tensor(flat, tensor.detach().reshape(-1), group=group)
    return flat.view(world_size, *tensor.shape)


def gather_with_gradient(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """As ``gather``; a gradient flows to every rank from what all ranks made of its tensor.

    It is the sum over the ranks' losses. Where DDP averages the gradients of parameters after that, the result is the
    gradient of the mean loss.
    """
    if rank_and_world_size(group)[1] == 1:
        return tensor[None]
    gathered = _Gather.apply(tensor, group)
    assert isinstance(gathered, Tensor)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # (W, *shape): summed over the ranks, row r is what all of them made of the tensor of rank r.
        # A copy, since autograd may hand the same tensor to other functions.
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[dist.get_rank(ctx.group)], None
