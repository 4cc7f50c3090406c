"""Balanced epochs: shares of the classes, every image in its turn, the same on any ranks, workers and resumes."""

import numpy as np
import pytest

from tests.data.mds.test_order import in_time
from vitcomposer.data.mds.balance import POWERS, Balance, balanced_order, class_quotas, sample_counts
from vitcomposer.data.mds.order import PADDING, Layout, Shuffle, arrange

SIZES = np.array([100, 120, 80])
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [230, 60, 10]))  # no sample has label 2


def balanced(power: str, seed: int = 1) -> Shuffle:
    return Shuffle(seed=seed, balance=Balance(LABELS, POWERS[power]))


@pytest.mark.parametrize(
    ("counts", "power", "expected"),
    [
        ([200, 10], 1.0, [200, 10]),
        ([200, 10], 0.0, [105, 105]),
        ([400, 100, 0, 25], 0.5, [300, 150, 0, 75]),
        ([5, 3, 2], 0.0, [4, 3, 3]),
        ([1, 1, 1], 0.5, [1, 1, 1]),
    ],
)
def test_shares_follow_the_power_of_the_counts_and_add_up(counts: list[int], power: float, expected: list[int]) -> None:
    assert class_quotas(np.array(counts), power).tolist() == expected


@pytest.mark.parametrize("power", ["sqrt", "full"])
def test_every_image_of_a_class_comes_equally_often_over_the_epochs(power: str) -> None:
    balance = Balance(LABELS, POWERS[power])
    quotas = class_quotas(np.bincount(LABELS), balance.power)
    total = np.zeros(len(LABELS), int)
    for epoch in range(23):
        times = sample_counts(balance, seed=4, epoch=epoch)
        assert np.bincount(LABELS, weights=times, minlength=4).tolist() == quotas.tolist()
        total += times
        for label in (0, 1, 3):
            assert np.ptp(times[label == LABELS]) <= 1 and np.ptp(total[label == LABELS]) <= 1


def test_copies_of_an_image_have_numbers_of_their_own_and_are_mixed_within_blocks() -> None:
    order = np.random.default_rng(1).permutation(len(LABELS))
    balance = Balance(LABELS, 0.0)
    ids = balanced_order(order, balance, seed=0, epoch=3, block_size=60)
    copies, samples = np.divmod(ids, len(LABELS))
    times = sample_counts(balance, seed=0, epoch=3)
    for sample in range(len(LABELS)):
        assert sorted(copies[samples == sample]) == list(range(times[sample]))
    assert len(set(ids)) == len(ids) == len(LABELS)
    place = np.empty(len(order), int)
    place[order] = np.cumsum(times[order])  # where the copies of a sample end, before they are mixed
    moved = np.abs(place[samples] - np.arange(len(ids)))
    assert moved.mean() > 0 and moved.max() < 60 + times.max()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_batches_do_not_depend_on_ranks_or_workers(ranks: int, workers: int) -> None:
    one = in_time(arrange(SIZES, Layout(batch_size=8), epoch=2, shuffle=balanced("full")))
    layout = Layout(ranks_per_node=ranks, workers_per_rank=workers, batch_size=8 // ranks)
    many = in_time(arrange(SIZES, layout, epoch=2, shuffle=balanced("full")))
    for row, expected in enumerate(one[: SIZES.sum() // 8]):
        assert sorted(many[row]) == sorted(expected)
    assert sorted(one[one != PADDING] % len(LABELS)) != list(range(len(LABELS)))


def test_a_resumed_epoch_goes_on_where_it_stopped_and_epochs_and_seeds_differ() -> None:
    layout = Layout(batch_size=10, workers_per_rank=2)
    whole = in_time(arrange(SIZES, layout, epoch=1, shuffle=balanced("sqrt")))
    rest = in_time(arrange(SIZES, layout, epoch=1, first=120, shuffle=balanced("sqrt")))
    assert rest[rest != PADDING].tolist() == whole[12:][whole[12:] != PADDING].tolist()
    others = [arrange(SIZES, layout, epoch=2, shuffle=balanced("sqrt"))]
    others += [arrange(SIZES, layout, epoch=1, shuffle=balanced("sqrt", seed=2))]
    assert all(in_time(other).tolist() != whole.tolist() for other in others)
