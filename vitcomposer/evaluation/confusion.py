"""Shows which classes a model takes for which, as a table and a picture."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vitcomposer.escape import for_terminal
from vitcomposer.evaluation.confused import confusions
from vitcomposer.whole_files import whole_file

LABELLED_CLASSES = 40  # up to here every class has its name beside the matrix
PRINTED_CLASSES = 20  # and up to here every cell its number
_CELLS = 250  # of the picture, on a side: with more classes a cell shows the largest share of several
_LISTED = 25
_NAME_LENGTH = 28
_COLOURS = "Blues"


def write_per_class(
    path: Path, truth: NDArray[np.int32], predictions: NDArray[np.int32], names: Sequence[str] | None
) -> None:
    """A CSV line for every class that has images: class, images, top1, its most frequent confusion, its images."""
    confused = {true: (guess, count) for true, guess, count in reversed(confusions(truth, predictions))}
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(("class", "images", "top1", "most_frequent_confusion", "confused_images"))
        images, right = np.bincount(truth), np.bincount(truth[truth == predictions], minlength=truth.max() + 1)
        for label in np.flatnonzero(images).tolist():
            guess, count = confused.get(label, (None, 0))
            top1 = f"{right[label] / images[label]:.4f}"
            other = "" if guess is None else _name(guess, names)
            lines.writerow((_name(label, names), images[label], top1, other, count))


def draw_confusion(
    truth: NDArray[np.int32], predictions: NDArray[np.int32], names: Sequence[str] | None, *, title: str
) -> bytes:
    """The confusion matrix as PNG: names and numbers where there are few classes, a list of the worst where many.

    Classes are those that occur as truth or as prediction.
    """
    classes = np.union1d(truth, predictions)
    shares = _shares(np.searchsorted(classes, truth), np.searchsorted(classes, predictions), len(classes))
    few = len(classes) <= LABELLED_CLASSES
    side = max(6.0, 0.3 * len(classes) + 3.5) if few else 8.0
    figure = Figure(figsize=(side + 1 if few else side + 6, side), dpi=100, layout="constrained")
    figure.suptitle(title, wrap=True)
    if few:
        matrix = figure.subplots()
        _name_classes(matrix, [_short(_name(label, names)) for label in classes.tolist()])
        if len(classes) <= PRINTED_CLASSES:
            _print_shares(matrix, shares)
    else:
        matrix, worst = figure.subplots(1, 2, width_ratios=(8, 5))
        step = -(-len(classes) // _CELLS)
        shares = _coarse(shares, step)
        matrix.set_xticks([])
        matrix.set_yticks([])
        several = "" if step == 1 else f"; a cell is the largest share among {step} x {step} classes"
        matrix.set_title(f"{len(classes):,} classes in their order{several}", fontsize=9)
        _list_worst(worst, truth, predictions, names)
    # The square root lets a confusion of a few percent be seen beside the diagonal.
    picture = matrix.imshow(np.sqrt(shares), cmap=_COLOURS, vmin=0, vmax=1, interpolation="nearest")
    matrix.set(xlabel="predicted", ylabel="true")
    bar = figure.colorbar(picture, ax=matrix, shrink=0.6, ticks=np.sqrt([0, 0.01, 0.05, 0.2, 0.5, 1]))
    bar.set_ticklabels(["0", "1 %", "5 %", "20 %", "50 %", "100 %"])
    bar.set_label("share of the true class")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _shares(truth: NDArray[np.int64], predictions: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    counts = np.zeros((classes, classes), np.float32)
    np.add.at(counts, (truth, predictions), 1)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _coarse(shares: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """The largest of every ``step`` x ``step`` cells: a mean would hide a single confused pair."""
    side = -(-len(shares) // step)
    padded = np.zeros((side * step, side * step), np.float32)
    padded[: len(shares), : len(shares)] = shares
    return padded.reshape(side, step, side, step).max(axis=(1, 3))


def _name_classes(axes: Axes, names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)


def _print_shares(axes: Axes, shares: NDArray[np.float32]) -> None:
    for row, column in np.argwhere(shares > 0).tolist():
        share = float(shares[row, column])
        colour = "white" if share > 0.4 else "black"
        text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _list_worst(
    axes: Axes, truth: NDArray[np.int32], predictions: NDArray[np.int32], names: Sequence[str] | None
) -> None:
    axes.set_axis_off()
    axes.set_title("most frequent confusions", fontsize=9, loc="left")
    for line, (true, guess, count) in enumerate(confusions(truth, predictions)[:_LISTED]):
        share = count / int((truth == true).sum())
        text = f"{share:4.0%}  {_short(_name(true, names))} as {_short(_name(guess, names))}"
        axes.text(0, 1 - (line + 1) / (_LISTED + 1), text, fontsize=8, family="monospace", transform=axes.transAxes)


def _name(label: int, names: Sequence[str] | None) -> str:
    return str(label) if names is None else names[label]


def _short(name: str) -> str:
    name = for_terminal(name)
    name = name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 3]}..."
    return name.replace("$", r"\$")  # which would begin a formula
