"""Draws an epoch in which rare classes come more often than they are there, as a pure function of seed and epoch.

An epoch stays as long as the split has samples. With n_c samples of class c (of N in all), class c gets a share of the
epoch in proportion to n_c ** power: 1 is the data as it is, 0.5 the square root, 0 every class alike. Its samples come
equally often: the ones that come once more than the others go round from epoch to epoch.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitcomposer.data.random import random_key

POWERS = {"sqrt": 0.5, "full": 0.0}
_ROUND, _MIX = 11, 12  # separate streams of draws


@dataclass(frozen=True)
class Balance:
    """Labels of all samples, (N,), and the power of their classes' shares."""

    labels: NDArray[np.int64]
    power: float


def balanced_order(
    order: NDArray[np.int64], balance: Balance, *, seed: int, epoch: int, block_size: int
) -> NDArray[np.int64]:
    """Virtual ids (N,) of an epoch: ``sample_id + N * copy``, copies counted from 0.

    Args:
        order: Sample ids in the order of the epoch as it were without balance, a permutation of N.
        block_size: Samples among which copies are mixed, so that an epoch still goes through the shards in ``order``.
    """
    times = sample_counts(balance, seed=seed, epoch=epoch)[order]  # (N,), of which the sum is N
    starts = np.cumsum(times) - times
    copies = np.arange(len(order)) - np.repeat(starts, times)
    ids = np.repeat(order, times) + len(order) * copies
    # RandomState, because numpy promises its stream for ever.
    rng = np.random.RandomState(random_key(seed, epoch, _MIX) >> 32)
    for begin in range(0, len(ids), block_size):
        rng.shuffle(ids[begin : begin + block_size])
    return ids


def sample_counts(balance: Balance, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """How often each sample comes in an epoch, (N,)."""
    labels = balance.labels
    counts = np.bincount(labels)
    classes = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])  # samples of each class
    times = np.empty(len(labels), np.int64)
    for label, (members, quota) in enumerate(zip(classes, class_quotas(counts, balance.power), strict=True)):
        if not len(members):
            continue
        whole, rest = divmod(int(quota), len(members))
        turn = np.random.RandomState(random_key(seed, label, _ROUND) >> 32).permutation(len(members))
        once_more = turn[(epoch * rest + np.arange(rest)) % len(members)]
        times[members] = whole
        times[members[once_more]] += 1
    return times


def class_quotas(counts: NDArray[np.int64], power: float) -> NDArray[np.int64]:
    """Samples of each class in an epoch, (K,): whole numbers in proportion to counts ** power, with their sum."""
    weights = np.where(counts > 0, np.maximum(counts, 1) ** power, 0.0)
    exact = counts.sum() * weights / weights.sum()
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(quotas - exact, kind="stable")[: counts.sum() - quotas.sum()]
    quotas[largest] += 1
    return quotas
