"""Makes texts that strangers wrote (class names, file names, fields of a file) harmless for where they are shown."""

import html
import re
import unicodedata

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$:@^=])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# Control characters (a terminal acts on them), separators of lines, what turns the direction of writing, surrogates.
_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def for_terminal(text: str) -> str:
    r"""One line that a terminal shows and does not act on: ``\x1b`` for ESC, ``\n`` for the end of a line."""
    return "".join(_escape(c) if unicodedata.category(c) in _CATEGORIES else c for c in text)


def message(text: str) -> str:
    """A message of one or more lines, each of them as :func:`for_terminal`."""
    return "\n".join(map(for_terminal, text.split("\n")))


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def for_markdown(text: str) -> str:
    """One line of Markdown that shows the text itself: no tag, link, picture, heading or table comes of it."""
    return "".join(_HTML.get(c, c) for c in _MARKDOWN.sub(r"\\\1", for_terminal(text)))


def for_html(text: str) -> str:
    """Text of one or more lines for an HTML page, in an attribute too: neither a tag nor a control character acts."""
    return html.escape(message(text))
