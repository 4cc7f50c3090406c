"""Counts which classes are taken for which. Numpy alone is needed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.integer[Any]]


def confusions(truth: Labels, predictions: Labels) -> list[tuple[int, int, int]]:
    """True class, predicted class and how many images, the most frequent first, equal ones by class."""
    wrong = truth != predictions
    pairs, counts = np.unique(np.stack((truth[wrong], predictions[wrong])), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return list(zip(*pairs[:, order].tolist(), counts[order].tolist(), strict=True)) if len(counts) else []
