"""Says how sure an accuracy is, and whether two accuracies are shown to differ.

A share p of n images has the binomial standard error sqrt(p (1 - p) / n). The difference of two shares on different
images has sqrt(p1 (1 - p1) / n1 + p2 (1 - p2) / n2). On the same images, of which b are right in the first run alone
and c in the second alone, the difference is (c - b) / n with the standard error sqrt(b + c - (b - c)^2 / n) / n
(A. Agresti, Categorical Data Analysis, on matched pairs). Two standard errors are about 95 %.
They are those of the images: what another seed of the same training would change is in none of them.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitcomposer.data.labels import UNEQUAL
from vitcomposer.evaluation.confused import confusions
from vitcomposer.runs.predictions import Predictions

SHOWN = 2  # standard errors


def standard_error(share: float, images: int) -> float:
    """Of a share of images, which is in [0, 1]."""
    return math.sqrt(max(share * (1 - share), 0.0) / images)


def interval(share: float, images: int) -> tuple[float, float]:
    """Wilson's interval of two standard errors, which stays in [0, 1] (E. B. Wilson, JASA 22, 1927)."""
    z2 = SHOWN**2
    middle = (share + z2 / (2 * images)) / (1 + z2 / images)
    half = SHOWN * math.sqrt(max(share * (1 - share), 0.0) / images + z2 / (4 * images**2)) / (1 + z2 / images)
    return max(middle - half, 0.0), min(middle + half, 1.0)


@dataclass(frozen=True)
class Difference:
    """Of two accuracies, the second less the first.

    Attributes:
        images: Of the smaller set where they are two.
        paired: On the same images.
    """

    value: float
    error: float
    images: int
    paired: bool

    @property
    def is_shown(self) -> bool:
        """Whether it is more than two of its standard errors."""
        return abs(self.value) > SHOWN * self.error

    def __str__(self) -> str:
        """Such as ``-1.2; 479 images: 2 standard errors of a difference are 3.3: not shown to differ``."""
        images = f"{self.images:,} images{', paired' if self.paired else ''}"
        verdict = "shown to differ" if self.is_shown else "not shown to differ"
        return (
            f"{100 * self.value:+.1f}; {images}: {SHOWN} standard errors of a difference are "
            f"{100 * SHOWN * self.error:.1f}: {verdict}"
        )


def unpaired(first: float, first_images: int, second: float, second_images: int) -> Difference:
    """Of two shares on different images, or on images of which only their number is known."""
    error = math.hypot(standard_error(first, first_images), standard_error(second, second_images))
    return Difference(second - first, error, min(first_images, second_images), False)


def paired(first: Predictions, second: Predictions) -> Difference | None:
    """Of two runs on the same images; None where images or labels are not the same."""
    same = np.array_equal(first.sample_id, second.sample_id) and np.array_equal(first.label, second.label)
    if not same:
        return None
    images = len(first.label)
    lost, won = int((first.right & ~second.right).sum()), int((second.right & ~first.right).sum())
    error = math.sqrt(max(lost + won - (lost - won) ** 2 / images, 0.0)) / images
    return Difference((won - lost) / images, error, images, True)


@dataclass(frozen=True)
class ClassScore:
    """What became of the images of one class.

    Attributes:
        taken_for: The class that most of its mistakes were given, and how many; None without a mistake.
    """

    label: int
    images: int
    right: int
    taken_for: tuple[int, int] | None

    @property
    def top1(self) -> float:
        """In [0, 1]."""
        return self.right / self.images


def class_scores(found: Predictions) -> list[ClassScore]:
    """Of every class that has images, the lowest accuracy first, among equal ones those of more images."""
    most: dict[int, tuple[int, int]] = {}
    for true, guess, count in confusions(found.label, found.prediction):
        most.setdefault(true, (guess, count))
    images, right = np.bincount(found.label), np.bincount(found.label[found.right], minlength=found.label.max() + 1)
    scores = [ClassScore(at, int(images[at]), int(right[at]), most.get(at)) for at in np.flatnonzero(images).tolist()]
    return sorted(scores, key=lambda score: (score.top1, -score.images))


def class_mean(scores: list[ClassScore]) -> tuple[float, float]:
    """Mean of the classes' accuracies, and its standard error: that of a mean."""
    shares = np.array([score.top1 for score in scores])
    images = np.array([score.images for score in scores])
    return float(shares.mean()), float(np.sqrt((shares * (1 - shares) / images).sum()) / len(scores))


def is_unequal(scores: list[ClassScore]) -> bool:
    """Whether the mean of the classes is told first: the largest has over ``UNEQUAL`` times the images of the least."""
    images = [score.images for score in scores]
    return max(images) > UNEQUAL * min(images)


def class_mean_difference(first: Predictions, second: Predictions) -> Difference | None:
    """Of the means of the classes' accuracies; None where images or labels are not the same.

    The variance of the mean difference of a class's images, added up over the classes, over their number squared.
    """
    if paired(first, second) is None:
        return None
    change = second.right.astype(float) - first.right.astype(float)  # (N,)
    of_classes = [change[first.label == label] for label in np.unique(first.label)]
    error = math.sqrt(sum(each.var() / len(each) for each in of_classes)) / len(of_classes)
    value = float(np.mean([each.mean() for each in of_classes]))
    return Difference(value, error, len(change), True)


def surest_mistakes(found: Predictions, count: int) -> NDArray[np.intp]:
    """Rows of wrong predictions, the most confident first, equal ones by image; NaN is left out."""
    rows = np.flatnonzero(~found.right & np.isfinite(found.confidence))
    return rows[np.argsort(-found.confidence[rows], kind="stable")][:count]
