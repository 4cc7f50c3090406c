"""SwAV (arXiv:2006.09882): views of an image predict each other's assignment to prototypes."""

from composer import Trainer

from vitcomposer.algorithms import FreezeAtStart
from vitcomposer.losses import SwAVLoss
from vitcomposer.models.heads import build_swav_head
from vitcomposer.schema.swav import SwAV
from vitcomposer.tasks import SwAVTask
from vitcomposer.training.self_supervised import build_pretraining, build_trunk, prepare_pretraining


def build(cfg: SwAV) -> Trainer:
    """Check the whole configuration, then build trunk, head, loss and data into a Trainer.

    Raises:
        ConfigError: A value or a combination that cannot run, before any image is read.
    """
    cfg, share = prepare_pretraining(cfg)
    task = build_task(cfg)
    frozen = FreezeAtStart(lambda: task.head.prototypes, cfg.loss.freeze_prototypes_epochs)
    return build_pretraining(cfg, share, task, [frozen])


def build_task(cfg: SwAV) -> SwAVTask:
    """Trunk, head and loss."""
    loss = SwAVLoss(
        num_crops=cfg.crops.total_num_crops,
        temperature=cfg.loss.temperature,
        epsilon=cfg.loss.epsilon,
        iterations=cfg.loss.sinkhorn_iterations,
        crops_for_assign=cfg.loss.crops_for_assign,
        queue_length=cfg.queue_length,
        embedding_dim=cfg.head.dims[-1],
    )
    return SwAVTask(
        build_trunk(cfg, cfg.model, cfg.head.dims),
        build_swav_head(cfg),
        loss,
        freeze_prototypes_epochs=cfg.loss.freeze_prototypes_epochs,
        hard_assignment_epochs=cfg.loss.hard_assignment_epochs,
        queue_start_epoch=cfg.loss.queue_start_epoch,
        queue_steps=cfg.queue_length // cfg.global_train_batch_size,
    )
