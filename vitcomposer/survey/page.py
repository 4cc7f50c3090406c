"""Writes a yaml from one of ours: the same page with other values, each with its reason as a comment."""

import json
import re
from collections.abc import Mapping

_BLOCK = re.compile(r"(\w+):(?:\s*#.*)?")
_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")  # needs no quotes in a yaml


def changed_page(text: str, values: Mapping[str, tuple[str, str]], header: list[str]) -> str:
    """A page with another header and other values.

    Args:
        text: Of the page, of which a header of comments goes.
        values: Of dotted keys, one or two names deep: the value as yaml text, and the reason for it. A key that the
            page lacks is added to its block; a value may take the place of a whole block.
        header: Lines of the new header, without ``# ``.

    Raises:
        KeyError: A block that the page lacks.
    """
    lines = text[text.index("\nrecipe:") + 1 :].splitlines()
    for key, (value, reason) in values.items():
        *block, name = key.split(".")
        start = _block_start(lines, *block) if block else 0
        indent = "  " if block else ""
        line = f"{indent}{name}: {value}" + (f"   # {reason}" if reason else "")
        at = _place_of(lines, start, f"{indent}{name}:", indent)
        if at is None:
            lines.insert(start, line)
        else:
            lines[at] = line
            while not block and at + 1 < len(lines) and lines[at + 1].startswith(" "):
                del lines[at + 1]  # of a block in whose place a value stands
    return "\n".join([*(f"# {line}".rstrip() for line in header), *lines, ""])


def quoted(text: str) -> str:
    """A text as the value of a yaml."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _block_start(lines: list[str], block: str) -> int:
    """Where the first key of a block stands."""
    for at, line in enumerate(lines):
        found = _BLOCK.fullmatch(line.strip())
        if found and found[1] == block and not line.startswith(" "):
            return at + 1
    raise KeyError(block)


def _place_of(lines: list[str], start: int, key: str, indent: str) -> int | None:
    for at in range(start, len(lines)):
        if indent and lines[at].strip() and not lines[at].startswith(indent):
            return None
        if lines[at].startswith(key):
            return at
    return None
