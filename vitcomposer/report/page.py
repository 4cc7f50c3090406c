"""Puts parts together into one HTML page that needs no network and no script: style sheet, tables, cards, text."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vitcomposer.escape import for_html

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1b1b1b; --soft: #5a5a5a; --line: #dcdcd8; --panel: #f6f6f3;
  --s0: #1f5fa8; --s1: #b4500a; --s2: #22733a; --s3: #8046a0; --s4: #a3283a; --s5: #4d6570; --light: 29%; }
@media (prefers-color-scheme: dark) { :root { --bg: #16181b; --ink: #e8e8e6; --soft: #a9adb3; --line: #3a3e44;
  --panel: #202327; --s0: #7db4f0; --s1: #f2a35e; --s2: #7ccf8d; --s3: #cc9be0; --s4: #f08a93; --s5: #b3c3cb;
  --light: 72%; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 16px/1.5 system-ui, sans-serif; background: var(--bg); color: var(--ink); max-width: 1180px;
  margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .25rem 0 .5rem; max-width: 46rem; }
.lead, .note, .soft { color: var(--soft); }
.note, .soft { font-size: .875rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: var(--panel); border-radius: 8px; padding: .75rem 1rem; }
.card h2 { border: 0; margin: 0; padding: 0; font-size: .875rem; font-weight: 600; color: var(--soft); }
.card strong { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card p { margin: .125rem 0 0; font-size: .875rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; max-width: 520px; }
figcaption { font-weight: 600; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; overflow: visible; }
svg text { fill: var(--soft); } svg .axis { fill: var(--ink); } svg .name { fill: var(--c); font-weight: 600; }
.grid { stroke: var(--line); fill: none; } .line { stroke: var(--c); stroke-width: 2; fill: none; }
.raw { stroke: var(--c); stroke-width: 1; fill: none; opacity: .3; }
.leader { stroke: var(--c); opacity: .45; stroke-dasharray: 1 4; } .band { fill: var(--c); opacity: .15; }
circle, .mark { fill: var(--c); }
.none { background: var(--panel); padding: 2rem 1rem; text-align: center; color: var(--soft); border-radius: 8px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 400; color: var(--soft); } thead th { font-weight: 600; color: var(--ink); }
@media (max-width: 600px) { th, td { padding-right: .5rem; font-size: .9375rem; } }
pre { background: var(--panel); border-radius: 8px; padding: .75rem 1rem; overflow-x: auto; font-size: .875rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .75rem 0; } summary { cursor: pointer; font-weight: 600; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: .75rem 1rem; }
.pair { min-width: 0; overflow-wrap: anywhere; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); gap: .5rem; margin: .25rem 0; }
.photos figure { max-width: 128px; font-size: .8125rem; line-height: 1.3; overflow-wrap: anywhere; }
.photos img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--panel); }
@media print { :root { --bg: #fff; --ink: #000; --soft: #444; --line: #ccc; --panel: #f4f4f4; --s0: #1f5fa8;
  --s1: #b4500a; --s2: #22733a; --s3: #8046a0; --s4: #a3283a; --s5: #4d6570; --light: 29%; }
  body { max-width: none; padding: 0; font-size: 11pt; } figure, .card, .pair, tr { break-inside: avoid; }
  .cards, .charts { grid-template-columns: 1fr 1fr; } h2, h3 { break-after: avoid; } pre { white-space: pre-wrap; } }
"""

# Nothing is fetched and nothing runs, whatever a text in it may try.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


_BESIDE_A_NUMBER = re.compile(r"(?<=\d) (?=%)|(?<=\d) (?=\u00b1)|(?<=\u00b1) (?=\d)")

_IN_A_KEY = re.compile(r"((?<=[^\W\d])[._]|/)(?=\w)")


class Card(NamedTuple):
    """A question with its answer in a few letters, and what is behind it."""

    question: str
    answer: str
    behind: str


def page(title: str, lead: str, parts: Iterable[str]) -> str:
    """The whole document.

    Args:
        lead: A sentence below the title.
        parts: HTML.
    """
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{for_html(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{for_html(title)}</h1>\n<p class="lead">{for_html(lead)}</p>\n{body}\n</body>\n</html>\n'
    )


def cards(found: Iterable[Card]) -> str:
    """Side by side where there is room."""
    each = (
        f'<section class="card"><h2>{for_html(card.question)}</h2><strong>{shown(card.answer)}</strong>'
        f"<p>{shown(card.behind)}</p></section>"
        for card in found
    )
    return f'<div class="cards">{"".join(each)}</div>'


def section(title: str, *parts: str) -> str:
    """A heading with what is below it; nothing where there is nothing."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{for_html(title)}</h2>\n{body}\n</section>" if body else ""


def details(title: str, *parts: str) -> str:
    """What is shown when the title is clicked; the browser does that without a script."""
    body = "\n".join(part for part in parts if part)
    return f"<details><summary>{for_html(title)}</summary>\n{body}\n</details>" if body else ""


def charts(found: Sequence[str]) -> str:
    """Side by side where there is room."""
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def shown(words: str) -> str:
    """Text with what belongs to a number on the same line as the number."""
    return _BESIDE_A_NUMBER.sub("\u00a0", for_html(words))


def _cell(words: str) -> str:
    """Text that may also go on in the next line behind the points, slashes and underscores of keys and paths."""
    return _IN_A_KEY.sub(r"\1<wbr>", shown(words))


def text(words: str, kind: str = "") -> str:
    """A paragraph."""
    mark = f' class="{kind}"' if kind else ""
    return f"<p{mark}>{shown(words)}</p>" if words else ""


def code(lines: str) -> str:
    """Text as it is, to be copied."""
    return f"<pre>{for_html(lines)}</pre>"


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table whose first column names its rows; it scrolls by itself where it is too wide."""
    if not rows:
        return ""
    top = f"<thead><tr>{''.join(f'<th>{_cell(cell)}</th>' for cell in head)}</tr></thead>" if head else ""
    lines = (
        f"<tr><th>{_cell(row[0])}</th>{''.join(f'<td>{_cell(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f'<div class="wide"><table>{top}<tbody>{"".join(lines)}</tbody></table></div>'
