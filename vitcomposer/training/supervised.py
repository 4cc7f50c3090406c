"""Builds what recipes with labels have around their task: data, stages, optimizer, evaluations and Trainer."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from composer import Trainer
from composer.core import DataSpec
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader

from vitcomposer import losses, optim
from vitcomposer.algorithms import build_algorithms, build_stage_algorithms
from vitcomposer.callbacks import build_attention_monitor
from vitcomposer.cost.flops import train_flops
from vitcomposer.curriculum import Options, Plan, build_plan, check_network, split_options
from vitcomposer.data.loader import build_dataspec, describe_columns, read_labels, set_view
from vitcomposer.schema import Supervised
from vitcomposer.tasks import ClassificationTask
from vitcomposer.teacher.cache import CachedTeacher
from vitcomposer.training.placement import place_rand_augment
from vitcomposer.training.setup import BatchShare
from vitcomposer.training.trainer import build_evaluators, build_trainer, check_evaluation_size

LOSSES = {
    "soft_target_cross_entropy": losses.soft_target_cross_entropy,
    "binary_cross_entropy": losses.binary_cross_entropy,
}


def build_supervision(
    cfg: Supervised,
    share: BatchShare,
    task: ClassificationTask,
    *,
    teacher_flops: float = 0.0,
    keep_unmixed: bool = False,
    cache: CachedTeacher | None = None,
    compiled: Sequence[nn.Module] = (),
) -> Trainer:
    """The Trainer of a classifier.

    Args:
        teacher_flops: Of another network's forward pass, for each training image.
        keep_unmixed: As ``TrainTransform``.
        cache: Decides the training views and brings a teacher's answers to them.
        compiled: As ``build_trainer``.

    Raises:
        ConfigError: Algorithms or data that do not fit the network.
    """
    model = task.model
    check_evaluation_size(cfg, model)
    options, others = split_options(cfg.algorithms)
    check_network(options, model, image_size=cfg.model.image_size, rand_augment=cfg.augment.rand_augment)
    algorithms = build_algorithms(
        others, loss=cfg.loss, precision=cfg.precision, label_smoothing=cfg.mixing.label_smoothing
    )
    train = build_dataspec(
        cfg,
        "train",
        seed=cfg.seed,
        device_batch_size=share.device_train_batch_size,
        keep_unmixed=keep_unmixed,
        teacher=cache,
    )
    cfg = place_rand_augment(cfg, share, train)
    if cfg.logit_adjustment:
        _adjust_logits(cfg, task, train)
    plan = _plan_stages(cfg, options, model, train, teacher_flops)
    set_view(train, plan.view)
    columns = describe_columns(cfg, train, [stage.image_size for stage in plan.stages])
    if columns and dist.get_global_rank() == 0:
        print(columns, flush=True)
    val = build_dataspec(cfg, "val", seed=cfg.seed, device_batch_size=share.device_eval_batch_size)
    val_loader: Any = val.dataloader
    augment = cfg.augment
    return build_trainer(
        cfg,
        share,
        task=task,
        train=train,
        evaluators=build_evaluators(val, task, ema="EMA" in cfg.algorithms, interval=cfg.run.eval_interval),
        optimizer=optim.build_optimizer(model, cfg.optimizer, global_train_batch_size=cfg.global_train_batch_size),
        algorithms=[*algorithms, *build_stage_algorithms(options, plan, model)],
        train_flops_per_image=plan.train_flops_per_image,
        compute_share=plan.compute_share,
        callbacks=build_attention_monitor(cfg, model, val_loader.dataset, mean=augment.mean, std=augment.std),
        compiled=compiled,
    )


def _adjust_logits(cfg: Supervised, task: ClassificationTask, train: DataSpec) -> None:
    """Give the task the loss that knows how many training images each class has."""
    dataset: Any = cast(DataLoader, train.dataloader).dataset
    labels = read_labels(dataset, cfg.model.num_classes)
    counts = torch.from_numpy(labels).bincount(minlength=cfg.model.num_classes)  # (K,)
    task.loss_function = losses.LogitAdjustedCrossEntropy(counts, cfg.logit_adjustment)


def _plan_stages(
    cfg: Supervised, options: Options | None, model: nn.Module, train: DataSpec, teacher_flops: float
) -> Plan:
    """What each step of the run sees and costs; the length of the loader is that of an epoch."""

    def with_teacher(network: nn.Module, image_size: int, **kept: float) -> float:
        return train_flops(network, image_size, train_blocks=cfg.init.train_blocks, **kept) + teacher_flops

    return build_plan(
        options,
        model,
        image_size=cfg.model.image_size,
        max_duration=cfg.max_duration,
        steps_per_epoch=len(cast(DataLoader, train.dataloader)),
        images_per_step=cfg.global_train_batch_size,
        train_flops=with_teacher,
    )
