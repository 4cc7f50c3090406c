"""Puts several runs side by side: what differs in their settings, their curves, and whether their accuracies differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitcomposer.escape import message
from vitcomposer.report.answers import hours_name
from vitcomposer.report.charts import COLOURS, Series, chart
from vitcomposer.report.curves import smoothed
from vitcomposer.report.page import charts, page, section, table, text
from vitcomposer.report.statistics import (
    SHOWN,
    ClassScore,
    Difference,
    class_mean,
    class_mean_difference,
    class_scores,
    is_unequal,
    paired,
    standard_error,
    unpaired,
)
from vitcomposer.report.story import Story
from vitcomposer.report.words import duration, flops, hours, percent, setting
from vitcomposer.whole_files import write_whole

# Where a run lies and what it is called differs between any two.
_OF_ITSELF = ("run.name", "run.folder", "run.remote")


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a cell for each run, and what is to be said of each but the first."""

    name: str
    cells: list[str]
    remarks: list[str]


def write_comparison(stories: Sequence[Story], out: Path) -> Path:
    """Write the page about two runs or more, compared with the first of them, and return its path."""
    write_whole(out, comparison(stories))
    return out


def comparison(stories: Sequence[Story]) -> str:
    """The page."""
    names = names_of(stories)
    first = names[0]
    rows = differing_settings(stories)
    parts = [
        *(text(problem, "soft") for story in stories for problem in story.problems),
        section("What came out", table([_cells(row) for row in results(stories)], ("", *names)), _how(stories)),
        section(
            "What differs in the settings",
            table([(row.name, *row.cells) for row in rows], ("", *names))
            or text("Nothing but where the runs lie and what they are called."),
        ),
        section("Accuracy", charts(_curves(stories, names, "Top-1"))),
        section("Training loss", charts(_curves(stories, names, "Loss"))),
    ]
    unfinished = [name for name, story in zip(names, stories, strict=True) if not story.finished]
    lead = f"{', '.join(names[1:])} compared with {first}."
    lead += f" Not ended yet, or cut off: {', '.join(unfinished)}." if unfinished else ""
    return page(f"{len(stories)} runs", lead, parts)


def _cells(row: Row) -> tuple[str, ...]:
    cells = [f"{cell} ({remark})" if remark else cell for cell, remark in zip(row.cells, row.remarks, strict=True)]
    return row.name, *cells


def _how(stories: Sequence[Story]) -> str:
    """What the figures mean, in words."""
    pairs = [found.paired for story in stories[1:] if (found := difference(stories[0], story)) is not None]
    words = [
        "\u00b1 is one standard error of the images, the root of p (1 - p) / n.",
        f"A difference of more than {SHOWN} of its standard errors is shown; one of less may be chance.",
    ]
    if any(pairs):
        words += [
            "Paired: b of the n images are right in the first run alone and c in the other alone; the difference is",
            "(c - b) / n and its standard error the root of b + c - (b - c)\u00b2 / n, over n.",
        ]
    if not all(pairs):
        words += [
            "On different images the standard error of a difference is the root of",
            "p1 (1 - p1) / n1 + p2 (1 - p2) / n2.",
        ]
    words.append("What another seed of the same training would change is in none of them.")
    return text(" ".join(words), "note")


def names_of(stories: Sequence[Story]) -> list[str]:
    """Names of the folders, with as much of the way to them as tells them apart."""
    paths = [story.folder.resolve() for story in stories]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def differing_settings(stories: Sequence[Story]) -> list[Row]:
    """Keys of the configuration that have not the same value in all runs."""
    keys = dict.fromkeys(key for story in stories for key in story.settings)
    rows = []
    for key in keys:
        values = [setting(story.settings[key]) if key in story.settings else "-" for story in stories]
        if len(set(values)) > 1 and key not in _OF_ITSELF:
            rows.append(Row(key, values, [""] * len(values)))
    return rows


def results(stories: Sequence[Story]) -> list[Row]:
    """Accuracy with the differences from the first run, speed and cost."""
    scores = [class_scores(story.said) if story.said is not None else None for story in stories]
    rows = [_class_means(stories, scores)] if any(each and is_unequal(each) for each in scores) else []
    rows += [_accuracies(stories)] if any(story.top1 is not None for story in stories) else []
    rows += [_neighbours(stories)] if any(story.last("knn/top1") is not None for story in stories) else []
    spent = [story.device_hours for story in stories]
    kinds = dict.fromkeys(hours_name(story) for story in stories)
    rows.append(_row(" or ".join(kinds), [None if value is None else hours(value) for value in spent]))
    rows.append(_row("wall clock", [None if s.seconds is None else duration(s.seconds) for s in stories]))
    speeds = [story.number("images_per_sec") or story.last("throughput/images_per_sec") for story in stories]
    rows.append(_row("images/s", [None if speed is None else f"{speed:,.0f}" for speed in speeds]))
    work = [story.number("train_flops") for story in stories]
    rows.append(_row("training", [None if value is None else flops(value) for value in work]))
    return [row for row in rows if any(cell != "-" for cell in row.cells)]


