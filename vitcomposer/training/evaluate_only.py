"""Builds a Trainer that takes no step, for recipes that look at a network and train nothing."""

from collections.abc import Sequence

from composer import Trainer
from composer.core import Callback, DataSpec
from composer.models import ComposerModel
from torch.optim import SGD

from vitcomposer.callbacks import Preemption, Throughput
from vitcomposer.runs.folder import run_folder
from vitcomposer.schema.recipe import Recipe
from vitcomposer.training.execution import SHARDED, share_blocks
from vitcomposer.training.setup import BatchShare
from vitcomposer.training.trainer import build_loggers, build_record


def build_measurement(
    cfg: Recipe, share: BatchShare, *, task: ComposerModel, data: DataSpec, callbacks: Sequence[Callback]
) -> Trainer:
    """What ``trainer.fit`` runs the start and the end of, between which the callbacks do their work.

    Args:
        cfg: With ``max_duration: 0ba``.
        data: Composer wants a loader; nothing is read from it by the Trainer.
    """
    folder = run_folder(cfg)
    throughput = Throughput(None, cfg.precision)
    shared = cfg.run.parallelism == SHARDED
    facts = {"recipe": cfg.recipe, "model": cfg.model.name, "seed": cfg.seed, "lr_peak": None, "class_imbalance": None}
    record = build_record(cfg, facts, throughput)
    return Trainer(
        model=task,
        train_dataloader=data,
        optimizers=SGD(task.parameters(), lr=0.0),  # never stepped; without one Composer warns and makes its own
        callbacks=[throughput, Preemption(), *callbacks],
        loggers=[record, *build_loggers(cfg, folder)],
        max_duration=cfg.max_duration,
        precision=cfg.precision,
        device=share.device,
        parallelism_config=share_blocks(task, cfg.run, world_size=share.world_size) if shared else None,
        seed=cfg.seed,
        deterministic_mode=cfg.run.deterministic,
        run_name=cfg.run.name,
        progress_bar=False,
    )
