"""``vitcomposer convert``: writes images as MDS shards, on one machine or in parts on many.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcomposer.commands.start.convert_storing import add_storing, print_plan, read_needs, store_options
from vitcomposer.errors import require
from vitcomposer.escape import for_terminal

if TYPE_CHECKING:
    from vitcomposer.data.conversion.sources import Source

_LINE_EVERY = 5.0  # seconds
_NAMED = 5  # classes, with the last
_PART_VARIABLES = ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX")


def add_command(commands: Any) -> None:
    """Add ``convert`` to the subcommands of a parser."""
    parser = commands.add_parser("convert", description=_run_convert.__doc__)
    kinds = parser.add_subparsers(metavar="SOURCE", required=True)
    common = _common()
    _add_folder(kinds, common)
    _add_list(kinds, common)
    _add_torchvision(kinds, common)
    digits = kinds.add_parser("digits", parents=[common], help="the 1,797 handwritten digits of scikit-learn")
    digits.add_argument("out", help="folder or s3://bucket/prefix")
    digits.set_defaults(run=_run_convert, source=_digits)
    _add_subset(kinds)
    merge = kinds.add_parser("merge", help="one data set of parts made with --part", description=_run_merge.__doc__)
    merge.add_argument("out", help="folder or s3://bucket/prefix of the parts")
    _add_tolerance(merge, None, "default: as the parts were made")
    _add_details(merge)
    merge.set_defaults(run=_run_merge)


def _common() -> argparse.ArgumentParser:
    """What all sources take."""
    from vitcomposer.data.conversion.left_out import MAX_BAD_FRACTION

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--workers", type=int, help="processes (default: one per core)")
    common.add_argument("--shard-size", default="64mb", help="largest shard (default: %(default)s)")
    _add_tolerance(common, MAX_BAD_FRACTION, "default: %(default)s")
    common.add_argument(
        "--seed", type=int, default=0, help="of the order and of held-out images (default: %(default)s)"
    )
    _add_details(common)
    add_storing(common.add_argument_group("how images are stored"))
    _add_parts(common.add_argument_group("more than one machine"))
    return common


def _add_folder(kinds: Any, common: argparse.ArgumentParser) -> None:
    folder = kinds.add_parser("folder", parents=[common], help="one folder per class, below train and val or alone")
    folder.add_argument("path")
    folder.add_argument("out", help="folder or s3://bucket/prefix")
    help_text = "all images of the folder and below it, for recipes without labels (swav, dino, ...): no class, no val"
    folder.add_argument("--unlabelled", action="store_true", help=help_text)
    folder.add_argument(
        "--val-name", help="folder beside train (default: one of a usual name, such as val or validation)"
    )
    help_text = "share of each class held out when there is no train folder (default: %(default)s)"
    folder.add_argument("--val-fraction", type=float, default=0.1, help=help_text)
    folder.set_defaults(run=_run_convert, source=_folder)


def _add_list(kinds: Any, common: argparse.ArgumentParser) -> None:
    listed = kinds.add_parser("list", parents=[common], help="lines of path,label")
    listed.add_argument("file")
    listed.add_argument("out", help="folder or s3://bucket/prefix")
    listed.add_argument("--split", help="train or val; call once per split (default: val is held out of the list)")
    help_text = "share of each class held out without --split (default: %(default)s)"
    listed.add_argument("--val-fraction", type=float, default=0.1, help=help_text)
    listed.add_argument("--root", help="folder that the paths start from (default: that of FILE)")
    listed.add_argument("--classes", help="file of class names in the order of the labels, one per line or a JSON list")
    listed.set_defaults(run=_run_convert, source=_list)


def _add_torchvision(kinds: Any, common: argparse.ArgumentParser) -> None:
    torchvision = kinds.add_parser("torchvision", parents=[common], help="CIFAR10, FashionMNIST, Flowers102, ...")
    torchvision.add_argument("name")
    torchvision.add_argument("out", help="folder or s3://bucket/prefix")
    torchvision.add_argument("--root", default="data", help="where torchvision keeps its data (default: %(default)s)")
    torchvision.add_argument("--download", action="store_true")
    torchvision.set_defaults(run=_run_convert, source=_torchvision)


def _add_subset(kinds: Any) -> None:
    subset = kinds.add_parser("subset", help="a class-balanced part of a split, as a split beside it")
    subset.add_argument("path", help="folder or s3://bucket/prefix of the splits")
    subset.add_argument("name", help="of the new split, such as train_1pct")
    subset.add_argument("--fraction", type=float, required=True, help="share of the samples, such as 0.01")
    subset.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    subset.add_argument("--split", default="train", help="that is drawn from (default: %(default)s)")
    subset.set_defaults(run=_run_subset)


def _add_tolerance(parser: Any, default: float | None, default_text: str) -> None:
    group = parser.add_mutually_exclusive_group()
    help_text = f"share of a split's images that are left out as they cannot be decoded ({default_text})"
    group.add_argument("--max-bad-fraction", type=float, default=default, metavar="SHARE", help=help_text)
    help_text = "leave out none: an image that cannot be decoded is an error"
    group.add_argument("--strict", action="store_const", const=0.0, dest="max_bad_fraction", help=help_text)


def _add_details(parser: Any) -> None:
    parser.add_argument("--details", action="store_true", help="print formats, sizes and how images were stored too")


def _add_parts(group: Any) -> None:
    help_text = f"make part I of --parts, from 0, and merge later; auto takes I from {' or '.join(_PART_VARIABLES)}"
    group.add_argument("--part", metavar="I", help=help_text)
    group.add_argument("--parts", type=int, metavar="N", help="parts in all; the result does not depend on it")
    help_text = "ray makes all parts as tasks on the cluster of RAY_ADDRESS, or here, and merges them (default: pool)"
    group.add_argument("--engine", choices=("pool", "ray"), default="pool", help=help_text)


def _run_convert(args: argparse.Namespace) -> int:
    """Write images as MDS shards that StreamingDataset reads. Call again after a crash: finished shards are kept."""
    part = _part(args)
    needs = read_needs(args)
    stored = store_options(args, needs)
    source = args.source(args)
    for line in source.warnings:
        print(line)
    if needs is not None and not part:  # of many machines the first alone
        print_plan(needs, source, stored)
    plan = {"shard_size": args.shard_size, "seed": args.seed, "stored": stored}
    left_out, summary = _convert(args, part, source, plan)
    if part is not None:
        said = f", {left_out:,} images that cannot be decoded are left out" if left_out else ""
        print(f"part {part} of {args.parts} is done{said}; after all: vitcomposer convert merge {args.out}")
    _print_summary(summary, args, source.held_out)
    return 0


def _convert(
    args: argparse.Namespace, part: int | None, source: "Source", plan: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Convert all or a part: how many images a part has left out, and the summary, which a part has not."""
    from vitcomposer.data.conversion.parts import convert_part
    from vitcomposer.data.conversion.ray_engine import convert_with_ray
    from vitcomposer.data.conversion.write import convert

    with _Progress(args.out) as progress:
        how = {
            "workers": args.workers,
            "max_bad_fraction": args.max_bad_fraction,
            "on_progress": progress.update,
        }
        if part is not None:
            return convert_part(source, args.out, part, args.parts, **plan, **how), {}
        if args.engine == "ray":
            return 0, convert_with_ray(source, args.out, args.parts, **plan, **how)
        return 0, convert(source, args.out, **plan, **how)


