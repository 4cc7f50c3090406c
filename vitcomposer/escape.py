"""Makes texts that strangers wrote (class names, file names, fields of a file) harmless for where they are shown.

So the line that ends a command, in which such texts may be, is printed here too.
"""

import html
import os
import re
import sys
import time
import unicodedata

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$:@^=])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# Control characters (a terminal acts on them), separators of lines, what turns the direction of writing, surrogates.
_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
_SECONDS_FOR_FIRST = 5.0  # in which the first rank of a node has started too, and says the same


def for_terminal(text: str) -> str:
    r"""One line that a terminal shows and does not act on: ``\x1b`` for ESC, ``\n`` for the end of a line."""
    return "".join(_escape(c) if unicodedata.category(c) in _CATEGORIES else c for c in text)


def message(text: str) -> str:
    """A message of one or more lines, each of them as :func:`for_terminal`."""
    return "\n".join(map(for_terminal, text.split("\n")))


def print_error(text: str) -> None:
    """Print the line of an error that all ranks of a node meet before they know each other, such as a wrong key, once.

    The first rank prints it, and when it has left, its launcher ends the others, which wait for that. One that is not
    ended has met something of its own, such as a file that only it cannot read, and prints that.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":  # as composer and torchrun set it
        time.sleep(_SECONDS_FOR_FIRST)
    print(f"error: {message(text)}", file=sys.stderr)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def for_markdown(text: str) -> str:
    """One line of Markdown that shows the text itself: no tag, link, picture, heading or table comes of it."""
    return "".join(_HTML.get(c, c) for c in _MARKDOWN.sub(r"\\\1", for_terminal(text)))


def for_html(text: str) -> str:
    """Text of one or more lines for an HTML page, in an attribute too: neither a tag nor a control character acts."""
    return html.escape(message(text))
