"""``vitcomposer train``: trains in this process, or has Composer's launcher start a process for each GPU.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from vitcomposer.errors import require
from vitcomposer.runs.typed import TYPED_COMMAND

_DEVICES = Path("/dev")

EPILOG = """The same command goes on with a run that was stopped. `composer -n 8 train.py YAML key=value` and torchrun
do the same, on several nodes too."""


def add_command(commands: Any) -> None:
    """Add ``train`` to the subcommands of a parser."""
    parser = commands.add_parser("train", description=_run.__doc__, epilog=EPILOG)
    parser.add_argument("yaml", help="a recipe's yaml, or the name of one of ours, such as deit_s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_duration=100ep")
    help_text = "processes on this machine, one for each GPU (default: as many as there are GPUs, else one)"
    parser.add_argument("-n", "--gpus", type=int, metavar="N", help=help_text)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("-q", "--quiet", action="store_true", help="print errors and the result alone")
    output.add_argument("--json", action="store_true", help="print JSON objects, one a line: start, rows, end")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Train a recipe: what a yaml says, with the keys that are changed on the command line."""
    chosen = [name for name in ("quiet", "json") if vars(args)[name]]
    overrides = [*args.overrides, *(f"run.output={name}" for name in chosen)]
    given = args.gpus
    require(given is None or given >= 1, "--gpus", "1 or more", given, "Leave it out to use all.")
    is_rank = "RANK" in os.environ  # of a launcher, which has decided
    gpus = 1 if is_rank else visible_gpus()
    fits = given is None or given <= gpus or gpus == 0 or is_rank
    require(fits, "--gpus", f"at most {gpus}, the GPUs that are visible", given, "See CUDA_VISIBLE_DEVICES.")
    processes = 1 if is_rank else given or max(gpus, 1)
    if processes == 1:
        from vitcomposer.train import main

        return main([args.yaml, *overrides], report_errors=not args.traceback)
    return _launch(args.yaml, overrides, processes)


def visible_gpus() -> int:
    """How many GPUs this process may use; torch, which takes seconds, is asked only where there may be several."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = list(_DEVICES.glob("nvidia[0-9]*"))
    count = min(len(there), len(there) if named is None else len([name for name in named.split(",") if name.strip()]))
    if count < 2:
        return count
    import torch

    return torch.cuda.device_count()


def _launch(yaml: str, overrides: list[str], processes: int) -> int:
    """Become Composer's launcher, after a look at the configuration."""
    from vitcomposer import config, needed_files
    from vitcomposer.schema.ranks import check_ranks

    cfg = config.load(yaml, overrides, also=needed_files.check_needed_files)
    check_ranks(cfg, processes, processes)
    if cfg.run.output == "text":
        print(f"{cfg.run.name}: starting {processes} processes ...", file=sys.stderr, flush=True)
    launcher = [sys.executable, "-m", "vitcomposer.commands.start.launcher", "-n", str(processes)]
    launcher += ["-m", "vitcomposer.train"]
    environment = {**os.environ, TYPED_COMMAND: shlex.join(["vitcomposer", *sys.argv[1:]])}
    os.execve(sys.executable, [*launcher, yaml, *overrides], environment)