def _part(args: argparse.Namespace) -> int | None:
    """Number of the part to make; None is all of them."""
    if args.engine == "ray":
        require(args.part is None, "--part", "left out with --engine ray", args.part, "Ray makes all parts.")
        require(
            args.parts is not None, "--parts", "given with --engine ray", args.parts, "Some parts per core are usual."
        )
        return None
    if args.part is None:
        rule, remedy = "given with --part or --engine ray", "Add --part auto, or leave it out to convert here."
        require(args.parts is None, "--parts", rule, args.parts, remedy)
        return None
    require(args.parts is not None, "--parts", "given with --part", args.parts, "Give the number of parts in all.")
    from vitcomposer.data.conversion.parts import check_part

    text = _own_number() if args.part == "auto" else args.part
    require(text.isdecimal(), "--part", "a number from 0, or auto", text, "The first part is --part 0.")
    check_part(int(text), args.parts)  # here, as listing the images may take minutes
    return int(text)


def _own_number() -> str:
    """The number that SLURM or Kubernetes has given this task."""
    found = [os.environ[name] for name in _PART_VARIABLES if os.environ.get(name)]
    rule = f"a number unless {' or '.join(_PART_VARIABLES)} is set"
    require(bool(found), "--part", rule, "auto", "Run it in a SLURM array or an Indexed Job.")
    return found[0]


def _run_merge(args: argparse.Namespace) -> int:
    """Check that all parts of a conversion are done and belong together, and write what makes them one data set."""
    from vitcomposer.data.conversion.parts import merge

    _print_summary(merge(args.out, args.max_bad_fraction), args)
    return 0


def _run_subset(args: argparse.Namespace) -> int:
    """Write a class-balanced part of a split, for low-shot evaluation."""
    from vitcomposer.data.conversion.subset import write_subset

    record = write_subset(args.path, args.name, fraction=args.fraction, seed=args.seed, split=args.split)
    counts = record["class_counts"].values()
    print(f"{args.path}/{args.name}: {record['images']:,} images, {min(counts):,} to {max(counts):,} of a class")
    print(f"Train on it with data.train_split={args.name}")
    return 0


def _folder(args: argparse.Namespace) -> "Source":
    from vitcomposer.data.conversion.sources import FolderSource, UnlabelledSource

    if args.unlabelled:
        require(args.val_name is None, "--val-name", "left out with --unlabelled", args.val_name, "It makes no val.")
        return UnlabelledSource(args.path)
    options = {"val_name": args.val_name, "val_fraction": args.val_fraction, "seed": args.seed}
    # Of many machines the first alone reads files to compare them.
    return FolderSource(args.path, **options, find_copies=args.part is None or _part(args) == 0)


