"""Draws lines over a run as SVG: axes with units, a name at the end of each line, a size that a phone shows too.

A line is told from the others by its name, its dashes and the shape of its last point as well as by its colour; the
colours are those of the page's style sheet, which has them for light and for dark.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitcomposer.escape import for_html

WIDTH, HEIGHT = 360, 232  # of the drawing: a phone shows it as it is, and its letters of 12 pixels with it
_TOP, _BOTTOM, _LEFT = 26, 42, 44
_LETTER = 7.4  # pixels of a letter, about
_LONGEST = 13  # letters of a name beside a line
_POINTS = 240  # of a line: more are means of neighbours
_GAP = 13  # pixels between two names
COLOURS = 6
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 4")


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        name: At its end; empty for one that needs none.
        style: Which of the colours, dashes and marks; None is a colour between blue and red, by ``shade`` in [0, 1].
        raw: Drawn faint below the others: what a smoothed line is made of.
        error: Half the height of a band about the line, in the units of ``ys``.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int | None = 0
    shade: float = 0.0
    raw: bool = False
    error: Sequence[float] | None = None


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    low: float | None = None,
    high: float | None = None,
    note: str = "",
) -> str:
    """A figure with its title; a sentence in place of the lines where nothing was measured.

    Args:
        x_name, y_name: With the unit.
        low, high: Of the axis of y, where they are fixed.
        note: Below the lines.
    """
    drawn = [_thinned(each) for each in series if len(each.xs)]
    caption = f"<figcaption>{for_html(title)}</figcaption>"
    below = f'<p class="note">{for_html(note)}</p>' if note else ""
    if not drawn:
        return f'<figure>{caption}<p class="none">not measured</p>{below}</figure>'
    return f"<figure>{caption}{_svg(title, drawn, x_name, y_name, low, high)}{below}</figure>"


def _svg(title: str, series: Sequence[Series], x_name: str, y_name: str, low: float | None, high: float | None) -> str:
    names = [_short("" if each.raw else each.name) for each in series]
    right = 12 + _LETTER * max((len(name) for name in names), default=0)
    xs = [x for each in series for x in each.xs]
    ys = [y for each in series for y in _reach(each)]
    x_ticks = _ticks(min(xs), max(xs), 4, tight=True)
    y_ticks = _ticks(min(ys) if low is None else low, max(ys) if high is None else high, 4)
    place_x = _scale(min(xs), max(xs), _LEFT, WIDTH - right)
    place_y = _scale(
        min(y_ticks[0], min(ys)) if low is None else low,
        max(y_ticks[-1], max(ys)) if high is None else high,
        HEIGHT - _BOTTOM,
        _TOP,
    )
    parts = [_grid(y_ticks, place_y, WIDTH - right), _x_axis(x_ticks, place_x)]
    parts += [_line(each, place_x, place_y) for each in series]
    parts += [_leader(each, place_x, place_y, WIDTH - right) for each, name in zip(series, names, strict=True) if name]
    parts.append(_names(series, names, place_y, WIDTH - right + 6))
    parts.append(f'<text class="axis" x="{_LEFT + (WIDTH - right - _LEFT) / 2:.0f}" y="{HEIGHT - 4}" ')
    parts.append(f'text-anchor="middle">{for_html(x_name)}</text>')
    parts.append(f'<text class="axis" x="0" y="12">{for_html(y_name)}</text>')
    label = for_html(f"{title}: {y_name} over {x_name}. {_in_words(series)}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _in_words(series: Sequence[Series]) -> str:
    """What a reader who does not see it is told."""
    ends = [f"{each.name or 'it'} goes from {si(each.ys[0])} to {si(each.ys[-1])}" for each in series if not each.raw]
    return "; ".join(ends[:8])


def _reach(series: Series) -> list[float]:
    """The lowest and the highest value that a line and its band have."""
    if series.error is None:
        return [min(series.ys), max(series.ys)]
    pairs = list(zip(series.ys, series.error, strict=True))
    return [min(y - e for y, e in pairs), max(y + e for y, e in pairs)]


def _thinned(series: Series) -> Series:
    """The same line with few points: means over equal numbers of neighbours."""
    count = len(series.xs)
    if count <= _POINTS:
        return series
    cuts = [count * at // _POINTS for at in range(_POINTS + 1)]

    def means(values: Sequence[float]) -> list[float]:
        return [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]

    error = None if series.error is None else means(series.error)
    return Series(series.name, means(series.xs), means(series.ys), series.style, series.shade, series.raw, error)


def _scale(first: float, last: float, begin: float, end: float) -> Callable[[float], float]:
    """Where on the drawing a value lies; in the middle where all are the same."""
    span = last - first
    return lambda value: begin + (end - begin) * ((value - first) / span if span else 0.5)


def _ticks(low: float, high: float, count: int, *, tight: bool = False) -> list[float]:
    """About ``count`` round numbers; with ``tight`` none lies outside of low and high."""
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # all the same, but for rounding
        if tight:
            return [low]
        pad = abs(low) / 2 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9) if tight else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if tight else math.ceil(high / step - 1e-9)
    return [step * at for at in range(first, last + 1)]


def si(value: float) -> str:
    """A number in few letters: 1.2k, 35M, 0.05, 4e-05."""
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.2g}"
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def _grid(ticks: Sequence[float], place: Callable[[float], float], end: float) -> str:
    parts = []
    for tick in ticks:
        y = place(tick)
        if _TOP - 1 <= y <= HEIGHT - _BOTTOM + 1:
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{end:.0f}"/>')
            parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{si(tick)}</text>')
    return "".join(parts)


def _x_axis(ticks: Sequence[float], place: Callable[[float], float]) -> str:
    base = HEIGHT - _BOTTOM
    marks = "".join(f"M{place(tick):.1f} {base}v4" for tick in ticks)
    texts = [f'<text x="{place(t):.1f}" y="{base + 16}" text-anchor="middle">{si(t)}</text>' for t in ticks]
    return f'<path class="grid" d="{marks}"/>{"".join(texts)}'


def _line(series: Series, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> str:
    points = [(place_x(x), place_y(y)) for x, y in zip(series.xs, series.ys, strict=True)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    look = _look(series)
    band = ""
    if series.error is not None:
        pairs = list(zip(series.xs, series.ys, series.error, strict=True))
        above = [f"{place_x(x):.1f} {place_y(y + e):.1f}" for x, y, e in pairs]
        under = [f"{place_x(x):.1f} {place_y(y - e):.1f}" for x, y, e in reversed(pairs)]
        band = f'<path class="band" {look} d="M{"L".join(above + under)}Z"/>'
    if series.raw:
        return f'<path class="raw" {look} d="{path}"/>'
    dashes = _DASHES[(series.style or 0) % len(_DASHES)]
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    shown = points if len(points) <= 30 else points[-1:]
    marks = "".join(_mark(series, x, y) for x, y in shown)
    return f'{band}<g {look}><path class="line"{pattern} d="{path}"/>{marks}</g>'


def _leader(series: Series, place_x: Callable[[float], float], place_y: Callable[[float], float], end: float) -> str:
    """From the end of a line that is shorter than others to its name."""
    x, y = place_x(series.xs[-1]), place_y(series.ys[-1])
    return f'<path class="leader" {_look(series)} d="M{x:.1f} {y:.1f}H{end:.1f}"/>' if end - x > 8 else ""


def _look(series: Series) -> str:
    """The colour that the style sheet gives everything of a line."""
    if series.style is not None:
        return f'style="--c:var(--s{series.style % COLOURS})"'
    return f'style="--c:hsl({250 - 215 * series.shade:.0f} 60% var(--light))"'


def _mark(series: Series, x: float, y: float) -> str:
    """A point of a line: a disc, a square, a triangle or a diamond."""
    shape = (series.style or 0) % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    outline = ("m-3-3h6v6h-6z", "m0-4 4 7h-8z", "m0-4 4 4-4 4-4-4z")[shape - 1]
    return f'<path class="mark" d="M{x:.1f} {y:.1f}{outline}"/>'


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}\u2026"


def _names(series: Sequence[Series], names: Sequence[str], place: Callable[[float], float], x: float) -> str:
    """The names at the ends of the lines, moved apart where they would lie on each other."""
    ends = sorted((place(each.ys[-1]), name, _look(each)) for each, name in zip(series, names, strict=True) if name)
    spots: list[float] = []
    for y, _, _ in ends:
        spots.append(max(y, spots[-1] + _GAP) if spots else max(y, _TOP))
    over = spots[-1] - (HEIGHT - _BOTTOM) if spots else 0
    if over > 0:
        spots[-1] -= over
        for at in range(len(spots) - 2, -1, -1):
            spots[at] = min(spots[at], spots[at + 1] - _GAP)
    return "".join(
        f'<text class="name" {look} x="{x:.0f}" y="{spot + 4:.1f}">{for_html(name)}</text>'
        for spot, (_, name, look) in zip(spots, ends, strict=True)
    )
