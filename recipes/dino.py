"""DINO (arXiv:2104.14294): a student learns from crops what its own average says about the whole image."""

from dataclasses import replace

from composer import Trainer

from vitcomposer.algorithms import CosineWeightDecay, FreezeAtStart, MomentumEncoder
from vitcomposer.losses import DINOLoss
from vitcomposer.models.heads import build_dino_head
from vitcomposer.models.trunks import pooled_width
from vitcomposer.schema.dino import DINO
from vitcomposer.tasks import DINOTask
from vitcomposer.training.self_supervised import build_pretraining, build_trunk, prepare_pretraining


def build(cfg: DINO) -> Trainer:
    """Check the whole configuration, then build student, teacher, loss and data into a Trainer.

    Raises:
        ConfigError: A value or a combination that cannot run, before any image is read.
    """
    cfg, share = prepare_pretraining(cfg)
    task = build_task(cfg)
    pairs = [(task.teacher_trunk, task.trunk), (task.teacher_head, task.head)]
    algorithms = [
        CosineWeightDecay(cfg.optimizer.weight_decay, cfg.loss.weight_decay_end),
        MomentumEncoder(pairs, cfg.loss.momentum),
        FreezeAtStart(task.head.last_layer.parameters, cfg.loss.freeze_last_layer_epochs),
    ]
    return build_pretraining(cfg, share, task, algorithms)


def build_task(cfg: DINO) -> DINOTask:
    """Student, teacher and loss."""
    trunk = build_trunk(cfg, cfg.model)
    head = build_dino_head(cfg, pooled_width(trunk))
    loss = DINOLoss(
        cfg.head.out_dim,
        student_temperature=cfg.loss.student_temperature,
        center_momentum=cfg.loss.center_momentum,
    )
    return DINOTask(
        trunk,
        build_trunk(cfg, replace(cfg.model, drop_path_rate=0.0)),
        head,
        loss,
        teacher_temperature=cfg.loss.teacher_temperature,
        teacher_temperature_start=cfg.loss.teacher_temperature_start,
        teacher_temperature_warmup_epochs=cfg.loss.teacher_temperature_warmup_epochs,
    )