def _list(args: argparse.Namespace) -> "Source":
    from vitcomposer.data.conversion.sources import ListSource, read_class_names
    from vitcomposer.data.conversion.write import existing_class_names

    names = read_class_names(args.classes) if args.classes else existing_class_names(args.out, args.split)
    how = {"val_fraction": args.val_fraction, "seed": args.seed}
    return ListSource(args.file, split=args.split, root=args.root, class_names=names, **how)


def _torchvision(args: argparse.Namespace) -> "Source":
    from vitcomposer.data.conversion.torchvision_source import TorchvisionSource

    return TorchvisionSource(args.name, root=args.root, download=args.download)


def _digits(args: argparse.Namespace) -> "Source":
    from vitcomposer.data.conversion.sources import DigitsSource

    return DigitsSource(seed=args.seed)


class _Progress:
    """A bar on a terminal; elsewhere, such as in the log of a cluster job, a line every few seconds; both on stderr."""

    def __init__(self, out: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:,.0f} images/s"))
        console = Console(markup=False, emoji=False, stderr=True)
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._lines = not console.is_terminal
        self._task = self._bar.add_task("", total=None, rate=0.0)
        self._out = out
        self._before = 0  # images of an earlier call
        self._start: float | None = None
        self._next_line = 0.0
        self._result = ""

    def __enter__(self) -> "_Progress":
        if not self._lines:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if not self._lines:
            self._bar.stop()
        if kind is None and self._result:
            print(self._result)

    def update(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` images are stored."""
        now = time.monotonic()
        if self._start is None:
            self._begin(now, done, total)
            return
        rate = (done - self._before) / max(now - self._start, 1e-9)
        self._result = f"{done:,} of {total:,} images, {rate:,.0f} images/s"
        self._bar.update(self._task, completed=done, total=total, rate=rate)
        if self._lines and now >= self._next_line and rate and done < total:
            self._next_line = now + _LINE_EVERY
            minutes, seconds = divmod(round((total - done) / rate), 60)
            print(f"{self._result}, {minutes}:{seconds:02} left", file=sys.stderr, flush=True)

    def _begin(self, now: float, done: int, total: int) -> None:
        self._start, self._before, self._next_line = now, done, now + 2
        self._bar.update(self._task, completed=done, total=total)
        if done == total:
            self._result = f"already done: {total:,} images are stored in {self._out}"
        elif done:
            print(f"continuing: {done:,} of {total:,} images are stored", flush=True)


def _print_summary(summary: dict[str, Any], args: argparse.Namespace, held_out: float | None = None) -> None:
    """What came of it, and what to call next; nothing for a part, which has no summary."""
    from vitcomposer.data.conversion.left_out import LEFT_OUT

    if not summary:
        return
    if args.details:
        for split, facts in summary.items():
            _print_details(split, facts)
    left_out = sum(facts["left_out"] for facts in summary.values())
    if left_out:
        share = 100 * left_out / (left_out + sum(facts["images"] for facts in summary.values()))
        print(f"left out {left_out:,} ({share:.2f} %): {args.out.rstrip('/')}/{LEFT_OUT}")
    held = f" ({100 * held_out:g} % of each class)" if held_out else ""
    counts = "  ".join(f"{split} {facts['images']:,}" for split, facts in summary.items())
    size = sum(facts["shard_bytes"] for facts in summary.values())
    print(f"{counts}{held}   {_classes(summary)}   {_bytes(size)}")
    page = Path(f"{Path(args.out).name}.yaml")
    local = "://" not in args.out and page.is_file()
    print(f"Next: {shlex.join(['vitcomposer', *(('preview', str(page)) if local else ('inspect', args.out))])}")


def _classes(summary: dict[str, Any]) -> str:
    names = [for_terminal(name) for name in next(iter(summary.values()))["class_counts"]]
    shown = names if len(names) <= _NAMED else [*names[: _NAMED - 1], "...", names[-1]]
    return f"{len(names):,} {'class' if len(names) == 1 else 'classes'}: {' '.join(shown)}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _print_details(split: str, facts: dict[str, Any]) -> None:
    formats = ", ".join(f"{count:,} {name}" for name, count in facts["formats"].items())
    lines = {
        "images": f"{facts['images']:,} ({formats}), {facts['bytes'] / 1e6:,.1f} MB in {facts['shards']:,} shards",
        "stored": _outcomes(facts),
        "per class": _spread(facts["images_per_class"]) + f" over {len(facts['class_counts']):,} classes",
        "width": _spread(facts["width"]),
        "height": _spread(facts["height"]),
    }
    print(split)
    for name, text in lines.items():
        print(f"  {name:<10} {text}")


def _outcomes(facts: dict[str, Any]) -> str:
    total, growth = facts["images"], 100 * (facts["bytes"] / facts["original_bytes"] - 1)
    counts = [f"{name}: {count:,} of {total:,}" for name, count in facts["stored"].items()]
    return f"{', '.join(counts)} ({growth:+.1f} % bytes in all)"


def _spread(facts: dict[str, int]) -> str:
    return f"min {facts['min']:,}, median {facts['median']:,}, max {facts['max']:,}"
