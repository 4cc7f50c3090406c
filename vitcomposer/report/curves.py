"""Chooses what of a run is drawn: loss, accuracy, learning rate, speed, attention, and all else that it logged."""

import itertools
import math
import re
from collections.abc import Sequence

from vitcomposer.report.answers import x_of
from vitcomposer.report.charts import COLOURS, Series, chart
from vitcomposer.report.statistics import SHOWN, class_scores, is_unequal, standard_error
from vitcomposer.report.story import EMA, Story

SMOOTHED_POINTS = 100  # the smoothed loss is a mean over 1/100 of the run
_DRAWN = {
    "loss/train/total",
    "metrics/eval/loss",
    "metrics/eval/top1",
    "metrics/ema/top1",
    "throughput/images_per_sec",
    "throughput/data_wait_fraction",
    "throughput/train_flops",
}
_FAMILY = re.compile(r"_[^/]*$")  # top1_<head>, top5_k<k>: one picture
_NAMED = 12  # lines beside each other that have room for their names


def main_charts(story: Story) -> list[str]:
    """Accuracy, loss, learning rate, images/s and waiting."""
    x = x_of(story)
    rate = Series("", *story.series("lr", x))
    speed = Series("", *story.series("throughput/images_per_sec", x))
    waited = Series("", *_percent(*story.series("throughput/data_wait_fraction", x)))
    return [
        _accuracy(story, x),
        *([_of_classes(story, x)] if story.said is not None and is_unequal(class_scores(story.said)) else []),
        _loss(story, x),
        chart("Learning rate", [rate], x_name=x, y_name="largest of the groups", low=0),
        chart("Speed", [speed], x_name=x, y_name="images/s in training", low=0),
        chart("Waiting for data", [waited], x_name=x, y_name="% of the training time", low=0, high=100),
    ]


def _loss(story: Story, x: str) -> str:
    xs, ys = story.series("loss/train/total", x)
    smooth = smoothed(ys)
    lines = [Series("training", xs, smooth, 0)]
    if smooth != ys:
        lines.insert(0, Series("", xs, ys, 0, raw=True))
    lines.append(Series("evaluation", *story.series("metrics/eval/loss", x), 1))
    note = "Training loss with its augmentation and smoothed labels, where it has them: not comparable as it stands."
    both = all(len(line.xs) for line in lines)
    return chart("Loss", lines, x_name=x, y_name="loss of an image", note=note if both else "")


def _accuracy(story: Story, x: str) -> str:
    lines = []
    for style, (kind, name) in enumerate((("eval", "weights"), (EMA, "EMA"))):
        xs, ys = story.series(f"metrics/{kind}/top1", x)
        lines.append(Series(name, xs, [100 * y for y in ys], style, error=_errors(ys, story.evaluated_images)))
    if any(len(line.xs) for line in lines):
        note = f"Bands are {SHOWN} standard errors of the images." if story.evaluated_images else ""
        return chart("Top-1", lines, x_name=x, y_name="top-1 (%)", note=note)
    keys = numbered(story, r"knn/top1_k(\d+)")
    lines = [
        Series(f"k = {k}", *_percent(*story.series(key, x)), at % COLOURS)
        for at, (key, (k,)) in enumerate(keys.items())
    ]
    return chart("k-NN top-1" if lines else "Top-1", lines, x_name=x, y_name="top-1 (%)")


def _of_classes(story: Story, x: str) -> str:
    kinds = enumerate((("eval", "weights"), (EMA, "EMA")))
    lines = [Series(name, *_percent(*story.series(f"metrics/{kind}/class_top1", x)), at) for at, (kind, name) in kinds]
    return chart("Mean of the classes", lines, x_name=x, y_name="mean of their top-1 (%)")


def _errors(shares: Sequence[float], images: int | None) -> list[float] | None:
    return [100 * SHOWN * standard_error(share, images) for share in shares] if images else None


def _percent(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    return xs, [100 * y for y in ys]


def attention_charts(story: Story) -> list[str]:
    """Non-locality and gates over training, as in arXiv:2103.10697, section 4; none where they were not measured."""
    x = x_of(story)
    reach = numbered(story, r"attention/nonlocality/layer(\d+)")
    if not reach:
        return []
    lines = _shaded(story, x, {key: f"layer {layer}" for key, (layer,) in reach.items()})
    found = [chart("How far attention reaches", lines, x_name=x, y_name="mean distance (patches)", low=0)]
    gates = numbered(story, r"attention/gate/layer(\d+)/head(\d+)")
    for layer, of_layer in itertools.groupby(gates.items(), key=lambda item: item[1][0]):
        lines = _shaded(story, x, {key: f"head {head}" for key, (_, head) in of_layer})
        title = f"Gates of layer {layer}: share of positional attention"
        found.append(chart(title, lines, x_name=x, y_name="gate", low=0, high=1))
    return found


def more_charts(story: Story) -> list[str]:
    """A chart for each number that was logged and is drawn nowhere else."""
    x = x_of(story)
    keys = sorted({key for line in story.lines for key, value in line.items() if value is not None and _is_more(key)})
    families: dict[str, list[str]] = {}
    for key in keys:
        families.setdefault(_FAMILY.sub("", key), []).append(key)
    found = []
    for family, members in families.items():
        alone = len(members) == 1
        lines = _shaded(story, x, {key: "" if alone else key[len(family) + 1 :] for key in members})
        found.append(chart(members[0] if alone else family, lines, x_name=x, y_name=family.rpartition("/")[2]))
    return found


def _is_more(key: str) -> bool:
    return "/" in key and key not in _DRAWN and not key.startswith(("attention/", "knn/top1", "trainer/"))


def _shaded(story: Story, x: str, names: dict[str, str]) -> list[Series]:
    """A line for each key, the colours in their order; of many, some have their names."""
    every = max(1, math.ceil(len(names) / _NAMED))
    lines = []
    for at, (key, name) in enumerate(names.items()):
        shade = at / max(1, len(names) - 1)
        lines.append(Series("" if at % every else name, *story.series(key, x), None, shade))
    return lines


def numbered(story: Story, pattern: str) -> dict[str, tuple[int, ...]]:
    """The keys that match, with the numbers in them, in the order of those."""
    keys = {key for line in story.lines for key, value in line.items() if value is not None}
    matches = {key: match for key in keys if (match := re.fullmatch(pattern, key))}
    numbers = {key: tuple(int(group) for group in match.groups()) for key, match in matches.items()}
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window around each point; centred, because a running mean would lag behind a falling loss."""
    half = len(values) // (2 * SMOOTHED_POINTS)
    if half == 0:
        return list(values)
    sums = list(itertools.accumulate(values, initial=0.0))
    windows = ((max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]
