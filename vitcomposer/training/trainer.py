"""Builds the composer.Trainer of every recipe, the one place that does, and resumes it from its run folder."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer import Algorithm, Evaluator, Trainer
from composer.core import Callback, DataSpec, State
from composer.loggers import LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from composer.models import ComposerModel
from composer.utils import MissingConditionalImportError, dist
from torch import nn
from torch.optim import Optimizer

from vitcomposer import config, optim
from vitcomposer.algorithms.run_length import total_steps
from vitcomposer.algorithms.schedule_free import ScheduleFreeWeights
from vitcomposer.callbacks import (
    BadImageCount,
    Best,
    Checkpoints,
    KeptPredictions,
    NumericsMonitor,
    Preemption,
    Progress,
    RunRecord,
    SameStatistics,
    StepSeed,
    Throughput,
    build_mirror,
)
from vitcomposer.data.labels import class_imbalance
from vitcomposer.errors import ConfigError, require
from vitcomposer.escape import message
from vitcomposer.models.cpu_linear import speed_up_linears
from vitcomposer.models.trunks import Trunk
from vitcomposer.models.weights.averages import EMA_LABEL
from vitcomposer.runs import layout
from vitcomposer.runs.checkpoint_loading import own_reader
from vitcomposer.runs.folder import (
    check_images,
    checkpoint_to_load,
    run_folder,
)
from vitcomposer.runs.identity import identity_of
from vitcomposer.runs.typed import typed_command
from vitcomposer.schema.algorithms import SCHEDULE_FREE
from vitcomposer.schema.recipe import Recipe, Trainable
from vitcomposer.training.execution import (
    SHARDED,
    average_gradients,
    check_shares,
    compile_networks,
    recompute_activations,
    share_blocks,
)
from vitcomposer.training.setup import BatchShare


def check_evaluation_size(cfg: Recipe, network: nn.Module) -> None:
    """Refuse images for evaluation that the network cannot cut into patches: it would fail after an epoch of training.

    Raises:
        ConfigError: ``evaluation.image_size``.
    """
    size, patch = cfg.evaluation.image_size, getattr(network, "patch_size", 1)
    below, above = max(1, (size or patch) // patch) * patch, -(-(size or patch) // patch) * patch
    remedy = f"Use {below} or {above}."
    require(size is None or size % patch == 0, "evaluation.image_size", f"divisible by {patch}", size, remedy)
    if isinstance(network, Trunk) and size is not None:
        network.require_size(size, "evaluation.image_size")


def build_evaluators(val: DataSpec, task: ComposerModel, *, ema: bool, interval: str) -> list[Evaluator]:
    """``eval`` measures the raw weights; ``ema``, where there is an average, measures that on the same images."""
    names = list(task.get_metrics(is_train=False))
    labels = ["eval", EMA_LABEL] if ema else ["eval"]
    return [Evaluator(label=lb, dataloader=val, metric_names=names, eval_interval=interval) for lb in labels]


@own_reader()
def build_trainer(  # noqa: PLR0913 (all but two are named at the call)
    cfg: Trainable,
    share: BatchShare,
    *,
    task: ComposerModel,
    train: DataSpec,
    evaluators: Sequence[Evaluator],
    optimizer: Optimizer,
    algorithms: Sequence[Algorithm],
    train_flops_per_image: Callable[[int], float],
    compute_share: Callable[[float], float] | None = None,
    callbacks: Sequence[Callback] = (),
    compiled: Sequence[nn.Module] = (),
) -> Trainer:
    """The Trainer of every recipe: it resumes from the run folder by itself and leaves its story there.

    Args:
        evaluators: May be empty: a task without labels has nothing to evaluate by itself.
        train_flops_per_image: FLOPs of one training image at a step.
        compute_share: Of the run's FLOPs, spent before a step; None where all steps cost the same.
        callbacks: The recipe's own, after those of every run.
        compiled: Whose forward passes ``run.compile`` is about; none is the whole task's.
    """
    folder = run_folder(cfg)
    peak_lr = cfg.optimizer.peak_lr(cfg.global_train_batch_size)
    throughput = Throughput(train_flops_per_image=train_flops_per_image, precision=cfg.precision)
    facts = {"recipe": cfg.recipe, "model": cfg.model.name, "seed": cfg.seed, "lr_peak": peak_lr}
    facts["class_imbalance"] = imbalance = class_imbalance(cfg.data)
    every: list[Callback] = [throughput, Preemption(), StepSeed(cfg.seed), SameStatistics(), BadImageCount()]
    skip, latest = cfg.run.skip_nonfinite_steps, folder / layout.LATEST_CHECKPOINT
    every.append(NumericsMonitor(train, seed=cfg.seed, latest=latest, skip_steps=skip))
    if evaluators:
        every.append(KeptPredictions(folder))
    best = _build_best(cfg, folder, throughput)
    every.append(best)
    if cfg.run.progress_bar and cfg.run.output != "quiet":
        every.append(Progress(throughput, output=cfg.run.output, class_imbalance=imbalance))
    if cfg.run.remote is not None:
        every.append(build_mirror(cfg, folder))
    saver = Checkpoints(
        folder / layout.CHECKPOINTS,
        interval=cfg.run.save_interval,
        keep=cfg.run.keep_checkpoints,
        throughput=throughput,
        best=best,
    )
    record = build_record(cfg, facts, throughput, best)
    schedule = optim.CosineWithWarmup(
        cfg.schedule.t_warmup,
        alpha_i=cfg.schedule.alpha_i,
        alpha_f=cfg.schedule.alpha_f,
        cosine_from=cfg.schedule.cosine_from,
        global_train_batch_size=cfg.global_train_batch_size,
        compute_share=compute_share if cfg.schedule.progress == "compute" else None,
    )
    if cfg.optimizer.name == SCHEDULE_FREE:
        algorithms = [*algorithms, ScheduleFreeWeights()]
    if share.device == "cpu":
        speed_up_linears(task)
    if cfg.run.activation_checkpointing:
        recompute_activations(task, cfg.run.activation_checkpointing)
    sharding = None
    if cfg.run.parallelism == SHARDED:
        check_shares(cfg)
        sharding = share_blocks(task, cfg.run, world_size=dist.get_world_size())
    if cfg.run.compile:
        compile_networks(compiled or [task], shared=sharding is not None)
    if dist.get_global_rank() == 0 and cfg.run.output == "text":
        print(f"{folder}: {share.world_size} x {share.device}, {cfg.precision}, peak lr {peak_lr:.3g}", file=sys.stderr)
    trainer = Trainer(
        model=task,
        train_dataloader=train,
        eval_dataloader=list(evaluators) or None,
        optimizers=optimizer,
        schedulers=schedule,
        algorithms=list(algorithms),
        callbacks=[*every, *callbacks, saver],
        loggers=[record, *build_loggers(cfg, folder)],
        max_duration=cfg.max_duration,
        precision=cfg.precision,
        device=share.device,
        device_train_microbatch_size=cfg.run.device_train_microbatch_size or share.device_train_batch_size,
        parallelism_config=sharding,
        seed=cfg.seed,
        deterministic_mode=cfg.run.deterministic,
        run_name=cfg.run.name,
        progress_bar=False,
        load_path=_checkpoint_of_this_kind(folder, cfg),
    )
    average_gradients(task)
    _check_steps_done(trainer.state, cfg, folder)
    schedule.set_rates(trainer.state)
    return trainer


def _check_steps_done(state: State, cfg: Recipe, folder: Path) -> None:
    done, steps = state.timestamp.batch.value, total_steps(state)
    rule, given = f"at least the {done:,} steps that {folder} has trained", f"{cfg.max_duration}, {steps:,} steps"
    remedy = "Raise it, or set run.name to start a shorter run."
    require(done <= steps, "max_duration", rule, given, remedy)


def _checkpoint_of_this_kind(folder: Path, cfg: Recipe) -> str | None:
    path = checkpoint_to_load(folder)
    shares = path is not None and Path(path).is_dir()
    rule = f"{str(shares).lower()} to go on from {path}"
    remedy = "Or set run.name to start another run, with init.weights for these weights."
    fits = path is None or shares == cfg.run.sharded_checkpoints
    require(fits, "run.sharded_checkpoints", rule, cfg.run.sharded_checkpoints, remedy)
    return path


def _build_best(cfg: Recipe, folder: Path, throughput: Throughput) -> Best:
    return Best(
        folder,
        throughput,
        measure=cfg.run.best_by,
        keep=cfg.run.keep_best,
        patience=cfg.run.patience,
        max_hours=cfg.run.max_hours,
    )


def build_record(cfg: Recipe, facts: dict[str, Any], throughput: Throughput, best: Best | None = None) -> RunRecord:
    """What writes the run folder.

    Raises:
        ConfigError: The folder holds a run on other images.
    """
    text, images = config.to_yaml(cfg), check_images(cfg)
    identity = identity_of(cfg, text, images)
    interval = cfg.run.log_interval
    return RunRecord(
        run_folder(cfg), text, facts, throughput=throughput, log_interval=interval, identity=identity, best=best
    )


def build_loggers(cfg: Recipe, folder: Path) -> list[LoggerDestination]:
    make = {
        "tensorboard": lambda: TensorboardLogger(log_dir=str(folder / layout.TENSORBOARD)),
        "wandb": lambda: WandBLogger(name=cfg.run.name),
        "mlflow": lambda: MLFlowLogger(run_name=cfg.run.name, tracking_uri=os.environ.get("MLFLOW_TRACKING_URI")),
    }
    loggers = []
    for name in cfg.run.loggers:
        try:
            loggers.append(make[name]())
        except (MissingConditionalImportError, ImportError) as error:
            raise ConfigError(
                f"run.loggers must name installed loggers, got {name!r}. pip install 'vitcomposer[{name}]'"
            ) from error
    return loggers


def _say_where_it_goes_on(state: State) -> None:
    now, length = state.timestamp, state.dataloader_len
    saver = next(callback for callback in state.callbacks if isinstance(callback, Checkpoints))
    if saver.last_checkpoint_batch == now.batch:
        epoch = now.epoch.value + (now.batch_in_epoch.value / length.value if length else 0)
        print(f"saved step {now.batch.value:,} (epoch {epoch:.6g}). Go on: {message(typed_command())}", flush=True)
