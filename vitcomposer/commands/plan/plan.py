"""``vitcomposer plan``: estimates the hours and memory of a recipe on given GPUs, CPU cores, disks and network.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcomposer.data.mds.index import count_samples, size_of_split
from vitcomposer.data.workers import usable_cores
from vitcomposer.errors import require
from vitcomposer.shipped import RESULTS
from vitcomposer.whole_files import write_whole

if TYPE_CHECKING:
    from vitcomposer.cost.supply import Machines

IMAGENET_IMAGES = 1_281_167
_BITS = 1e9 / 8  # bytes/s of a Gbit/s


def add_command(commands: Any) -> None:
    """Add ``plan`` to the subcommands of a parser."""
    parser = commands.add_parser("plan", description=_run.__doc__)
    parser.add_argument("yaml", help="a recipe's yaml, or the name of one of ours, such as deit_s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_duration=100ep")
    parser.add_argument("--gpu", required=True, help="such as h100, h200, a100 or a100-40")
    parser.add_argument("--gpus", type=int, default=1, help="how many (default: %(default)s)")
    parser.add_argument("--cpus", type=int, help="cores of all machines together (default: those of this machine)")
    gigabits = "Gbit/s of all machines together, 8 for 1 GB/s (default: enough)"
    parser.add_argument("--disk-gbps", type=float, metavar="X", help=f"read from disk, {gigabits}")
    parser.add_argument("--network-gbps", type=float, metavar="X", help=f"from a bucket or file server, {gigabits}")
    help_text = f"of the training set (default: those of data.local, else {IMAGENET_IMAGES} of ImageNet-1k)"
    parser.add_argument("--images", type=int, help=help_text)
    parser.add_argument("--price", type=float, help="of one GPU for an hour: print the cost")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of measurements (default: %(default)s)")
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="of vitcomposer bench --json, or of benchmarks/gpu.py"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Say what a recipe costs on given machines: FLOPs, images/s, what limits them, hours, and what to change."""
    from vitcomposer import config

    price = args.price
    require(price is None or price >= 0, "--price", "0 or more an hour", price, "Leave it out.")
    cfg = config.load(args.yaml, args.overrides)
    from vitcomposer.cost.estimate import costs_of  # torch comes with it

    images = (count_samples(cfg.data, cfg.data.train_split) or IMAGENET_IMAGES) if args.images is None else args.images
    there = args.measured is None or args.measured.is_file()
    remedy = "Run vitcomposer bench --json FILE, or benchmarks/gpu.py, to write one."
    require(there, "--measured", "a file that is there", str(args.measured), remedy)
    options = {"images": images, "results": args.results, "measured": args.measured, "machines": _machines(args)}
    split = size_of_split(cfg.data, cfg.data.train_split)
    found = costs_of(cfg, gpu=args.gpu, gpus=args.gpus, split=split, **options)
    found["cpus_from"] = "this machine" if args.cpus is None else "--cpus"
    found["cost"] = None if price is None or found["gpu_hours"] is None else price * found["gpu_hours"]
    _print(found)
    if args.json:
        write_whole(Path(args.json), json.dumps(found, indent=1) + "\n")
    return 0


def _machines(args: argparse.Namespace) -> "Machines":
    from vitcomposer.cost.supply import Machines

    require(args.cpus is None or args.cpus >= 1, "--cpus", "1 or more", args.cpus, "Leave it out for this machine's.")
    speeds = []
    for flag in ("disk_gbps", "network_gbps"):
        given = getattr(args, flag)
        name = "--" + flag.replace("_", "-")
        require(given is None or 0 < given < math.inf, name, "above 0", given, "Leave it out where it is no limit.")
        speeds.append(None if given is None else given * _BITS)
    return Machines(cpus=args.cpus or usable_cores(), disk=speeds[0], network=speeds[1])


def _print(found: dict[str, Any]) -> None:
    name = " (ImageNet-1k)" if found["images"] == IMAGENET_IMAGES else ""
    print(
        f"{found['run']}: {found['model']}, {found['parameters'] / 1e6:.2f} M parameters, "
        f"{found['train_flops_per_image'] / 1e9:.1f} GFLOP a training image at {found['image_size']} px"
    )
    if found["crops"]:
        crops = " and ".join(f"{count} of {size} px" for count, size in found["crops"])
        print(f"  an image is its crops, {crops}; parameters are those of the trunk")
    print(
        f"{found['images']:,} images{name}, {found['steps_per_epoch']:,} steps of "
        f"{found['global_train_batch_size']:,} an epoch\n"
        f"{found['steps']:,} steps, {found['images_seen']:,} images, {found['epochs']:.1f} epochs, "
        f"{found['equal_compute_epochs']:.1f} of equal compute, {found['train_flops'] / 1e18:.2f} EFLOP"
    )
    _print_stages(found["stages"])
    _print_speed(found)
    memory, gigabytes = found["memory_estimate"], found["memory_of_gpu"] / 1e9
    parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in memory.items() if size and part != "total")
    unknown = "" if memory["activations"] else " without activations, which are not known for this network"
    print(f"memory of a GPU: {memory['total'] / 1e9:.1f} of {gigabytes:.0f} GB, estimate{unknown} ({parts})")


