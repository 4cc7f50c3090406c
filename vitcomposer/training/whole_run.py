"""Runs a recipe from its folder to its report: what is done already, training, the report, the copy on a store."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from typing import Any

from composer import Trainer
from composer.utils import dist

from vitcomposer.callbacks import finish_mirror
from vitcomposer.report import has_report, report_at_end
from vitcomposer.runs import layout
from vitcomposer.runs.closing import closing
from vitcomposer.runs.devices import with_precision
from vitcomposer.runs.folder import already_finished, run_folder
from vitcomposer.runs.metrics import read_object
from vitcomposer.schema.recipe import Recipe
from vitcomposer.training.fit import fit

_BY_HAND = 130  # stopped by Ctrl-C, by someone who waits


def run_to_end(cfg: Recipe, build: Callable[[Any], Trainer]) -> int:
    """Train what is left of a run, on all ranks; its folder stays locked.

    Args:
        build: Of its recipe.

    Returns:
        The status of :func:`fit`, or 74 for a finished run of which ``run.remote`` has not got all.

    Raises:
        ConfigError: The folder holds another run, or the configuration does not fit the machine.
    """
    # With other outputs than text, stdout is for the result alone.
    with nullcontext() if cfg.run.output == "text" else redirect_stdout(sys.stderr):
        cfg = with_precision(cfg)
        finished = already_finished(cfg)
        if finished:
            print(f"{run_folder(cfg)} is already done: {cfg.max_duration}. Raise max_duration to go on.")
        status = 0 if finished else fit(build(cfg), cfg)
        if dist.get_global_rank() == 0 and status != _BY_HAND and not (finished and has_report(run_folder(cfg))):
            report_at_end(run_folder(cfg))
    if dist.get_global_rank() == 0 and status == 0:
        _say_result(cfg)
    return finish_mirror(cfg, status)


def _say_result(cfg: Recipe) -> None:
    folder = run_folder(cfg)
    summary = read_object(folder / layout.SUMMARY)
    if summary is None:
        return
    if cfg.run.output == "json":
        print(json.dumps({"event": "end", "run": str(folder), **summary}), file=sys.__stdout__, flush=True)
    else:
        print(closing(folder, summary), flush=True)
