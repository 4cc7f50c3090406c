"""``vitcomposer check``: everything that is wrong with a run at once, then its first steps and what the rest will take.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import json
import math
import shlex
import sys
from typing import TYPE_CHECKING, Any

from vitcomposer.config.values import known
from vitcomposer.data.mds.index import count_samples
from vitcomposer.data.workers import number_of_workers, usable_cores
from vitcomposer.errors import ConfigError
from vitcomposer.escape import for_terminal, message, print_error
from vitcomposer.schema import Supervised
from vitcomposer.schema.recipe import Recipe
from vitcomposer.schema.times import parse_time

if TYPE_CHECKING:
    from vitcomposer.training.trial import Trial

_LEFT_OUT = 0.1  # share of an epoch that a warning is worth
_FAR_FROM_CHANCE = 1.5
_UNITS = {"ep": "epochs", "ba": "steps", "sp": "images"}


def add_command(commands: Any) -> None:
    """Add ``check`` to the subcommands of a parser."""
    parser = commands.add_parser("check", description=_run.__doc__)
    parser.add_argument("yaml", help="a recipe's yaml, or the name of one of ours, such as deit_s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_duration=100ep")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the lines")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Look at configuration, data and weights, then take the first steps of the run and leave nothing behind."""
    from vitcomposer import config, needed_files

    warnings: list[str] = []

    def look(cfg: Recipe) -> None:
        warnings.extend(warnings_of(cfg))
        needed_files.check_needed_files(cfg)

    try:
        cfg = config.load(args.yaml, args.overrides, also=look)
    finally:
        for warning in warnings:
            print(f"warning: {message(warning)}", file=sys.stderr)
    print(f"{for_terminal(cfg.run.name)}: configuration good. Taking its first steps ...", file=sys.stderr, flush=True)
    from recipes import RECIPES
    from vitcomposer.runs.failures import explain
    from vitcomposer.training.trial import try_run

    try:
        found = try_run(cfg, RECIPES[cfg.recipe].build)
    except Exception as error:
        report = None if isinstance(error, ConfigError) else explain(error, cfg)
        if report is None:
            raise
        print_error(report["text"])
        return report["status"]
    if args.json:
        print(json.dumps({**found.to_dict(), "warnings": warnings, "advice": advice(found, cfg)}))
        return 0
    for line in lines_of(found, cfg):
        print(message(line))
    print(f"Next: vitcomposer train {shlex.join([args.yaml, *args.overrides])}")
    return 0


def warnings_of(cfg: Recipe) -> list[str]:
    """What can run and is hardly meant; of a configuration that may lack keys."""
    found = []
    total, warmup = known(cfg, "max_duration"), known(cfg, "schedule.t_warmup")
    if total is not None and warmup is not None:
        (length, unit), (share, of) = parse_time("max_duration", total), parse_time("schedule.t_warmup", warmup)
        whole = {"dur": 1.0, unit: length}.get(of)
        if whole is not None and share >= whole > 0:
            shown = f"{length:,.0f} of {length:,.0f} {_UNITS[unit]}"
            found.append(f"warm-up is {shown} (schedule.t_warmup): the learning rate never comes down")
    data, batch = known(cfg, "data"), known(cfg, "global_train_batch_size")
    images = None if data is None or data.remote is not None else _count(data)
    if images and batch and total != "0ba" and batch <= images and images % batch > _LEFT_OUT * images:
        left, steps = images % batch, images // batch
        found.append(
            f"an epoch is {steps:,} step{'s' * (steps != 1)} of {batch:,} images (global_train_batch_size) and leaves "
            f"out {left:,} of {images:,}, others in each epoch"
        )
    return found


def _count(data: Any) -> int | None:
    try:
        return count_samples(data, data.train_split)
    except ConfigError:  # which the loader explains
        return None


def lines_of(found: "Trial", cfg: Recipe) -> list[str]:
    """What a user reads of a trial."""
    steps = f" ({found.steps_per_epoch:,} step{'s' * (found.steps_per_epoch != 1)} an epoch)" if found.steps else ""
    weights = "weights good" if cfg.init.weights else "no weights: the network starts from nothing"
    lines = [f"configuration good, data good{steps}, {weights}", *(f"  {line}" for line in found.said)]
    if found.finished:
        lines.append(f"{cfg.run.folder}/{cfg.run.name} is already done: raise max_duration to go on, or set run.name")
    if found.seconds_per_step is None or found.train_seconds is None:
        return [*lines, f"the recipe {cfg.recipe} takes no step: nothing to measure"]
    chance = "" if found.chance is None else f" (chance {found.chance:.2f})"
    memory, total = (f"{(size or 0) / 1e9:.1f}" for size in (found.memory_bytes, found.memory_total_bytes))
    lines.append(
        f"one step: {found.seconds_per_step:.3g} s (the first {found.first_seconds:.3g} s), "
        f"loss {found.loss:.2f}{chance}, {memory} of {total} GB"
    )
    evaluation = "no evaluation" if found.evaluation_seconds is None else f"{span(found.evaluation_seconds)} evaluation"
    length, unit = parse_time("max_duration", cfg.max_duration)
    name = _device(found)
    limit = "the loader" if found.loader_limits else f"the {name}"
    lines.append(
        f"{length:,.0f} {_UNITS[unit]}: about {span(found.train_seconds)} (measured step) + {evaluation}. "
        f"Loader {found.loader_rate:,.0f}, {name} {found.model_rate:,.0f} images/s: {limit} is the limit"
    )
    return lines + advice(found, cfg)


def _device(found: "Trial") -> str:
    return "GPU" if found.device == "gpu" else "CPU"


def advice(found: "Trial", cfg: Recipe) -> list[str]:
    """What to change, where something stands in the way."""
    lines = []
    if found.loss is not None and not math.isfinite(found.loss):
        lines.append("do    the first loss is no number: look at augment.mean, augment.std, precision and init.weights")
    elif isinstance(cfg, Supervised) and found.chance and (found.loss or 0) > _FAR_FROM_CHANCE * found.chance:
        lines.append("do    the first loss is far above chance: look at init.weights, and at what the labels mean")
    if found.loader_limits and found.loader_rate and found.model_rate:
        cores, workers = usable_cores(), number_of_workers(cfg.data, gpu=found.device == "gpu")
        wanted = min(cores, math.ceil(max(workers, 1) * found.model_rate / found.loader_rate))
        if workers < wanted:
            lines.append(f"do    data.num_workers={wanted} (now {workers}; this machine has {cores} cores)")
        else:
            lines.append(
                f"do    all {cores} cores decode: `vitcomposer bench` shows what each image costs; less augmentation, "
                "`vitcomposer convert --short-side` or more cores help"
            )
    return lines


def span(seconds: float) -> str:
    """A time in the unit that fits: 40 s, 7 min, 3.2 h, 5.1 days."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
