"""Train a classifier from labels and a teacher: DeiT's distillation (arXiv:2012.12877, section 4)."""

from composer import Trainer

from vitcomposer.data.teacher_cache import open_cache
from vitcomposer.flops import forward_flops
from vitcomposer.losses import DistillationLoss
from vitcomposer.schema import Distill, require
from vitcomposer.supervision import LOSSES, build_supervision, prepare_supervision
from vitcomposer.tasks import Distillation, build_frozen_teacher
from vitcomposer.trainer import build_network, starting_point


def build(cfg: Distill) -> Trainer:
    """Check the whole configuration, then build student, teacher, data and optimizer into a Trainer.

    Raises:
        ConfigError: A value or a combination that cannot run, or a teacher or its cache that does not fit, before any
            image is read.
    """
    check(cfg)
    run = prepare_supervision(cfg)
    model = build_network(cfg.model, starting_point(cfg))
    cache = open_cache(cfg) if cfg.cache else None
    teacher = None if cache else build_frozen_teacher(cfg)
    sees_unmixed = cfg.distillation.teacher_sees == "unmixed"
    task = Distillation(
        model,
        loss=build_loss(cfg),
        num_classes=cfg.model.num_classes,
        teacher=teacher,
        sees_unmixed=sees_unmixed,
    )
    return build_supervision(
        cfg,
        run,
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


def check(cfg: Distill) -> None:
    """What only this method knows: which of its choices say nothing."""
    chosen = cfg.distillation
    remedy = "Use recipe: supervised to learn from labels alone."
    require(chosen.alpha > 0, "distillation.alpha", "above 0, or the teacher works for nothing", chosen.alpha, remedy)
    rule = "below 1 with a distilled model, whose class head would learn nothing"
    fits = chosen.alpha < 1 or "distilled" not in cfg.model.name
    require(fits, "distillation.alpha", rule, chosen.alpha, "Use the name without _distilled.")
    fits = chosen.kind == "soft" or chosen.temperature == 1
    rule = "1 with kind: hard, which does not depend on it"
    require(fits, "distillation.temperature", rule, chosen.temperature, "Set distillation.temperature=1.")
    stages = cfg.algorithms.get("Curriculum")
    rule = "left out with a cache, whose views are all of model.image_size"
    require(not (cfg.cache and stages), "algorithms.Curriculum", rule, stages, "Drop it, or set cache=null.")
