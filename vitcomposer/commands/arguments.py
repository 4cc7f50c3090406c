"""Parses what several commands take: ``key=value`` at any place of the command line, and how images are read."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any

from vitcomposer.data.jpeg import MAX_PIXELS, Reading

_OVERRIDE = re.compile(r"\+?[A-Za-z_][\w-]*(\.[\w-]+)*(\[-?\d+\])?=", re.ASCII)
_LISTS = ("inputs", "images", "checkpoints")  # arguments of any number that may swallow one


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command that takes ``overrides``: argparse knows them at one place only.

    A word that is also the name of a file is that file.
    """
    found = [at for at, word in enumerate(argv) if at and is_override(word) and not argv[at - 1].startswith("-")]
    args, left = parser.parse_known_args([word for at, word in enumerate(argv) if at not in found])
    after_flags = [word for word in left if is_override(word)]
    if len(after_flags) < len(left):
        parser.error(f"unrecognized arguments: {' '.join(word for word in left if not is_override(word))}")
    for name in _LISTS:
        words = getattr(args, name, None)
        if isinstance(words, list):
            after_flags += [word for word in words if is_override(word)]
            setattr(args, name, [word for word in words if not is_override(word)])
    taken = {argv[at] for at in found} | set(after_flags)
    args.overrides = [word for word in argv if word in taken] + [w for w in args.overrides if w not in taken]
    return args


def is_override(word: str) -> bool:
    """Whether a word of a command line changes a key of a yaml."""
    return _OVERRIDE.match(word) is not None and not os.path.exists(word)


def add_reading(parser: Any) -> None:
    """Add the options of :class:`Reading` to a command."""
    add_max_pixels(parser)
    help_text = "black and white of images of 16 or 32 bits or floats (default: all of 16 bits, the others are refused)"
    parser.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=help_text)


def add_max_pixels(parser: Any) -> None:
    """Add the limit alone."""
    help_text = "refuse images with more pixels by their headers (default: %(default)s)"
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=help_text)


def add_exif(parser: Any) -> None:
    """Add how image files lie."""
    help_text = (
        "whether image files are turned upright by their EXIF orientation (default: as those that the model was "
        "trained on; apply where that is not known)"
    )
    parser.add_argument("--exif", choices=("apply", "keep"), help=help_text)


def turns_upright(args: argparse.Namespace, trained: bool) -> bool:
    """What :func:`add_exif` was given, else as the model was trained."""
    return trained if args.exif is None else args.exif == "apply"


def given_reading(args: argparse.Namespace) -> Reading:
    """What :func:`add_reading` was given."""
    return Reading(args.max_pixels, tuple(args.range) if args.range else None)
