"""``vitcomposer export``: writes a trained model for timm, ONNX and torch.export, each compared with the network.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from vitcomposer.export.folder import FILES, check_target, metrics_of_run, write_folder


def add_command(commands: Any) -> None:
    """Add ``export`` to the subcommands of a parser."""
    parser = commands.add_parser("export", description=_run.__doc__)
    parser.add_argument("source", help="run folder, checkpoint in one, exported folder, or a yaml with init.weights=")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as evaluation.image_size=256")
    parser.add_argument("--out", required=True, type=Path, help="folder, made where it is missing")
    help_text = "one or more of %(choices)s (default: safetensors, which timm and vitcomposer read)"
    parser.add_argument("--format", nargs="+", choices=list(FILES), default=["safetensors"], help=help_text)
    help_text = "auto: what the run measured as better, the trained weights or their average (default: %(default)s)"
    parser.add_argument("--weights", choices=["auto", "raw", "ema"], default="auto", help=help_text)
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Write a trained model as safetensors for timm, as ONNX or as a torch.export program, and check each of them."""
    from vitcomposer.evaluation.trained import load_trained

    check_target(args.out, force=args.force)
    trained = load_trained(args.source, args.overrides, weights=args.weights)
    metrics = {} if args.overrides else metrics_of_run(Path(args.source))
    write_folder(trained, args.out, formats=args.format, force=args.force, metrics=metrics)
    return 0
