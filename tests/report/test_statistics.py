"""Standard errors are those of their definitions, and what they say is what they show."""

import math

import numpy as np
import pytest

from tests.report.runs import predictions
from vitcomposer.report import statistics as stats


def test_standard_error_is_the_spread_of_a_share() -> None:
    draws = np.random.default_rng(0).binomial(479, 0.939, size=20_000) / 479
    assert stats.standard_error(0.939, 479) == pytest.approx(draws.std(), rel=0.02)
    assert stats.standard_error(1.0, 479) == 0


@pytest.mark.parametrize(("share", "images"), [(0.0, 3), (1.0, 3), (0.5, 1), (0.939, 479)])
def test_interval_holds_the_share_and_stays_in_its_range(share: float, images: int) -> None:
    low, high = stats.interval(share, images)
    assert 0 <= low <= share <= high <= 1 and low < high


def test_interval_holds_what_is_true_about_95_times_of_100() -> None:
    hits = np.random.default_rng(1).binomial(60, 0.9, size=2_000)
    inside = [low <= 0.9 <= high for low, high in (stats.interval(hit / 60, 60) for hit in hits)]
    assert 0.93 < np.mean(inside) < 0.985


def test_paired_difference_is_the_mean_of_the_images_differences() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 200)
    first, second = (np.where(rng.random(200) < share, labels, 2 - labels) for share in (0.7, 0.8))
    found = stats.paired(predictions(labels, first), predictions(labels, second))
    assert found is not None and found.paired and found.images == 200
    each = (second == labels).astype(int) - (first == labels).astype(int)
    assert found.value == pytest.approx(each.mean())
    assert found.error == pytest.approx(each.std() / math.sqrt(200))


def test_other_images_are_no_pairs() -> None:
    assert stats.paired(predictions([0, 1], [0, 1]), predictions([1, 1], [0, 1])) is None
    assert stats.paired(predictions([0, 1], [0, 1]), predictions([0, 1, 1], [0, 1, 1])) is None


def test_unpaired_difference_says_whether_it_is_shown() -> None:
    found = stats.unpaired(0.939, 479, 0.927, 479)
    words = "-1.2; 479 images: 2 standard errors of a difference are 3.2: not shown to differ"
    assert str(found) == words and not found.is_shown
    assert str(stats.unpaired(0.5, 10_000, 0.6, 5_000)).startswith("+10.0; 5,000 images: ")
    assert str(stats.unpaired(0.5, 10_000, 0.6, 5_000)).endswith(": shown to differ")


def test_classes_come_with_what_they_are_taken_for_the_weakest_first() -> None:
    found = predictions([0, 0, 0, 0, 1, 1, 3, 3], [0, 1, 1, 3, 1, 1, 0, 3])
    scores = stats.class_scores(found)
    assert [(s.label, s.images, s.right, s.taken_for) for s in scores] == [
        (0, 4, 1, (1, 2)),
        (3, 2, 1, (0, 1)),
        (1, 2, 2, None),
    ]
    mean, error = stats.class_mean(scores)
    assert mean == pytest.approx((0.25 + 0.5 + 1) / 3)
    assert error == pytest.approx(math.sqrt(0.25 * 0.75 / 4 + 0.25 / 2) / 3)
    assert not stats.is_unequal(scores) and stats.is_unequal([*scores, stats.ClassScore(4, 13, 1, None)])
    assert stats.surest_mistakes(found, 2).tolist() == [1, 2]


def test_mean_of_classes_differs_as_it_spreads_over_draws_of_the_images() -> None:
    """Of a class with 300 images and one with 12, drawn again and again."""
    rng = np.random.default_rng(3)
    labels = np.array([0] * 300 + [1] * 12)

    def draw() -> stats.Difference:
        first = rng.random(312) < np.where(labels == 0, 0.9, 0.5)
        second = np.where(rng.random(312) < 0.8, first, rng.random(312) < 0.7)
        found = stats.class_mean_difference(*(predictions(labels, np.where(r, labels, 2)) for r in (first, second)))
        assert found is not None
        return found

    draws = [draw() for _ in range(2_000)]
    spread = np.std([each.value for each in draws])
    assert np.sqrt(np.mean([each.error**2 for each in draws])) == pytest.approx(spread, rel=0.08)
    assert stats.class_mean_difference(predictions([0, 1], [0, 1]), predictions([1, 1], [0, 1])) is None
