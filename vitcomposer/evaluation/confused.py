"""Counts which classes are taken for which. Numpy alone is needed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.integer[Any]]


def weakest(truth: Labels, predictions: Labels, most: int) -> list[tuple[int, int, float, int, float]]:
    """The classes of which most is wrong: class, images, share that is right, what is said most instead, and its share.

    Of classes with the same share, that with more images comes first. Classes without a mistake are left out.
    """
    images = np.bincount(truth)
    right = np.bincount(truth[truth == predictions], minlength=len(images))
    wrong = np.flatnonzero(right < images)
    order = sorted(wrong.tolist(), key=lambda label: (right[label] / images[label], -images[label]))[:most]
    instead = {true: (guess, count) for true, guess, count in reversed(confusions(truth, predictions))}
    rows = []
    for label in order:
        guess, count = instead[label]
        rows.append((label, int(images[label]), float(right[label] / images[label]), guess, count / int(images[label])))
    return rows


def confusions(truth: Labels, predictions: Labels) -> list[tuple[int, int, int]]:
    """True class, predicted class and how many images, the most frequent first, equal ones by class."""
    wrong = truth != predictions
    pairs, counts = np.unique(np.stack((truth[wrong], predictions[wrong])), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return list(zip(*pairs[:, order].tolist(), counts[order].tolist(), strict=True)) if len(counts) else []
