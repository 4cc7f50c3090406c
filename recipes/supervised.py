"""Train a classifier from labels: ViT (arXiv:2205.01580), DeiT (2012.12877, 2204.07118), ConViT (2103.10697)."""

from typing import cast

from composer import Trainer
from composer.core import DataSpec
from torch import nn
from torch.utils.data import DataLoader

from vitcomposer import losses, optim
from vitcomposer.algorithms import build_algorithms, build_stage_algorithms
from vitcomposer.curriculum import Options, Plan, build_plan, check_network, split_options
from vitcomposer.data.loader import build_dataspec, set_view
from vitcomposer.flops import forward_flops
from vitcomposer.schema import Supervised, require
from vitcomposer.tasks import Classification
from vitcomposer.trainer import Placement, build_evaluators, build_network, build_trainer, prepare

LOSSES = {
    "soft_target_cross_entropy": losses.soft_target_cross_entropy,
    "binary_cross_entropy": losses.binary_cross_entropy,
}


def build(cfg: Supervised) -> Trainer:
    """Check the whole configuration, then build model, data, optimizer and algorithms into a Trainer.

    Raises:
        ConfigError: A value or a combination that cannot run, before any image is read.
    """
    check(cfg)
    run = prepare(cfg)
    check_mixing(cfg, run)
    model = build_network(cfg.model, cfg.init)
    options, others = split_options(cfg.algorithms)
    check_network(options, model, image_size=cfg.model.image_size, rand_augment=cfg.augment.rand_augment)
    algorithms = build_algorithms(
        others, loss=cfg.loss, precision=cfg.precision, label_smoothing=cfg.mixing.label_smoothing
    )
    train = build_dataspec(cfg, "train", seed=cfg.seed, device_batch_size=run.device_train_batch_size)
    plan = plan_stages(cfg, options, model, train)
    set_view(train, plan.view)
    val = build_dataspec(cfg, "val", seed=cfg.seed, device_batch_size=run.device_eval_batch_size)
    task = Classification(model, loss=LOSSES[cfg.loss], num_classes=cfg.model.num_classes)
    return build_trainer(
        cfg,
        run,
        task=task,
        train=train,
        evaluators=build_evaluators(val, task, ema="EMA" in cfg.algorithms, interval=cfg.run.eval_interval),
        optimizer=optim.build_optimizer(model, cfg.optimizer, global_train_batch_size=cfg.global_train_batch_size),
        algorithms=[*algorithms, *build_stage_algorithms(options, plan, model)],
        train_flops_per_image=plan.train_flops_per_image,
    )


def plan_stages(cfg: Supervised, options: Options | None, model: nn.Module, train: DataSpec) -> Plan:
    """What each step of the run sees and costs; the length of the loader is that of an epoch."""
    return build_plan(
        options,
        model,
        image_size=cfg.model.image_size,
        max_duration=cfg.max_duration,
        steps_per_epoch=len(cast(DataLoader, train.dataloader)),
        images_per_step=cfg.global_train_batch_size,
        forward_flops=forward_flops,
    )


def check(cfg: Supervised) -> None:
    """What only this method knows: which of its choices exclude each other."""
    optim.check_schedule(cfg.max_duration, cfg.schedule)
    require(
        cfg.loss != "binary_cross_entropy" or cfg.mixing.label_smoothing == 0,
        "mixing.label_smoothing",
        "0 with loss: binary_cross_entropy, which counts every class with a target above 0 as present",
        cfg.mixing.label_smoothing,
        "Set mixing.label_smoothing=0.",
    )
    require(
        "LabelSmoothing" not in cfg.algorithms or "distilled" not in cfg.model.name,
        "algorithms.LabelSmoothing",
        "left out with a distilled model, which has two outputs",
        cfg.model.name,
        "Set mixing.label_smoothing instead, which does the same.",
    )


def check_mixing(cfg: Supervised, run: Placement) -> None:
    """Mixing pairs the images of a device's batch."""
    mixes = cfg.mixing.mixup_alpha > 0 or cfg.mixing.cutmix_alpha > 0
    require(
        not mixes or run.device_train_batch_size % 2 == 0,
        "global_train_batch_size",
        f"an even number of images for each of the {run.world_size} ranks, since mixing pairs images",
        cfg.global_train_batch_size,
        f"Use {2 * run.world_size * -(-run.device_train_batch_size // 2)}.",
    )
