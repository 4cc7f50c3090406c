"""``vitcomposer embed``: writes the features that a trained network makes of images, for search, clusters and probes.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcomposer.commands.arguments import given_reading, turns_upright
from vitcomposer.commands.use.evaluate import add_loading, choose_device
from vitcomposer.data.jpeg import set_reading
from vitcomposer.errors import require
from vitcomposer.escape import for_terminal
from vitcomposer.whole_files import whole_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vitcomposer.data.files import ImageSet
    from vitcomposer.evaluation.trained import Trained

_FORMS = (".npz", ".parquet")

EPILOG = """An .npz file has features (float32, a row an image), paths, labels (the class folder of each image, where
there are such folders), model and weights; a .parquet file (pip install pyarrow) has the columns path, label and
features. Features are what the head of a classifier gets: the class token after the last norm, or the mean of patches.
Images that cannot be read are named on stderr and left out; the exit status is then 1."""


def add_command(commands: Any) -> None:
    """Add ``embed`` to the subcommands of a parser."""
    parser = commands.add_parser("embed", description=_run.__doc__, epilog=EPILOG)
    parser.add_argument("source", help="run folder (one without labels too), checkpoint, exported folder, yaml or name")
    parser.add_argument("folder", help="folder of images, with one folder per class or without, or an MDS split")
    help_text = "of the run's yaml, such as evaluation.image_size=384 or init.weights=FILE"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help_text)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.npz or FILE.parquet")
    help_text = "auto: what the run measured as better, the trained weights or their average (default: %(default)s)"
    parser.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto", help=help_text)
    add_loading(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Write the features of images, one row each."""
    import numpy as np
    from tqdm import tqdm

    from vitcomposer.commands.look.attention import load_network
    from vitcomposer.config.trees import find_page
    from vitcomposer.evaluation.inference import run_network
    from vitcomposer.models.features import FrozenFeatures

    _check_out(args.out)
    device = choose_device(args)
    set_reading(given_reading(args))
    images, labels = _open(args.folder, args.batch_size)
    source = args.source if os.path.exists(args.source) else str(find_page(Path(args.source)))
    model = load_network(source, args.overrides, weights=args.weights)
    images = images.lying(turns_upright(args, model.upright))
    has_features = hasattr(model.network, "forward_features")
    require(has_features, "SOURCE", "a network with features", model.model.name, "Give a ViT, ConViT or ResNet.")
    trunk = FrozenFeatures(model.network.to(device), ["pooled"])
    how: dict[str, Any] = {"device": device, "batch_size": args.batch_size, "workers": args.workers, "bf16": args.bf16}
    rows: list[NDArray[np.float32]] = []
    ids: list[int] = []
    broken = 0
    with tqdm(total=images.num_samples, unit=" images", disable=None, leave=False) as bar:
        for answers in run_network(lambda batch: trunk(batch)["pooled"], images.samples, model, **how):
            for at, reason in answers.broken.items():
                tqdm.write(f"broken: {for_terminal(f'{images.describe(at)}: {reason}')}", file=sys.stderr)
            rows.append(answers.outputs.cpu().numpy())
            ids += answers.sample_ids
            broken += len(answers.broken)
            bar.update(len(answers.sample_ids) + len(answers.broken))
    require(bool(ids), "FOLDER", "a folder with an image that can be read", args.folder, "None of its images can.")
    chosen = None if labels is None else [labels[at] for at in ids]
    _write(args.out, np.concatenate(rows), [images.describe(at) for at in ids], chosen, _facts(model))
    said = f", {broken:,} cannot be read" if broken else ""
    print(f"{args.out}: {len(ids):,} images, {trunk.widths['pooled']:,} features each{said}")
    return 1 if broken else 0


def _check_out(out: Path) -> None:
    """Refuse what could not be written after minutes of work."""
    fits = out.suffix in _FORMS
    require(fits, "--out", "a file that ends in .npz or .parquet", str(out), "features.npz needs no extra package.")
    if out.suffix == ".parquet":
        try:
            import_module("pyarrow.parquet")
        except ImportError as error:
            raise ValueError(
                f"--out {out} needs pyarrow: pip install pyarrow, or name a file that ends in .npz."
            ) from error
    require(
        out.absolute().parent.is_dir(), "--out", "a file in a folder that is there", str(out), "Make the folder first."
    )


def _open(folder: str, batch_size: int) -> "tuple[ImageSet, Sequence[str] | None]":
    """The images, and the name of the class of each where there are classes."""
    from vitcomposer.commands.use.predict import find_sets
    from vitcomposer.data.conversion.folder_splits import find_layout
    from vitcomposer.data.conversion.folders import Report, subfolders
    from vitcomposer.data.labeled_sets import open_labelled_images

    root = Path(folder)
    if (root / "index.json").is_file():
        (images,) = find_sets([folder], batch_size)
        return images, _stored_labels(images)
    if not root.is_dir() or any(root.glob("*/index.json")) or not subfolders(root, Report(), root):
        (images,) = find_sets([folder], batch_size)
        return images, None
    splits = find_layout(root, Report()).splits
    remedy = f"Give one of them, such as {next(iter(splits.values()), root)}."
    require(not splits, "FOLDER", "the folder of one split", folder, remedy)
    images = open_labelled_images(folder, split="", batch_size=batch_size)
    for line in images.warnings:
        print(for_terminal(f"{folder}: {line}"), file=sys.stderr)
    return images, _stored_labels(images)


def _stored_labels(images: "ImageSet") -> Sequence[str]:
    from vitcomposer.data.files import ImageFiles

    samples: Any = images.samples
    found = samples.labels if isinstance(samples, ImageFiles) else [samples[at]["label"] for at in range(len(samples))]
    return [str(label) if images.class_names is None else images.class_names[label] for label in found or ()]


def _facts(model: "Trained") -> dict[str, str]:
    return {"model": model.model.name, "weights": model.source + (", averaged" if model.averaged else "")}


def _write(
    out: Path, features: "NDArray[Any]", paths: list[str], labels: Sequence[str] | None, facts: dict[str, str]
) -> None:
    import numpy as np

    with whole_file(out) as partial:
        if out.suffix == ".npz":
            texts: dict[str, Any] = {"paths": paths, **({} if labels is None else {"labels": labels}), **facts}
            arrays: dict[str, Any] = {name: np.array(text) for name, text in texts.items()}
            with partial.open("wb") as file:
                np.savez(file, features=features, **arrays)
            return
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
        flat = arrow.array(features.reshape(-1))
        columns = {"path": [os.fsencode(path).decode(errors="replace") for path in paths]}
        columns |= {} if labels is None else {"label": list(labels)}
        table = arrow.table({**columns, "features": arrow.FixedSizeListArray.from_arrays(flat, features.shape[1])})
        parquet.write_table(table.replace_schema_metadata(facts), str(partial))
