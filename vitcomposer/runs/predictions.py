"""Reads and writes what the last evaluation of a run said about each image, a line of CSV for each.

========================  ==============================================================================
``sample_id``             place of the image in the split, in the order of its shards, from 0
``label``                 its class, a number from 0; ``class_names.json`` has the names
``prediction``            the class with the highest output
``confidence``            the softmax of that output, in [0, 1]
``label_probability``     the softmax of the output of ``label``, in [0, 1]
``step``                  after which the weights were measured, the same in all lines
========================  ==============================================================================

Lines are in the order of ``sample_id``; images that could not be decoded have none. 1.7 MB for 50,000 images.
"""

from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitcomposer.whole_files import write_whole

_COLUMNS = ("sample_id", "label", "prediction", "confidence", "label_probability", "step")
_HEADER = ",".join(_COLUMNS)
_MOST_BYTES = 1 << 28  # five million images
_MOST_CLASSES = 1 << 24


@dataclass(frozen=True)
class Predictions:
    """What was said about N images; every array is (N,).

    Attributes:
        sample_id, label, prediction: Whole numbers.
        confidence, label_probability: In [0, 1], or NaN where an output was none.
        step: After which the weights were measured.
    """

    sample_id: NDArray[np.integer]
    label: NDArray[np.integer]
    prediction: NDArray[np.integer]
    confidence: NDArray[np.floating]
    label_probability: NDArray[np.floating]
    step: int

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which images were given their class, (N,)."""
        return self.label == self.prediction


def write_predictions(path: Path, found: Predictions) -> None:
    """Create or replace the file, 0.04 s for 50,000 images."""
    order = np.argsort(found.sample_id, kind="stable")
    columns = (found.sample_id, found.label, found.prediction, found.confidence, found.label_probability)
    rows = zip(*(column[order].tolist() for column in columns), strict=True)
    lines = [f"{at},{label},{guess},{sure:.4f},{own:.4f},{found.step}" for at, label, guess, sure, own in rows]
    write_whole(path, "\n".join([_HEADER, *lines, ""]))


def read_predictions(path: Path) -> Predictions | None:
    """What :func:`write_predictions` wrote; None where there is no such file.

    Raises:
        ValueError: It is damaged; the message names it.
    """
    if not path.is_file():
        return None
    try:
        return _parse(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not as a run wrote it: {error}. Delete it: the next evaluation writes it."
        ) from error


def _parse(path: Path) -> Predictions:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    head, _, rows = path.read_text(encoding="ascii").partition("\n")
    if head != _HEADER or not rows.strip() or not rows.endswith("\n"):
        raise ValueError(f"it must begin with {_HEADER} and have whole lines below")
    table = np.loadtxt(StringIO(rows), delimiter=",", comments=None, ndmin=2)  # float64 (N, 6)
    if table.shape[1] != len(_COLUMNS):
        raise ValueError(f"a line must have {len(_COLUMNS)} values, it has {table.shape[1]}")
    whole, shares = table[:, [0, 1, 2, 5]], table[:, 3:5]
    if not np.all((whole >= 0) & (whole < 2**53) & (whole == np.floor(whole))):
        raise ValueError("sample_id, label, prediction and step must be whole numbers from 0")
    if table[:, 1:3].max() >= _MOST_CLASSES or np.any((shares < 0) | (shares > 1)):
        raise ValueError("a class or a probability is out of its range")
    ids, labels, guesses, steps = whole.astype(np.int64).T
    if len(np.unique(ids)) < len(ids):
        raise ValueError("an image has two lines")
    return Predictions(ids, labels, guesses, table[:, 3], table[:, 4], int(steps[0]))
