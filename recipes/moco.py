"""MoCo-v3 (arXiv:2104.02057): each view of an image finds the key that a momentum encoder makes of the other."""

from composer import Trainer

from vitcomposer.algorithms import MomentumEncoder
from vitcomposer.errors import require
from vitcomposer.models.heads import build_moco_heads
from vitcomposer.schema.moco import MoCo
from vitcomposer.tasks import MoCoTask
from vitcomposer.tasks.moco import freeze_patch_projection
from vitcomposer.training.self_supervised import build_pretraining, build_trunk, prepare_pretraining


def build(cfg: MoCo) -> Trainer:
    """Check the whole configuration, then build encoders, heads, loss and data into a Trainer.

    Raises:
        ConfigError: A value or a combination that cannot run, before any image is read.
    """
    cfg, share = prepare_pretraining(cfg)
    task = build_task(cfg)
    pairs = [(task.momentum_trunk, task.trunk), (task.momentum_projector, task.projector)]
    return build_pretraining(cfg, share, task, [MomentumEncoder(pairs, cfg.loss.momentum)])


def build_task(cfg: MoCo) -> MoCoTask:
    """Both trunks, their heads and the loss."""
    dims = cfg.head.projector_dims
    trunk, momentum_trunk = (build_trunk(cfg, cfg.model, dims, "head.projector_dims") for _ in range(2))
    if cfg.loss.freeze_patch_projection:
        has_patches = hasattr(trunk, "patch_embed") and cfg.model.stem != "conv"
        network = f"{cfg.model.name}{' and model.stem=conv' if cfg.model.stem == 'conv' else ''}"
        remedy = "Set it to false."
        require(has_patches, "loss.freeze_patch_projection", f"false with {network}", True, remedy)
        freeze_patch_projection(trunk)
    return MoCoTask(trunk, momentum_trunk, *build_moco_heads(cfg), temperature=cfg.loss.temperature)
