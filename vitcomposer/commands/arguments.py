"""Parses command lines in which ``key=value`` may stand before, between and after the options of a command."""

import argparse
import os
import re
from collections.abc import Sequence

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
