"""``vitcomposer bench``: measures what this machine reads, augments and trains of a recipe, and names what is slowest.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcomposer.cost.input_speed import _count, cores_for, measure, mechanics
from vitcomposer.data.workers import number_of_workers
from vitcomposer.errors import ConfigError, require
from vitcomposer.escape import for_terminal
from vitcomposer.whole_files import write_whole

if TYPE_CHECKING:
    from vitcomposer.schema import Supervised


def add_command(commands: Any) -> None:
    """Add ``bench`` to the subcommands of a parser."""
    parser = commands.add_parser("bench", description=_run.__doc__)
    parser.add_argument("yaml", help="a recipe's yaml, or the name of one of ours, such as deit_s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.local=FOLDER")
    parser.add_argument("--workers", help="numbers of loader processes (default: 0, 1 and those of the recipe here)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--target", type=float, help="images/s that a GPU trains: print the cores it needs")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too: plan --measured takes them")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Measure a recipe on this machine: container, decode, collate, loader, device augmentation and model step."""
    from vitcomposer import config
    from vitcomposer.errors import ShardError
    from vitcomposer.schema import Supervised

    given, target = _given_workers(args.workers), args.target
    require(args.seconds > 0, "--seconds", "above 0", args.seconds, "5 is usual.")
    require(target is None or target > 0, "--target", "images a second above 0", target, "Leave it out.")
    cfg = config.load(args.yaml, args.overrides)
    remedy = "Use vitcomposer check, which takes steps of any recipe."
    require(isinstance(cfg, Supervised), "recipe", "supervised or distill", cfg.recipe, remedy)
    assert isinstance(cfg, Supervised)
    from vitcomposer.cost.bottleneck import measure_parts

    workers = given or _usual_workers(cfg)
    try:
        found = measure(cfg, workers=workers, seconds=args.seconds)
        size = found["bytes_per_image"]
        found |= measure_parts(cfg, workers=max(workers), bytes_per_image=size, seconds=args.seconds)
    except ShardError as error:
        raise ConfigError(str(error)) from error
    _print(found)
    for line in mechanics(found, cfg.data.prefetch_factor):
        print(line)
    for line in _parts(found, max(workers)):
        print(line)
    if target:
        rate = found["speeds"][-1]["images_per_cpu_second"]
        cores = cores_for(found, target)
        print(f"one GPU that trains {target:,.0f} images/s needs {cores} cores like this one, at {rate:,.0f} each")
    if args.json:
        write_whole(Path(args.json), json.dumps(found, indent=1) + "\n")
    return 0


def _parts(found: dict[str, Any], workers: int) -> list[str]:
    """Loader, augmentation and step at each image size, and which of them a run waits for."""
    lines = []
    for part in found["parts"]:
        names = ("loader", "augmentation", "step")
        loader, augmentation, step = (part[f"{name}_images_per_second"] for name in names)
        whole = f"loader of {_count(workers, 'worker')} {loader:,.0f} images/s, device augmentation {augmentation:,.0f}"
        limit = "step not measured: a teacher runs beside it, see vitcomposer check"
        if step is not None:
            limit = f"model step {step:,.{0 if step > 10 else 1}f}: the {part['limit']} is the limit"
        lines.append(f"{part['image_size']} px: {whole}, {limit}")
    for row in found["sections"]["training"][-1:]:
        how = "compiled, " if row["compiled"] else ""
        shared = " and the loader share its cores" if found["device"] == "cpu" else ""
        lines.append(
            f"  steps of {_count(row['batch'], 'image')}, {how}{row['precision']}, on {found['device']}{shared}"
        )
    return lines


def _given_workers(text: str | None) -> list[int]:
    """The numbers on the command line; empty where there are none."""
    if text is None:
        return []
    counts = text.split(",")
    valid = all(count.strip().isdecimal() for count in counts)
    require(valid, "--workers", "numbers of processes", text, "Write them like 0,1,2,4.")
    return sorted({int(count) for count in counts})


def _usual_workers(cfg: "Supervised") -> list[int]:
    import torch

    batch_bytes = cfg.global_train_batch_size * 3 * cfg.model.image_size**2
    return sorted({0, 1, number_of_workers(cfg.data, gpu=torch.cuda.is_available(), batch_bytes=batch_bytes)})


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    kilobytes, size = found["bytes_per_image"] / 1e3, found["image_size"]
    batch = f"to {size} px in batches of {found['batch_size']}"
    console.print(
        f"{for_terminal(found['data'])}: {kilobytes:.1f} kB an image, {batch}, {_count(found['cores'], 'core')}"
    )
    table = Table()
    for name in ("", "images/s", "images/s and core", "MB/s read"):
        table.add_column(name, justify="right" if name else "left")
    for speed in (*found["speeds"], *found["threads"]):
        rates = ("images_per_second", "images_per_cpu_second", "read_mb_per_second")
        table.add_row(speed["name"], *(f"{speed[rate]:,.0f}" for rate in rates))
    console.print(table)
    console.print("ms an image: " + ", ".join(f"{name} {ms:.3f}" for name, ms in found["milliseconds"].items()))
