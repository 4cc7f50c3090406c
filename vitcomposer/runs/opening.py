"""Says what a run will do, by its configuration alone: nothing heavy is imported for it."""

import json
import os
import sys

from vitcomposer.data.mds.index import count_samples
from vitcomposer.errors import ConfigError
from vitcomposer.escape import for_terminal
from vitcomposer.schema.probe import NO_STEP
from vitcomposer.schema.recipe import Recipe
from vitcomposer.schema.times import parse_time

_UNITS = {"ep": "epoch", "ba": "step", "sp": "image"}


def say_opening(cfg: Recipe) -> None:
    """Print :func:`opening` once for all ranks, and why nothing follows for some seconds."""
    if os.environ.get("RANK", "0") != "0" or cfg.run.output == "quiet":
        return
    if cfg.run.output == "json":
        facts = {"event": "start", "run": f"{cfg.run.folder}/{cfg.run.name}", "model": cfg.model.name}
        images = {"images": _images(cfg), "global_train_batch_size": cfg.global_train_batch_size}
        print(json.dumps({**facts, **images, "max_duration": cfg.max_duration}), file=sys.__stdout__, flush=True)
    else:
        print(f"{for_terminal(opening(cfg))}\nloading torch and Composer ...", file=sys.stderr, flush=True)


def opening(cfg: Recipe) -> str:
    """One line: name, network, classes, images, length and batch of a run."""
    parts = [cfg.model.name]
    if cfg.model.num_classes:
        parts.append(f"{cfg.model.num_classes:,} classes")
    images = _images(cfg)
    if images is not None:
        parts.append(f"{images:,} images")
    if cfg.max_duration != NO_STEP:
        value, unit = parse_time("max_duration", cfg.max_duration)
        parts += [f"{value:,.0f} {_UNITS[unit]}{'s' * (value != 1)}", f"{cfg.global_train_batch_size:,} a step"]
    return f"{cfg.run.name}: {', '.join(parts)}"


def _images(cfg: Recipe) -> int | None:
    try:
        return count_samples(cfg.data, cfg.data.train_split)
    except ConfigError:  # which the loader explains
        return None