_COLUMNS = {  # of a stage: heading and width
    "pixels": 6,
    "patches": 7,
    "steps": 9,
    "GFLOP/image": 11,
    "GPU images/s": 12,
    "MFU": 4,
    "CPU cores": 9,
    "GB/s to GPUs": 12,
    "images/s": 9,
    "limit": 7,
    "hours": 7,
}


def _print_stages(stages: list[dict[str, Any]]) -> None:
    print("  " + "  ".join(f"{heading:>{width}}" for heading, width in _COLUMNS.items()))
    for stage in stages:
        moved = stage["bytes_to_gpus_per_second"]
        cells = (
            str(stage["image_size"]),
            str(stage["num_patches_kept"] or "all"),
            f"{stage['steps']:,}",
            f"{stage['train_flops_per_image'] / 1e9:,.2f}",
            _figure(stage["gpu_images_per_second"], ",.0f"),
            _figure(stage["mfu"], ".0%"),
            _figure(stage["cpu_cores"], ",d"),
            _figure(None if moved is None else moved / 1e9, ".1f"),
            _figure(stage["images_per_second"], ",.0f"),
            stage["limited_by"] or "-",
            _figure(stage["hours"], ".2f"),
        )
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True)))


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_speed(found: dict[str, Any]) -> None:
    if found["hours"] is None:
        print("hours: unknown, this network has neither a measurement nor a roofline here")
        return
    cost = "" if found["cost"] is None else f", cost {found['cost']:,.2f}"
    waits = found["hours"] > 1.005 * found["gpu_bound_hours"]
    alone = f"; {found['gpu_bound_hours']:.2f} h if the GPUs never waited for images" if waits else ""
    print(
        f"{found['hours']:.2f} h on {_where(found)}, {found['gpu_hours']:.1f} GPU-hours{cost}{alone}: {found['basis']}"
    )
    compiled = "compiled" + ("" if found["compile"] else " (run.compile=true)") if found["compiled"] else "not compiled"
    print(f"  {compiled}, {found['precision']}, without evaluation and checkpoints")
    if found["hours_to_fill_cache"]:
        print(
            f"  of them {found['hours_to_fill_cache']:.2f} h in the first epoch, in which the network fills the cache"
        )
    _print_supply(found)
    for change in found["changes"]:
        rest = ", without the GPUs' time for it" if "device" in change["change"] else ""
        read = f"{change['bytes_per_second'] / 1e9:,.1f} GB/s read"
        print(f"  with {change['change']}: {change['hours']:.2f} h, {read} (estimate{rest})")
    workers = found["workers"]
    if workers is not None:
        print(
            f"do    data.num_workers={workers['wanted']} (now {workers['now']}, for each GPU): now "
            f"{workers['cores_at_work']} of {found['cpus']:,} cores decode, and it takes {workers['hours']:.2f} h"
        )


def _where(found: dict[str, Any]) -> str:
    """The machines, in words."""
    cores = f"{found['cpus']:,} CPU core{'s' * (found['cpus'] != 1)}"
    cores += " of this machine (--cpus N for another)" if found["cpus_from"] == "this machine" else ""
    parts = [f"{found['gpus']} x {found['gpu']}", cores]
    for name in ("disk", "network"):
        speed = found[f"{name}_bytes_per_second"]
        parts += [] if speed is None else [f"{speed / 1e9:.2g} GB/s of {name}"]
    return " with ".join(parts[:2]) + "".join(f" and {part}" for part in parts[2:])


def _print_supply(found: dict[str, Any]) -> None:
    size, most = found["bytes_per_image"] / 1e3, found["bytes_read_per_second"] / 1e9
    print(f"an image has {size:.1f} kB ({found['bytes_per_image_from']}): up to {most:,.1f} GB/s read")
    supply = found["supply"]
    if supply is None:
        print("CPU cores for the images/s of the GPUs: unknown, no such input was measured; taken to be enough")
        return
    print(
        f"CPU cores for the images/s of the GPUs: at {supply['images_per_cpu_second']:,.0f} images per CPU second at "
        f"full size ({supply['name']}; {supply['file']})"
    )
    sizes = "; ".join(f"{row['pixels']:,}" for row in supply["measured"])
    print(
        f"  measured where {sizes} pixels are made of an image; smaller ones are taken to cost as much as the smallest"
    )
