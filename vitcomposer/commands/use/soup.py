"""``vitcomposer soup``: averages the weights of several models into one, at the cost of one (arXiv:2203.05482).

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcomposer.errors import require
from vitcomposer.escape import for_markdown, for_terminal

if TYPE_CHECKING:
    from torch import Tensor

    from vitcomposer.evaluation.trained import Trained
from vitcomposer.export.folder import check_target, write_folder
from vitcomposer.runs import layout

# Options that change how a network is trained, not what its weights mean: a soup is about runs that differ in them.
_OF_TRAINING = {
    *("drop_rate", "attn_drop_rate", "drop_path_rate", "drop_path_mode"),
    *("init_values", "locality_strength", "use_local_init"),
}


def add_command(commands: Any) -> None:
    """Add ``soup`` to the subcommands of a parser."""
    parser = commands.add_parser("soup", description=_run.__doc__)
    help_text = "run folder, checkpoint in one, or exported folder"
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help=help_text)
    help_text = "of the runs' yamls, such as evaluation.image_size=384"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=help_text)
    parser.add_argument("--out", required=True, type=Path, help="folder, as `vitcomposer export` writes")
    help_text = "greedy adds a model where that does not lower top-1 (default: %(default)s)"
    parser.add_argument("--method", choices=["uniform", "greedy"], default="uniform", help=help_text)
    parser.add_argument("--data", help="MDS data set or image folder: measure there; greedy needs it")
    help_text = "of --data; for greedy held out from training, and not the one whose accuracy is reported"
    parser.add_argument("--split", help=help_text)
    parser.add_argument("--last", type=int, metavar="N", help="take the last N checkpoints of each run folder")
    help_text = "auto: what the run measured as better, the trained weights or their average (default: %(default)s)"
    parser.add_argument("--weights", choices=["auto", "raw", "ema"], default="auto", help=help_text)
    parser.add_argument("--batch-size", type=int, default=64, help="when measuring (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Average the weights of models that were fine-tuned from one, or of the last checkpoints of one run."""
    from vitcomposer.evaluation.trained import load_trained

    members = []
    for source in _sources(args):
        members.append(load_trained(source, args.overrides, weights=args.weights))
        check_same(members[0], members[-1])
    score = None
    if args.data is not None and args.split is not None:
        score = _score_on(args.data, members[0], args.split, batch_size=args.batch_size, workers=args.workers)
    chosen = members
    if args.method == "greedy":
        assert score is not None, "checked above"
        chosen = greedy(members, score)
    soup = mean_of(chosen)
    if score is not None and args.method == "uniform":
        _print_uniform(members, soup, score)
    write_folder(soup, args.out, force=args.force, notes=_notes(chosen, args.method))
    return 0


def _sources(args: argparse.Namespace) -> list[str]:
    """The models, after a look at all that the command line says."""
    check_target(args.out, force=args.force)
    remedy = "Name a split that was not trained on; choosing by a test set would make its accuracy worthless."
    require(args.method != "greedy" or args.split is not None, "--split", "given for --method greedy", None, remedy)
    remedy = "Add --data FOLDER and --split NAME."
    require((args.data is None) == (args.split is None), "--data", "given together with --split", args.data, remedy)
    require(args.last is None or args.last >= 1, "--last", "1 or more", args.last, "5 is usual.")
    sources = [path for source in args.checkpoints for path in last_checkpoints(source, args.last)]
    remedy = "Name more, or add --last 5 for the last checkpoints of a run."
    require(len(sources) >= 2, "CHECKPOINT", "two or more models", sources, remedy)
    return sources


def last_checkpoints(source: str, last: int | None) -> list[str]:
    """The last files of a run folder, oldest first; the source itself where no number or no run folder is given.

    Raises:
        ValueError: There is no such thing, or the run kept fewer.
    """
    folder = Path(source, layout.CHECKPOINTS)
    if not Path(source).exists():
        raise ValueError(f"There is no {source}. Give run folders, checkpoints in them, or exported folders.")
    if last is None or not folder.is_dir():
        return [source]
    steps = {int(name[2]): path for path in folder.iterdir() if (name := layout.CHECKPOINT.fullmatch(path.name))}
    if len(steps) < last:
        raise ValueError(
            f"--last must be at most the {len(steps)} checkpoints that {source} kept, got {last}. "
            "A run keeps run.keep_checkpoints of them."
        )
    return [str(steps[step]) for step in sorted(steps)[-last:]]


def check_same(first: "Trained", other: "Trained") -> None:
    """Raise ValueError, naming the first difference, where a mean of two models' weights has no meaning."""
    for name, mine in (facts := _facts(first)).items():
        theirs = _facts(other).get(name)
        if mine != theirs and not (name == "class names" and None in (mine, theirs)):
            raise ValueError(
                f"{other.source} must be the same network on the same input as {first.source}: {name} is {theirs!r} "
                f"there, {mine!r} here. Average models that were trained from one."
            )
    extra = _facts(other).keys() - facts.keys()
    if extra:
        raise ValueError(f"{other.source} must be the same network as {first.source}, which lacks {sorted(extra)[0]}.")


