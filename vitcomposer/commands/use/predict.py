"""``vitcomposer predict``: writes the most probable classes of images, as CSV or JSON lines.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vitcomposer.commands.arguments import given_reading, turns_upright
from vitcomposer.commands.use.evaluate import add_loading, choose_device
from vitcomposer.data.jpeg import set_reading
from vitcomposer.errors import require
from vitcomposer.escape import for_terminal

if TYPE_CHECKING:
    from torch import Tensor

    from vitcomposer.data.files import ImageSet
    from vitcomposer.evaluation.trained import Trained

DEFAULT_TOP_K = 5

EPILOG = """Answers come in the order of the images, a batch at a time. Images that cannot be read are named on stderr
and left out; the exit status is then 1. Files are turned upright by their EXIF orientation, unless the model was
trained on images that were not, or --exif keep is given; MDS splits are read as they were converted."""


def add_command(commands: Any) -> None:
    """Add ``predict`` to the subcommands of a parser."""
    parser = commands.add_parser("predict", description=_run.__doc__, epilog=EPILOG)
    parser.add_argument("source", help="run folder, checkpoint, exported folder or yaml")
    help_text = "image, folder of images, folder with the index.json of an MDS split, or - for paths on stdin"
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=help_text)
    help_text = "of the run's yaml, such as evaluation.image_size=384 or init.weights=FILE"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help_text)
    help_text = "auto: what the run measured as better, the trained weights or their average (default: %(default)s)"
    parser.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto", help=help_text)
    help_text = f"classes of an image that are given (default: {DEFAULT_TOP_K}, or all where there are fewer)"
    parser.add_argument("--top-k", type=int, help=help_text)
    parser.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="default: %(default)s")
    parser.add_argument("--out", metavar="FILE", help="written anew (default: stdout)")
    add_loading(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Classify images: their most probable classes and the probabilities."""
    from tqdm import tqdm

    from vitcomposer.evaluation.trained import load_trained

    device = choose_device(args)
    set_reading(given_reading(args))
    parts = list(find_sets(args.inputs, args.batch_size))
    model = load_trained(args.source, args.overrides, weights=args.weights)
    classes = model.model.num_classes
    top_k = min(DEFAULT_TOP_K, classes) if args.top_k is None else args.top_k
    require(1 <= top_k <= classes, "--top-k", f"from 1 to {classes}, the classes", top_k, "5 is usual.")
    model.network.to(device)
    parts = [part.lying(turns_upright(args, model.upright)) for part in parts]
    answered = broken = 0
    total = sum(part.num_samples for part in parts)
    with _open_output(args.out) as out, tqdm(total=total, unit=" images", disable=None, leave=False) as bar:
        if args.format == "csv":
            out.write(
                _csv([["path", *(f"{name}_{n}" for n in range(1, top_k + 1) for name in ("class", "probability"))]])
            )
        for part in parts:
            for names, faults, best in _predict(part, model, args, device, top_k):
                out.write(_lines(names, best, model.class_names, args.format))
                out.flush()  # whole lines, whatever happens next
                for fault in faults:
                    # A name need not be text.
                    tqdm.write(f"broken: {for_terminal(fault)}", file=sys.stderr)
                answered, broken = answered + len(names), broken + len(faults)
                bar.update(len(names) + len(faults))
    print(f"{answered:,} images classified{f', {broken:,} cannot be read' if broken else ''}", file=sys.stderr)
    return 1 if broken else 0


def find_sets(inputs: Sequence[str], batch_size: int) -> "Iterator[ImageSet]":
    """The images in their order: files in a row together, and each MDS split."""
    paths: list[str] = []
    for given in inputs:
        if os.path.isfile(os.path.join(given, "index.json")):
            from vitcomposer.data.labeled_sets import open_split  # Composer takes seconds to import

            if paths:
                yield _of_files(paths)
                paths = []
            yield open_split(given, batch_size)
            continue
        found = _listed() if given == "-" else _below(given) if os.path.isdir(given) else [given]
        if not found or (given != "-" and not os.path.exists(given)):
            raise ValueError(_no_images(given))
        paths += found
    if paths:
        yield _of_files(paths)


def _below(folder: str) -> list[str]:
    """Paths of the images of a folder; what is odd about it goes to stderr."""
    from vitcomposer.data.conversion.folders import Report, find_images

    report = Report()
    paths = [os.path.join(folder, image.name) for image in find_images(folder, report)]
    for line in (*report.lines(errors=True), *report.lines(errors=False)):
        print(for_terminal(f"{folder}: {line}"), file=sys.stderr)
    return paths


def _of_files(paths: list[str]) -> "ImageSet":
    from vitcomposer.data.files import ImageFiles, ImageSet

    return ImageSet("files", ImageFiles(paths), len(paths), paths=paths)


def _listed() -> list[str]:
    """Paths on stdin, one a line, whatever bytes they are of."""
    return [os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer if line.strip()]


def _no_images(given: str) -> str:
    if given == "-":
        return "stdin must have a path a line for the input -, it has none."
    if not os.path.isdir(given):
        return f"INPUT must be an image, a folder, an MDS split or -. There is no {given}."
    splits = sorted(index.parent.name for index in Path(given).glob("*/index.json"))
    if splits:
        return f"{given} is an MDS data set with the splits {', '.join(splits)}. Give one: {Path(given, splits[0])}"
    return f"{given} must hold images. No file in it or below has the name of one."


@contextmanager
def _open_output(file: str | None) -> Iterator[BinaryIO]:
    if file is None:
        sys.stdout.flush()
        yield sys.stdout.buffer
        return
    with open(file, "wb") as out:
        yield out


def _predict(
    part: "ImageSet", model: "Trained", args: argparse.Namespace, device: str, top_k: int
) -> "Iterator[tuple[list[str], list[str], Tensor]]":
    """For every batch the names of its images, what is wrong with the others, and (N, top_k, 2) classes and shares."""
    import torch

    from vitcomposer.evaluation.inference import run_network

    how: dict[str, Any] = {"device": device, "batch_size": args.batch_size, "workers": args.workers, "bf16": args.bf16}
    for answers in run_network(model.network, part.samples, model, **how):
        faults = [f"{part.describe(at)}: {reason}" for at, reason in answers.broken.items()]
        best = answers.outputs.softmax(dim=1).topk(top_k, dim=1)
        pairs = torch.stack((best.indices.double(), best.values.double()), dim=2).cpu()
        yield [part.describe(at) for at in answers.sample_ids], faults, pairs


def _lines(names: list[str], best: "Tensor", class_names: Sequence[str] | None, form: str) -> bytes:
    rows = []
    for name, answers in zip(names, best.tolist(), strict=True):
        classes = [str(int(label)) if class_names is None else class_names[int(label)] for label, _ in answers]
        shares = [float(f"{share:.6g}") for _, share in answers]
        if form == "csv":
            rows.append([name, *(value for pair in zip(classes, shares, strict=True) for value in pair)])
            continue
        pairs = zip(classes, answers, shares, strict=True)
        found = [{"class": text, "index": int(label), "probability": share} for text, (label, _), share in pairs]
        rows.append(json.dumps({"path": name, "classes": found}))
    return _csv(rows) if form == "csv" else "".join(f"{row}\n" for row in rows).encode()


def _csv(rows: list[list[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
