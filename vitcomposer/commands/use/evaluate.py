"""``vitcomposer eval``: measures a trained classifier on one or several data sets, as a whole and class by class.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcomposer.commands.arguments import add_exif, add_reading, given_reading, turns_upright
from vitcomposer.data.jpeg import set_reading
from vitcomposer.errors import require
from vitcomposer.escape import for_terminal
from vitcomposer.runs import layout
from vitcomposer.whole_files import write_whole

if TYPE_CHECKING:
    from torch import nn

    from vitcomposer.evaluation.accuracy import Labelled, Scores
    from vitcomposer.evaluation.trained import Trained

EPILOG = """SOURCE is a run folder, a checkpoint in one, a folder of `vitcomposer export`, or a yaml with
init.weights=FILE. With --real the labels are those of ImageNet-ReaL for data sets whose files have ImageNet's names."""


def add_command(commands: Any) -> None:
    """Add ``eval`` to the subcommands of a parser."""
    parser = commands.add_parser("eval", description=_run.__doc__, epilog=EPILOG)
    parser.add_argument("source", help="run folder, checkpoint, exported folder or yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluation.image_size=384")
    help_text = "MDS data set (s3://... too) or a folder with one folder per class; several are measured in turn"
    parser.add_argument("--data", nargs="+", action="extend", required=True, metavar="DIR", help=help_text)
    parser.add_argument("--split", default="val", help="folder below each DIR that has one (default: %(default)s)")
    help_text = "default: the trained weights and, where there is one, their average"
    parser.add_argument("--weights", choices=("raw", "ema", "both"), help=help_text)
    parser.add_argument("--real", metavar="FILE", help="real.json of ImageNet-ReaL")
    parser.add_argument("--cache", metavar="DIR", help="folder for the shards of an object store")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the folder eval of a run folder")
    help_text = "share of the images that may be left out because they cannot be read (default: %(default)g)"
    parser.add_argument("--max-bad-fraction", type=float, default=0.0, metavar="F", help=help_text)
    add_loading(parser)
    parser.set_defaults(run=_run)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How images reach the model."""
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images (default: %(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU where there is one)")
    add_reading(parser)
    add_exif(parser)
    parser.add_argument("--bf16", action="store_true", help="run the network in bfloat16 autocast")


def choose_device(args: argparse.Namespace) -> str:
    """The device of the command line, after a look at the numbers of :func:`add_loading`."""
    import torch

    require(args.batch_size >= 1, "--batch-size", "1 or more", args.batch_size, "64 is usual.")
    require(args.workers >= 0, "--workers", "0 or more", args.workers, "0 decodes in the main process.")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # of a torch without CUDA
        first = str(error).splitlines()[0]
        raise ValueError(f"--device must be a device of this machine, got {device!r}: {first}") from error
    return device


def _run(args: argparse.Namespace) -> int:
    """Measure a trained classifier: top-1, top-5, loss, per-class accuracy and confusions."""
    device = choose_device(args)
    set_reading(given_reading(args))
    share = args.max_bad_fraction
    require(0 <= share < 1, "--max-bad-fraction", "in [0, 1)", share, "0.001 leaves out one image in a thousand.")
    models = _models(args)
    first = next(iter(models.values()))
    first = replace(first, upright=turns_upright(args, first.upright))
    sets = _open_sets(args, first)
    networks = {kind: model.network.to(device) for kind, model in models.items()}
    out = args.out or (Path(args.source, layout.EVALUATION) if Path(args.source, layout.CONFIG).is_file() else None)
    results: list[dict[str, Any]] = []
    options = {"device": device, "bf16": args.bf16, "max_bad_fraction": share}
    for data in sets:
        for kind, scores in _measure(networks, data, **options).items():
            results.append(_result(kind, scores, data))
            _print(results[-1])
            if out is not None:
                _write_tables(out / _folder(results[-1], results[:-1]), results[-1], scores, first)
    if out is not None:
        _write_results(out, args, first, results)
        print(f"{out}: eval.json, and per_class.csv and confusion.png of each of the lines above")
    return 0


def _open_sets(args: argparse.Namespace, first: "Trained") -> "list[Labelled]":
    """The data sets, with ReaL labels where they are asked for; what is odd about them is said."""
    from vitcomposer.data.labeled_sets import read_real_labels
    from vitcomposer.evaluation.accuracy import open_labelled, with_real_labels

    real = read_real_labels(args.real, first.class_names) if args.real else None
    options = {"split": args.split, "batch_size": args.batch_size, "workers": args.workers, "cache": args.cache}
    sets = [open_labelled(path, first, **options) for path in args.data]
    for line in (f"{data.images.name}: {warning}" for data in sets for warning in data.images.warnings):
        print(for_terminal(line), file=sys.stderr)
    if real is not None:
        sets = [with_real_labels(data, real) for data in sets]
        remedy = "Give the folder of ImageNet's validation images, one folder per class."
        fits = any(data.real is not None for data in sets)
        require(fits, "--data", "files such as ILSVRC2012_val_00000001.JPEG with --real", args.data, remedy)
    return sets


def _measure(networks: "dict[str, nn.Module]", data: "Labelled", **options: Any) -> "dict[str, Scores]":
    """The scores of each network, with a bar meanwhile."""
    from tqdm import tqdm

    from vitcomposer.evaluation.accuracy import measure

    with tqdm(total=data.images.num_samples, unit=" images", desc=data.images.name, disable=None, leave=False) as bar:
        return measure(networks, data, **options, on_images=bar.update)


def _models(args: argparse.Namespace) -> "dict[str, Trained]":
    from vitcomposer.evaluation.trained import load_each, load_trained

    if args.weights in ("raw", "ema"):
        return {args.weights: load_trained(args.source, args.overrides, weights=args.weights)}
    models = load_each(args.source, args.overrides)
    if args.weights == "both" and len(models) < 2:
        raise ValueError(f"{args.source} must hold an average for --weights both, it has {', '.join(models)} alone.")
    return models


def _result(kind: str, scores: "Scores", data: "Labelled") -> dict[str, Any]:
    return {
        "data": data.images.name,
        "weights": kind,
        "images": scores.images,
        "bad_images": scores.bad_images,
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss if math.isfinite(scores.loss) else None,
        "class_top1": scores.class_top1,
        "real": scores.real,
    }


def _print(result: dict[str, Any]) -> None:
    figures = [
        f"{name} {100 * result[key]:.2f}"
        for key, name in (("top1", "top-1"), ("top5", "top-5"), ("class_top1", "mean of classes"), ("real", "ReaL"))
        if result[key] is not None
    ]
    loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
    bad = f" ({result['bad_images']} more cannot be read)" if result["bad_images"] else ""
    print(
        f"{for_terminal(result['data'])}, {result['weights']}: {', '.join(figures)}, loss {loss}, "
        f"{result['images']:,} images{bad}"
    )


def _folder(result: dict[str, Any], before: list[dict[str, Any]]) -> str:
    """A name for the folder of a result that none before it has."""
    taken = {other["folder"] for other in before}
    parts = [part for part in re.split(r"[^\w.-]+", result["data"]) if part.strip(".")]
    base = name = "-".join([*parts[-2:], result["weights"]])
    number = 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    result["folder"] = name
    return name


def _write_tables(folder: Path, result: dict[str, Any], scores: "Scores", model: "Trained") -> None:
    from vitcomposer.evaluation.confusion import draw_confusion, write_per_class

    folder.mkdir(parents=True, exist_ok=True)
    write_per_class(folder / "per_class.csv", scores.labels, scores.predictions, model.class_names)
    title = f"{model.model.name}, {result['weights']}, on {result['data']}: top-1 {100 * scores.top1:.2f}"
    picture = draw_confusion(scores.labels, scores.predictions, model.class_names, title=title)
    write_whole(folder / "confusion.png", picture)


def _write_results(out: Path, args: argparse.Namespace, model: "Trained", results: list[dict[str, Any]]) -> None:
    page = {
        "source": args.source,
        "overrides": args.overrides,
        "model": model.model.name,
        "image_size": model.image_size,
        "crop_ratio": model.crop_ratio,
        "interpolation": model.interpolation,
        "exif": "apply" if model.upright else "keep",
        "bf16": args.bf16,
        "results": results,
    }
    write_whole(out / "eval.json", json.dumps(page, indent=2) + "\n")