def _facts(trained: "Trained") -> dict[str, Any]:
    config = getattr(trained.network, "config", None)
    options = dataclasses.asdict(config) if config is not None else {}
    return {
        "model.name": trained.model.name,
        "model.num_classes": trained.model.num_classes,
        "model.image_size": trained.model.image_size,
        **{f"model.{name}": value for name, value in options.items() if name not in _OF_TRAINING},
        "class names": trained.class_names,
        "evaluation.image_size": trained.image_size,
        "evaluation.crop_ratio": trained.crop_ratio,
        "evaluation.interpolation": trained.interpolation,
        "augment.mean": tuple(trained.mean),
        "augment.std": tuple(trained.std),
        **{name: tuple(tensor.shape) for name, tensor in trained.network.state_dict().items()},
    }


def mean_of(members: "Sequence[Trained]") -> "Trained":
    """A model with the mean of the weights, summed in float64; whole numbers are those of the first member."""
    from vitcomposer.models import build_model

    states = [member.network.state_dict() for member in members]
    network = build_model(**members[0].model.options())
    network.load_state_dict({name: _mean([state[name] for state in states]) for name in states[0]})
    return dataclasses.replace(
        members[0],
        network=network.eval(),
        source=f"the mean of {_count(members)}",
        averaged=all(member.averaged for member in members),
    )


def _mean(tensors: "Sequence[Tensor]") -> "Tensor":
    first = tensors[0]
    if not first.is_floating_point():
        return first
    total = first.double()
    for tensor in tensors[1:]:
        total = total + tensor.double()
    return (total / len(tensors)).to(first.dtype)


def greedy(
    members: "Sequence[Trained]", score: "Callable[[Mapping[str, Trained]], dict[str, float]]"
) -> "list[Trained]":
    """Recipe 1 of arXiv:2203.05482: from the best model on, each joins where top-1 of the mean does not fall.

    Args:
        score: Top-1 of models by name, on held-out images.

    Returns:
        Those that joined, the best single model first; it alone in the worst case.
    """
    singles = score({str(index): member for index, member in enumerate(members)})
    order = sorted(range(len(members)), key=lambda index: -singles[str(index)])
    chosen, best = [members[order[0]]], singles[str(order[0])]
    print(f"{100 * best:.2f} % top-1  {for_terminal(chosen[0].source)}, the best alone")
    for index in order[1:]:
        candidate = [*chosen, members[index]]
        reached = score({"soup": mean_of(candidate)})["soup"]
        joins = reached >= best
        alone = f"{100 * singles[str(index)]:.2f} % alone"
        print(
            f"{100 * reached:.2f} % top-1  with {for_terminal(members[index].source)} ({alone}): "
            f"{'kept' if joins else 'left out'}"
        )
        if joins:
            chosen, best = candidate, reached
    return chosen


def _score_on(
    path: str, like: "Trained", split: str, *, batch_size: int, workers: int
) -> "Callable[[Mapping[str, Trained]], dict[str, float]]":
    import torch

    from vitcomposer.evaluation.accuracy import measure, open_labelled

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = open_labelled(path, like, split=split, batch_size=batch_size, workers=workers)

    def score(models: "Mapping[str, Trained]") -> dict[str, float]:
        networks = {name: model.network.to(device) for name, model in models.items()}
        found = measure(networks, data, device=device)
        for network in networks.values():
            network.cpu()
        return {name: scores.top1 for name, scores in found.items()}

    return score


def _print_uniform(
    members: "Sequence[Trained]", soup: "Trained", score: "Callable[[Mapping[str, Trained]], dict[str, float]]"
) -> None:
    found = score({**{str(index): member for index, member in enumerate(members)}, "soup": soup})
    for index, member in enumerate(members):
        print(f"{100 * found[str(index)]:.2f} % top-1  {for_terminal(member.source)}")
    print(f"{100 * found['soup']:.2f} % top-1  their mean")


def _notes(chosen: "Sequence[Trained]", method: str) -> list[str]:
    names = ", ".join(for_markdown(Path(member.source).name) for member in chosen)  # the rest is of this machine
    notes = [f"Its weights are the mean of {_count(chosen)} ({method} soup, arXiv:2203.05482): {names}."]
    if any(name.endswith("running_var") for name in chosen[0].network.state_dict()):
        notes.append("The statistics of its batch norms are means too; they were not measured anew.")
    return notes


def _count(members: "Sequence[Trained]") -> str:
    return f"{len(members)} model{'s' if len(members) > 1 else ''}"
