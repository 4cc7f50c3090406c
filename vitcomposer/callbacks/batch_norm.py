"""Has all ranks evaluate with the same running statistics of batch norms: those of rank 0, which a checkpoint holds."""

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitcomposer.collectives import rank_and_world_size
from vitcomposer.models.batch_norm import SyncBatchNorm


class SameStatistics(Callback):
    """After the passes of a step gives every rank the running means and variances of rank 0.

    Without it the ranks would measure different networks where batch norms are not synchronised: DDP hands out those of
    rank 0 before its next forward pass in training, so evaluations would lag by a step, and FSDP2 never does.
    """

    @torch.no_grad()
    def after_train_batch(self, state: State, logger: Logger) -> None:
        running = [each for module in state.model.modules() for each in _own_statistics(module)]
        if not running or rank_and_world_size()[1] == 1:
            return
        flat = torch.cat([each.flatten() for each in running])
        dist.broadcast(flat, src=0)
        for mine, of_rank_0 in zip(running, flat.split([each.numel() for each in running]), strict=True):
            mine.copy_(of_rank_0.view_as(mine))


def _own_statistics(module: nn.Module) -> list[Tensor]:
    """Of a batch norm that learns them, and not from all ranks."""
    if not isinstance(module, _BatchNorm) or not module.training:
        return []
    if isinstance(module, SyncBatchNorm) and module.process_group is None:
        return []
    return [each for each in (module.running_mean, module.running_var) if each is not None]
