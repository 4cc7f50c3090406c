"""Builds what recipes without labels have around their task: trunk, crops, optimizer, k-NN monitor and Trainer."""

from collections.abc import Sequence
from typing import Any, TypeVar

from composer import Trainer
from composer.core import Algorithm, Callback, DataSpec
from composer.utils import dist
from torch import nn

from vitcomposer import optim
from vitcomposer.algorithms import BeginStep, build_algorithms
from vitcomposer.callbacks import build_attention_monitor, build_knn_monitor
from vitcomposer.data.evaluation import build_centre_crops, open_images
from vitcomposer.data.multicrop_loader import build_multicrop_dataspec
from vitcomposer.errors import require
from vitcomposer.models import convert_sync_bn
from vitcomposer.models.batch_norm import SyncBatchNorm
from vitcomposer.models.trunks import Trunk, pooled_width
from vitcomposer.schema import Model, SelfSupervised
from vitcomposer.schema.ranks import adjustments
from vitcomposer.tasks import SelfSupervisedTask
from vitcomposer.training.network import build_network, starting_point
from vitcomposer.training.setup import BatchShare, prepare
from vitcomposer.training.trainer import build_trainer, check_evaluation_size

_Method = TypeVar("_Method", bound=SelfSupervised)


def prepare_pretraining(cfg: _Method) -> tuple[_Method, BatchShare]:
    """Start the process group, share the batch out and say what is rounded for it.

    Returns:
        As :func:`vitcomposer.training.setup.prepare`.

    Raises:
        ConfigError: A batch that cannot run here.
    """
    cfg, share = prepare(cfg)
    if dist.get_global_rank() == 0:
        for line in adjustments(cfg, share.world_size):
            print(line)
    return cfg, share


def build_trunk(
    cfg: SelfSupervised, model: Model, dims: Sequence[int] | None = None, key: str = "head.dims"
) -> nn.Module:
    """The network of the block ``model``, which takes every size of the crops.

    Args:
        dims: Widths of the head above it, which begin with that of the features; None if the head follows by itself.

    Raises:
        ConfigError: A network that is not there, or does not fit its crops or its head.
    """
    trunk = build_network(model, starting_point(cfg))
    check_evaluation_size(cfg, trunk)
    patch = getattr(trunk, "patch_size", 1)
    fits = all(size % patch == 0 for size in cfg.crops.size_crops)
    remedy = f"A patch has {patch} pixels: use multiples of it."
    require(fits, "crops.size_crops", f"divisible by {patch}", cfg.crops.size_crops, remedy)
    if isinstance(trunk, Trunk):
        for size in sorted(set(cfg.crops.size_crops)):
            trunk.require_size(size, "crops.size_crops")
    width = pooled_width(trunk)
    fits = dims is None or dims[0] == width
    require(fits, key, f"widths that begin with {width}, that of {model.name}", dims, f"Write {width} first.")
    return trunk


def build_pretraining(
    cfg: SelfSupervised, share: BatchShare, task: SelfSupervisedTask, algorithms: Sequence[Algorithm]
) -> Trainer:
    """The Trainer of a task.

    Args:
        algorithms: The method's own. They come after those of the yaml, and so before them in the AFTER events.
    """
    convert_sync_bn(task, cfg.sync_bn)  # pyright: ignore[reportArgumentType] (the schema has checked its words)
    _check_compile(cfg, task)
    flops = task.train_flops_per_image(cfg.crops.sizes)
    chosen = build_algorithms(cfg.algorithms, loss=cfg.recipe, precision=cfg.precision, label_smoothing=0.0)
    train = build_multicrop_dataspec(cfg, device_batch_size=share.device_train_batch_size)
    return build_trainer(
        cfg,
        share,
        task=task,
        train=train,
        evaluators=[],
        optimizer=optim.build_optimizer(task, cfg.optimizer, global_train_batch_size=cfg.global_train_batch_size),
        algorithms=[BeginStep(task), *chosen, *algorithms],
        train_flops_per_image=lambda step: flops,
        callbacks=_monitors(cfg, share, task, train),
        # Heads and losses talk to the other ranks, which no graph can.
        compiled=task.trunks,
    )


def _check_compile(cfg: SelfSupervised, task: SelfSupervisedTask) -> None:
    synced = any(isinstance(module, SyncBatchNorm) for trunk in task.trunks for module in trunk.modules())
    rule = f"false with sync_bn={cfg.sync_bn} and {cfg.model.name}, whose batch norms take no part in a graph"
    require(not (cfg.run.compile and synced), "run.compile", rule, True, "Or set sync_bn=none.")


def _monitors(cfg: SelfSupervised, share: BatchShare, task: SelfSupervisedTask, train: DataSpec) -> list[Callback]:
    if cfg.monitor is None and cfg.run.attention_interval is None:
        return []
    size, crops = share.device_eval_batch_size, cfg.crops
    val = open_images(cfg, "val", batch_size=size)
    attention = build_attention_monitor(cfg, task.trunk, val, mean=crops.mean, std=crops.std)
    if cfg.monitor is None:
        return attention
    loader: Any = train.dataloader
    neighbours, queries = (
        build_centre_crops(cfg, images, mean=crops.mean, std=crops.std, device_batch_size=size, num_samples=samples)
        for images, samples in (
            (loader.dataset, cfg.monitor.train_samples),
            (val, None),
        )
    )
    return [*attention, build_knn_monitor(cfg.monitor, task, neighbours, queries, key="monitor")]
