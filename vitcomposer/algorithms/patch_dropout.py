"""Drops patches on a schedule: early steps show the network a random part of each image's patches."""

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from vitcomposer.curriculum import Plan


class PatchDropout(Algorithm):
    """PatchDropout (arXiv:2208.07220) with a share of the patches that grows in few levels.

    Sets ``num_patches_kept`` of the network before each step; the network draws each sample's subset, in training mode
    only, so evaluation sees all patches. Few levels, because each is a compiled graph.

    Prints the plan on rank 0; logs ``patch_dropout/patches``.

    Args:
        network: Has the attribute ``num_patches_kept``.
    """

    def __init__(self, plan: Plan, network: nn.Module) -> None:
        self.plan = plan
        self.network = network

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.FIT_START, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            if dist.get_global_rank() == 0:
                print(f"PatchDropout\n{self.plan.table()}", flush=True)
            return
        kept = self.plan.stage_of(state.timestamp.batch.value).num_patches_kept
        setattr(self.network, "num_patches_kept", kept)  # noqa: B010 (nn.Module declares no such attribute)
        if kept is not None:
            logger.log_metrics({"patch_dropout/patches": kept})
