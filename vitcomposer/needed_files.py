"""Looks for the packages and the files of a configuration that a start needs, before anything heavy is imported."""

import json
import os
from pathlib import Path

from vitcomposer.config.values import known
from vitcomposer.data.mds.index import CLASS_NAMES, INDEX, count_samples, no_split
from vitcomposer.errors import ConfigError, no_classes
from vitcomposer.installed import check_installed
from vitcomposer.runs import layout
from vitcomposer.schema import Distill, Probe, SelfSupervised, Supervised
from vitcomposer.schema.probe import NO_STEP
from vitcomposer.schema.recipe import Recipe
from vitcomposer.stores.hub import check_address, is_on_hub
from vitcomposer.stores.weights import how_to_get


def check_needed_files(cfg: Recipe) -> None:
    """Refuse a data set, weights or a cache that are not on this machine, and another number of classes than theirs.

    A run that has checkpoints goes on without some of them, or is done: what it lacks is told where it is opened. Of
    several ranks the first one looks, since other nodes need not see what it alone reads.

    Args:
        cfg: Of any recipe; it may lack blocks and keys that cannot be used.

    Raises:
        ConfigError: Composer or Streaming is not installed; or all keys whose files are missing.
    """
    check_installed()
    if os.environ.get("RANK", "0") != "0" or _has_checkpoints(cfg):
        return
    problems = [*_data_faults(cfg), *_weights_faults(cfg)]
    if problems:
        raise ConfigError(*problems)


def _has_checkpoints(cfg: Recipe) -> bool:
    folder, name = known(cfg, "run.folder"), known(cfg, "run.name")
    if folder is None or name is None or known(cfg, "run.remote") is not None:
        return True  # they may be in the store
    return any(Path(folder, name, layout.CHECKPOINTS).glob("*"))


def _data_faults(cfg: Recipe) -> list[str]:
    data, local = known(cfg, "data"), known(cfg, "data.local")
    if data is None or local is None or known(cfg, "data.source") != "mds" or data.remote is not None:
        return []
    monitored = known(cfg, "monitor") or known(cfg, "run.attention_interval")
    splits = [data.train_split] + [data.val_split] * (not isinstance(cfg, SelfSupervised) or bool(monitored))
    absent = [split for split in dict.fromkeys(splits) if not Path(local, split, INDEX).is_file()]
    if absent:
        return [no_split(local, absent[0])]
    return [*_batch_faults(cfg), *_class_faults(cfg, local)]


def _batch_faults(cfg: Recipe) -> list[str]:
    batch, images = known(cfg, "global_train_batch_size"), count_samples(cfg.data, cfg.data.train_split)
    if batch is None or images is None or batch <= images or known(cfg, "max_duration") in (None, NO_STEP):
        return []
    rule = f"at most {images}, the number of training samples"
    remedy = f"Set global_train_batch_size={max(1, images // 2)} or less."
    return [f"global_train_batch_size must be {rule}, got {batch}. {remedy}"]


def _class_faults(cfg: Recipe, local: str) -> list[str]:
    data = cfg.data
    classes = known(cfg, "model.num_classes")
    names = Path(local, data.train_split, CLASS_NAMES)
    if not isinstance(cfg, Supervised | Probe) or classes is None or not names.is_file():
        return []
    try:
        count = len(json.loads(names.read_bytes()))
    except (ValueError, TypeError, RecursionError):  # which the loader explains
        return []
    rule = f"{count}, the number of classes in {names}"
    if count < 2:
        return [no_classes(names)]
    found = f"model.num_classes must be {rule}, got {classes}. Set model.num_classes={count}, or leave it out."
    return [] if count == classes else [found]


def _weights_faults(cfg: Recipe) -> list[str]:
    faults = []
    weights = known(cfg, "init.weights")
    if weights is not None and is_on_hub(weights):
        faults += [f"init.weights {problem}"] if (problem := check_address(weights)) else []
    elif weights is not None and not Path(weights).exists():
        remedy = how_to_get(weights, "init.weights")
        faults.append(f"init.weights must be a file that is there, got {weights!r}. {remedy}")
    if not isinstance(cfg, Distill):
        return faults
    cache, teacher = known(cfg, "cache"), known(cfg, "teacher.weights")
    if cache is None and teacher is not None and not Path(teacher).is_file():
        faults.append(f"teacher.weights must be a file, got {teacher!r}. {how_to_get(teacher, 'teacher.weights')}")
    if cache is not None and cache.remote is None and not Path(cache.local).is_dir():
        remedy = "Write it with `vitcomposer cache-teacher`, or set cache=null."
        faults.append(f"cache.local must be a folder that is there, got {cache.local!r}. {remedy}")
    return faults
