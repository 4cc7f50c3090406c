"""Batch norm with the statistics of several ranks, on GPUs and, unlike torch's, on CPUs."""

import copy
import os
from typing import Any, Literal

import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as FusedSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from vitcomposer.collectives import gather_with_gradient, rank_and_world_size
from vitcomposer.schema.ranks import sync_bn_ranks

SyncGroup = Literal["none", "global", "node"] | int


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are those of a group of ranks.

    On a GPU it is the function of ``torch.nn.SyncBatchNorm``. That class itself refuses CPUs, alone and under DDP, and
    cannot be copied by ``copy.deepcopy``.
    """

    def __init__(self, like: _BatchNorm, group: dist.ProcessGroup | None) -> None:
        super().__init__(like.num_features, like.eps, like.momentum, like.affine)
        self.process_group = group

    def forward(self, input: Tensor) -> Tensor:
        _, world_size = rank_and_world_size(self.process_group)
        if not self.training or world_size == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if input.is_cuda:
            group = self.process_group or dist.group.WORLD
            running = (self.running_mean, self.running_var, self.eps, self.momentum)
            output = FusedSyncBatchNorm.apply(input, self.weight, self.bias, *running, group, world_size)
            assert isinstance(output, Tensor)
            return output
        # Means of many values in half precision would lose most of them to rounding.
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean, variance, count = self._statistics(x)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            # The running variance is the unbiased one, as torch's.
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
        shape = (1, -1) + (1,) * (x.ndim - 2)  # (1, C, 1, 1) for images, (1, C) for features
        x = (x - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance (C,) of all ranks of the group, and the number of values they are of."""
        dims = [0, *range(2, x.ndim)]
        variance, mean = torch.var_mean(x, dim=dims, correction=0)
        count = mean.new_full((1,), x.numel() // x.shape[1])
        # One exchange for all three; ranks may have different numbers of values. (W, C), (W, C) and (W, 1).
        means, variances, counts = gather_with_gradient(torch.cat((mean, variance, count)), self.process_group).split(
            [len(mean), len(mean), 1], dim=1
        )
        total = counts.sum()
        share = counts / total
        mean = (share * means).sum(dim=0)
        # Variance of all: the mean of the ranks' variances and the variance of their means, weighted by their counts.
        # Sums of squares would lose the digits of a variance that is small beside the mean.
        return mean, (share * (variances + (means - mean).square())).sum(dim=0), total

    def _check_input_dim(self, input: Tensor) -> None:
        """Every number of spatial dimensions is fine."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        memo[id(self.process_group)] = self.process_group  # a handle, which no copy is made of
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


class _SyncBatchNormAct(SyncBatchNorm):
    """As timm's batch norms, which hold the dropout and the activation that follow them."""

    def __init__(self, like: _BatchNorm, group: dist.ProcessGroup | None) -> None:
        super().__init__(like, group)
        self.drop, self.act = like.get_submodule("drop"), like.get_submodule("act")

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def convert_sync_bn(module: nn.Module, group: SyncGroup) -> nn.Module:
    """Let every BatchNorm layer of ``module`` take its statistics from a group of ranks; changes ``module`` in place.

    Parameters, buffers and their names stay, so optimizers made before and checkpoints fit. All ranks have to call it,
    after the process group was set up. On one rank nothing changes.

    Args:
        group: ``none``, ``global`` (all ranks), ``node`` (the ranks of a node) or a number of ranks: consecutive chunks
            of it, the last one may be smaller (VISSL's GROUP_SIZE, whose 0 is ``global`` and whose -1 is ``node``).

    Returns:
        ``module``, or the new layer where it is a BatchNorm layer itself.

    Raises:
        ValueError: Another group.
        RuntimeError: There are several ranks, but no process group yet.
    """
    _, world_size = rank_and_world_size()
    size = sync_bn_ranks(group, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if world_size < int(os.environ.get("WORLD_SIZE", "1")) and group not in ("none", 1):
        raise RuntimeError("batch norm over ranks needs torch.distributed's process group: set it up before")
    return _convert(module, _own_group(size)) if size > 1 else module


def _own_group(size: int) -> dist.ProcessGroup | None:
    """This rank's chunk of ``size`` ranks; None stands for all."""
    rank, world_size = rank_and_world_size()
    if size == world_size:
        return None
    own = None
    for first in range(0, world_size, size):
        ranks = list(range(first, min(first + size, world_size)))
        made = dist.new_group(ranks)  # by all ranks for every chunk, as torch requires
        if rank in ranks and isinstance(made, dist.ProcessGroup):  # others get a number
            own = made
    return own


def _convert(module: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _convert(child, group))
    if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return module
    synced = _SyncBatchNormAct(module, group) if isinstance(module, BatchNormAct2d) else SyncBatchNorm(module, group)
    if module.affine:
        synced.weight, synced.bias = module.weight, module.bias
    for name, buffer in module.named_buffers():
        setattr(synced, name, buffer)
    return synced.train(module.training)
