"""``vitcomposer preview``: a picture of what the network really gets, before anything is trained.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

from vitcomposer.errors import require
from vitcomposer.escape import for_terminal

_FOLDER = Path("previews")
_COUNT, _COUNT_OF_CROPS = 32, 8


def add_command(commands: Any) -> None:
    """Add ``preview`` to the subcommands of a parser."""
    parser = commands.add_parser("preview", description=_run.__doc__)
    parser.add_argument("yaml", help="a recipe's yaml, or the name of one of ours, such as deit_s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as augment.crop_scale=[0.5,1.0]")
    help_text = f"where it goes (default: {_FOLDER}/NAME.png); an existing file only if preview has written it"
    parser.add_argument("--out", type=Path, metavar="FILE.png", help=help_text)
    help_text = f"training images that are shown (default: {_COUNT}, {_COUNT_OF_CROPS} where each has several crops)"
    parser.add_argument("--count", type=int, metavar="N", help=help_text)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Draw the first batch of a run beside its originals, with crops, mixing and stages, and validation views."""
    from vitcomposer import config

    given = args.count
    require(given is None or 1 <= given <= 1024, "--count", "from 1 to 1024", given, f"{_COUNT} is usual.")
    cfg = config.load(args.yaml, args.overrides)
    path = args.out or _FOLDER / f"{cfg.run.name}.png"
    require(path.suffix.lower() == ".png", "--out", "the name of a PNG", str(path), "End it in .png.")
    from vitcomposer.preview.batches import preview_of
    from vitcomposer.preview.page import check_place, draw, save
    from vitcomposer.schema import SelfSupervised

    check_place(path)
    usual = _COUNT_OF_CROPS if isinstance(cfg, SelfSupervised) else _COUNT
    found = preview_of(cfg, given or usual)
    save(draw(found, f"{cfg.run.name}: what the network gets"), path)
    training = "images with their crops" if isinstance(cfg, SelfSupervised) else "training views"
    parts = [f"{found.training_views} {training} (step 0) beside their originals"] * bool(found.training_views)
    parts += [f"{found.validation_views} validation views"] * bool(found.validation_views)
    print(f"{for_terminal(str(path))}: {', '.join(parts)}")
    for fact in found.facts:
        print(fact)
    print(f"Next: vitcomposer check {shlex.join([args.yaml, *args.overrides])}")
    return 0
