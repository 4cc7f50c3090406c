"""``vitcomposer plan``: estimates the hours and memory of a recipe on given GPUs, without a GPU and without the data.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from vitcomposer.data.mds.index import count_samples
from vitcomposer.errors import require
from vitcomposer.shipped import RESULTS
from vitcomposer.whole_files import write_whole

IMAGENET_IMAGES = 1_281_167


def add_command(commands: Any) -> None:
    """Add ``plan`` to the subcommands of a parser."""
    parser = commands.add_parser("plan", description=_run.__doc__)
    parser.add_argument("yaml", help="a recipe's yaml, or the name of one of ours, such as deit_s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_duration=100ep")
    parser.add_argument("--gpu", required=True, help="such as h100, h200, a100 or a100-40")
    parser.add_argument("--gpus", type=int, default=1, help="how many (default: %(default)s)")
    help_text = f"of the training set (default: those of data.local, else {IMAGENET_IMAGES} of ImageNet-1k)"
    parser.add_argument("--images", type=int, help=help_text)
    parser.add_argument("--price", type=float, help="of one GPU for an hour: print the cost")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of measurements (default: %(default)s)")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="of benchmarks/gpu.py, in place of --results")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Say what a recipe costs on given GPUs: FLOPs, images/s, memory, hours, and what the data must deliver."""
    from vitcomposer import config

    price = args.price
    require(price is None or price >= 0, "--price", "0 or more an hour", price, "Leave it out.")
    cfg = config.load(args.yaml, args.overrides)
    from vitcomposer.cost.estimate import costs_of  # torch comes with it

    images = (count_samples(cfg.data, cfg.data.train_split) or IMAGENET_IMAGES) if args.images is None else args.images
    there = args.measured is None or args.measured.is_file()
    require(there, "--measured", "a file that is there", str(args.measured), "Run benchmarks/gpu.py to write one.")
    options = {"images": images, "results": args.results, "measured": args.measured}
    found = costs_of(cfg, gpu=args.gpu, gpus=args.gpus, **options)
    found["cost"] = None if price is None or found["gpu_hours"] is None else price * found["gpu_hours"]
    _print(found)
    if args.json:
        write_whole(Path(args.json), json.dumps(found, indent=1) + "\n")
    return 0


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


def _print_stages(stages: list[dict[str, Any]]) -> None:
    print("  pixels  patches      steps  GFLOP/image   images/s   MFU    hours  CPU cores  GB/s to GPUs")
    for stage in stages:
        kept, gigaflops, moved = stage["num_patches_kept"], stage["train_flops_per_image"] / 1e9, None
        if stage["bytes_to_gpus_per_second"] is not None:
            moved = stage["bytes_to_gpus_per_second"] / 1e9
        figures = (
            (f"{gigaflops:,.2f}", 11),
            (_figure(stage["images_per_second"], ",.0f"), 9),
            (_figure(stage["mfu"], ".0%"), 4),
            (_figure(stage["hours"], ".2f"), 7),
            (_figure(stage["cpu_cores"], ",d"), 9),
            (_figure(moved, ".1f"), 12),
        )
        line = "  ".join(f"{figure:>{width}}" for figure, width in figures)
        print(f"  {stage['image_size']:6}  {kept or 'all':>7}  {stage['steps']:9,}  {line}")


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _print_speed(found: dict[str, Any]) -> None:
    if found["hours"] is None:
        print("hours: unknown, this network has neither a measurement nor a roofline here")
        return
    cost = "" if found["cost"] is None else f", cost {found['cost']:,.2f}"
    gpus = f"{found['gpus']} x {found['gpu']}"
    print(f"{found['hours']:.2f} h on {gpus}, {found['gpu_hours']:.1f} GPU-hours{cost}: {found['basis']}")
    compiled = "" if found["compile"] else " (run.compile=true)"
    print(f"  compiled{compiled}, {found['precision']}, without evaluation, checkpoints and waiting for data")
    supply = found["supply"]
    if supply is None:
        print("CPU cores for the images/s above: unknown, no such input was measured")
        return
    print(
        f"CPU cores for the images/s above: at {supply['images_per_cpu_second']:,.0f} images per CPU second, measured "
        f"at full size ({supply['name']}; {supply['file']})"
    )