def _row(name: str, cells: Sequence[str | None]) -> Row:
    return Row(name, [cell or "-" for cell in cells], [""] * len(cells))


def _class_means(stories: Sequence[Story], scores: Sequence[list[ClassScore] | None]) -> Row:
    cells, remarks = [], []
    first = stories[0].said
    for story, found in zip(stories, scores, strict=True):
        cells.append(percent(*class_mean(found)) if found else "-")
        change = None
        if story is not stories[0] and first is not None and story.said is not None:
            change = class_mean_difference(first, story.said)
        remarks.append("" if change is None else str(change))
    return Row("mean of classes", cells, remarks)


def _accuracies(stories: Sequence[Story]) -> Row:
    cells, remarks = [], []
    for story in stories:
        images = story.evaluated_images
        error = standard_error(story.top1, images) if story.top1 is not None and images else None
        cells.append(percent(story.top1, error) + (f", {story.weights}" if story.weights else ""))
        found = None if story is stories[0] else difference(stories[0], story)
        others = "" if _on_the_same_images(stories[0], story) else "; the images are others"
        remarks.append("" if found is None else f"{found}{others}")
    return Row("top-1", cells, remarks)


def _on_the_same_images(first: Story, other: Story) -> bool:
    """Whether nothing says that they were measured on images of different splits."""
    known = [story.images.get("val") for story in (first, other)]
    indexes = [each.get("index") for each in known if isinstance(each, dict) and each.get("index")]
    return len(set(map(str, indexes))) < 2


def difference(first: Story, other: Story) -> Difference | None:
    """Of their top-1; paired where both kept what they said about the same images, None where a number is missing."""
    if first.said is not None and other.said is not None:
        found = paired(first.said, other.said)
        if found is not None:
            return found
    if first.top1 is None or other.top1 is None or not first.evaluated_images or not other.evaluated_images:
        return None
    return unpaired(first.top1, first.evaluated_images, other.top1, other.evaluated_images)


def _neighbours(stories: Sequence[Story]) -> Row:
    values = [story.last("knn/top1") for story in stories]
    cells, remarks = [], []
    for story, value in zip(stories, values, strict=True):
        images = story.evaluated_images
        cells.append(percent(value, standard_error(value, images) if value is not None and images else None))
        base, others = values[0], stories[0].evaluated_images
        known = story is not stories[0] and None not in (base, value) and images and others
        remarks.append(str(unpaired(base or 0.0, others or 1, value or 0.0, images or 1)) if known else "")
    return Row("k-NN top-1", cells, remarks)


def _curves(stories: Sequence[Story], names: Sequence[str], what: str) -> list[str]:
    """The same lines over images, seconds and FLOPs."""
    found = []
    for x_name, place in (("images", "sample"), ("seconds", "seconds"), ("training FLOPs", "flops")):
        lines = []
        for at, (story, name) in enumerate(zip(stories, names, strict=True)):
            xs, ys = _accuracy(story, place) if what == "Top-1" else _loss(story, place)
            lines.append(Series(name, xs, ys, at % COLOURS))
        y_name = "top-1 (%)" if what == "Top-1" else "loss of an image"
        found.append(chart(f"{what} over {x_name}", lines, x_name=x_name, y_name=y_name))
    return found


def _accuracy(story: Story, place: str) -> tuple[list[float], list[float]]:
    key = f"metrics/{story.kind}/top1" if story.top1 is not None else "knn/top1"
    xs, ys = _over(story, key, place)
    return xs, [100 * y for y in ys]


def _loss(story: Story, place: str) -> tuple[list[float], list[float]]:
    xs, ys = _over(story, "loss/train/total", place)
    return xs, smoothed(ys)


def _over(story: Story, key: str, place: str) -> tuple[list[float], list[float]]:
    """A number over ``sample``, ``seconds`` or ``flops``; the latter as logged, else in proportion to the images."""
    if place != "flops":
        return story.series(key, place)
    logged = story.series(key, "throughput/train_flops")
    if logged[0]:
        return logged
    work, images = story.number("train_flops"), story.number("images_seen")
    if not work or not images:
        return [], []
    xs, ys = story.series(key, "sample")
    return [x * work / images for x in xs], ys


def in_words(stories: Sequence[Story], out: Path) -> str:
    """What the command prints: settings that differ, then what came out, a column for each run."""
    names = names_of(stories)
    rows = [Row("", names, [""] * len(names)), *differing_settings(stories), *results(stories)]
    heads = max(len(row.name) for row in rows)
    widths = [max(len(row.cells[at]) for row in rows) for at in range(len(names))]
    lines = [f"{out}: {len(stories)} runs"]
    for row in rows:
        cells = "    ".join(cell.ljust(width) for cell, width in zip(row.cells, widths, strict=True))
        remarks = [(name, remark) for name, remark in zip(names, row.remarks, strict=True) if remark]
        beside = f"   ({remarks[0][1]})" if remarks and len(names) == 2 else ""
        lines.append(f"{row.name.ljust(heads)}    {cells}{beside}".rstrip())
        lines += [f"{' ' * heads}    {name}: {remark}" for name, remark in remarks if not beside]
    return message("\n".join(lines))
