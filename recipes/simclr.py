"""SimCLR (arXiv:2002.05709): two views of an image find each other among the views of all others."""

from composer import Trainer

from vitcomposer.models.heads import build_simclr_head
from vitcomposer.schema.simclr import SimCLR
from vitcomposer.tasks import SimCLRTask
from vitcomposer.training.self_supervised import build_pretraining, build_trunk, prepare_pretraining


def build(cfg: SimCLR) -> Trainer:
    """Check the whole configuration, then build trunk, head, loss and data into a Trainer.

    Raises:
        ConfigError: A value or a combination that cannot run, before any image is read.
    """
    cfg, share = prepare_pretraining(cfg)
    return build_pretraining(cfg, share, build_task(cfg), [])


def build_task(cfg: SimCLR) -> SimCLRTask:
    """Trunk, head and loss."""
    trunk = build_trunk(cfg, cfg.model, cfg.head.dims)
    return SimCLRTask(trunk, build_simclr_head(cfg), temperature=cfg.loss.temperature)
