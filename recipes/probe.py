"""Linear classifiers on features, as SwAV (arXiv:2006.09882), DINO (2104.14294) and MoCo-v3 (2104.02057) report."""

import itertools
from dataclasses import replace

from composer import Trainer

from vitcomposer import optim
from vitcomposer.cost.flops import forward_flops
from vitcomposer.data.loader import build_dataspec
from vitcomposer.schema import Probe
from vitcomposer.tasks import Head, LinearProbeTask
from vitcomposer.training.network import build_network, starting_point
from vitcomposer.training.setup import prepare
from vitcomposer.training.trainer import build_evaluators, build_trainer, check_evaluation_size


def build(cfg: Probe) -> Trainer:
    """Check the whole configuration, then put every head on one frozen trunk, into a Trainer.

    Raises:
        ConfigError: A value or a combination that cannot run, before any image is read.
    """
    cfg, share = prepare(cfg)
    trunk = build_network(replace(cfg.model, num_classes=0), starting_point(cfg))
    check_evaluation_size(cfg, trunk)
    flops = forward_flops(trunk, cfg.model.image_size)
    combinations = itertools.product(cfg.heads.features, cfg.heads.lr_factors, cfg.heads.batch_norm)
    task = LinearProbeTask(trunk, [Head(*each) for each in combinations], num_classes=cfg.model.num_classes)
    optimizer = optim.build_optimizer(task, cfg.optimizer, global_train_batch_size=cfg.global_train_batch_size)
    task.apply_lr_factors(optimizer)
    train = build_dataspec(cfg, "train", seed=cfg.seed, device_batch_size=share.device_train_batch_size)
    val = build_dataspec(cfg, "val", seed=cfg.seed, device_batch_size=share.device_eval_batch_size)
    return build_trainer(
        cfg,
        share,
        task=task,
        train=train,
        evaluators=build_evaluators(val, task, ema=False, interval=cfg.run.eval_interval),
        optimizer=optimizer,
        algorithms=[],
        train_flops_per_image=lambda step: flops,  # no backward pass through the trunk; the heads are small
    )
