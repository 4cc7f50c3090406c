"""Train a classifier from labels: ViT (arXiv:2205.01580), DeiT (2012.12877, 2204.07118), ConViT (2103.10697)."""

from composer import Trainer

from vitcomposer.schema import Supervised
from vitcomposer.tasks import ClassificationTask
from vitcomposer.training.network import build_network, starting_point
from vitcomposer.training.setup import prepare
from vitcomposer.training.supervised import LOSSES, build_supervision


def build(cfg: Supervised) -> Trainer:
    """Check the whole configuration, then build model, data, optimizer and algorithms into a Trainer.

    Raises:
        ConfigError: A value or a combination that cannot run, before any image is read.
    """
    cfg, share = prepare(cfg)
    model = build_network(cfg.model, starting_point(cfg))
    task = ClassificationTask(model, loss=LOSSES[cfg.loss], num_classes=cfg.model.num_classes)
    return build_supervision(cfg, share, task)
