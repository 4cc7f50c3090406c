"""Train a classifier from labels and a teacher: DeiT's distillation (arXiv:2012.12877, section 4)."""

from composer import Trainer

from vitcomposer.cost.flops import forward_flops
from vitcomposer.losses import DistillationLoss
from vitcomposer.schema import Distill
from vitcomposer.tasks import DistillationTask
from vitcomposer.teacher.cache import open_cache
from vitcomposer.teacher.frozen import build_frozen_teacher
from vitcomposer.training.network import build_network, starting_point
from vitcomposer.training.setup import prepare
from vitcomposer.training.supervised import LOSSES, build_supervision


def build(cfg: Distill) -> Trainer:
    """Check the whole configuration, then build student, teacher, data and optimizer into a Trainer.

    Raises:
        ConfigError: A value or a combination that cannot run, or a teacher or its cache that does not fit, before any
            image is read.
    """
    cfg, share = prepare(cfg)
    model = build_network(cfg.model, starting_point(cfg))
    cache = open_cache(cfg) if cfg.cache else None
    teacher = None if cache else build_frozen_teacher(cfg)
    sees_unmixed = cfg.distillation.teacher_sees == "unmixed"
    task = DistillationTask(
        model,
        loss=build_loss(cfg),
        num_classes=cfg.model.num_classes,
        teacher=teacher,
        sees_unmixed=sees_unmixed,
    )
    return build_supervision(
        cfg,
        share,
        task,
        teacher_flops=forward_flops(teacher.network, teacher.image_size) if teacher else 0.0,
        keep_unmixed=sees_unmixed and teacher is not None,
        cache=cache,
        compiled=[model, teacher.network] if teacher else [model],
    )


def build_loss(cfg: Distill) -> DistillationLoss:
    """The loss of the blocks ``loss`` and ``distillation``."""
    d = cfg.distillation
    return DistillationLoss(LOSSES[cfg.loss], kind=d.kind, alpha=d.alpha, temperature=d.temperature, kl=d.kl)
