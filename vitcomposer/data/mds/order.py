"""Decides which sample goes where in an epoch: a pure function of the data set, the epoch and the shape of the run.

A virtual id is ``sample_id + num_samples * copy``, so that one integer carries a sample and its view through
Streaming, which knows only integers.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle

from vitcomposer.data.mds.balance import Balance, balanced_order

PADDING = -1  # Streaming's mark for a place without a sample


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The processes that share an epoch. ``batch_size`` is per rank; ``canonical_nodes`` fixes the global order."""

    nodes: int = 1
    ranks_per_node: int = 1
    workers_per_rank: int = 1
    batch_size: int
    canonical_nodes: int = 1
    initial_nodes: int | None = None  # of a resumed run: the nodes it began with

    def samples_per_rank(self, num_samples: int) -> int:
        """Samples that each rank gets in a whole epoch, those repeated to make the ranks equal included."""
        per_canonical = -(-num_samples // self.canonical_nodes)
        share = max(1, self.nodes // self.canonical_nodes)
        per_canonical = -(-per_canonical // share) * share
        per_node = per_canonical * self.canonical_nodes // self.nodes
        return -(-per_node // self.ranks_per_node)


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """Streaming's py1e: shards in random order, samples of the shards within ``block_size`` mixed.

    With ``balance`` some samples come several times and others not at all, see ``balance``.
    """

    seed: int
    block_size: int = 1 << 18
    balance: Balance | None = None


def arrange(
    shard_sizes: NDArray[np.int64],
    layout: Layout,
    *,
    epoch: int = 0,
    first: int = 0,
    shuffle: Shuffle | None = None,
    repeats: int = 1,
    shared_decodes: bool = False,
) -> NDArray[np.int64]:
    """Virtual ids of an epoch, (nodes, ranks, workers, batches, batch_size), with PADDING where a batch is short.

    Traversed by batch, then worker, node and rank, the order is the same for any number of ranks and workers.

    Without ``shuffle`` (evaluation) each sample appears once with copy 0; where Streaming repeats one to give all
    ranks equal work, the later ones have copy 1. With ``repeats`` (repeated augmentation as in DeiT,
    arXiv:2012.12877, after Hoffer et al., arXiv:1901.09335) an epoch is as long as without, but of about
    ``num_samples / repeats`` samples, each with copies 0 to ``repeats - 1`` in a row: neighbours in a row are on
    different ranks, and in one global batch unless its edge falls between them.

    With ``shared_decodes`` the copies are neighbours in the batch of one rank, so that a worker decodes them at once. A
    step still sees the same number of different samples, over all ranks the very same ones where ``batch_size`` is a
    multiple of ``repeats``; else the edge of a batch cuts some sample's copies, the rest coming first in the rank's
    next batch, which another worker may hold and decodes again. What differs from DeiT's: copies share what a rank
    draws once a batch, such as mixup's lambda of mode batch, and can become each other's partner in mixing.

    Args:
        first: Samples of this epoch that a resumed run has already seen, over all ranks.
    """
    assert shuffle is not None or repeats == 1
    num_samples = int(shard_sizes.sum())
    places = get_partitions(
        "relaxed",
        num_samples,
        layout.canonical_nodes,
        layout.nodes,
        layout.ranks_per_node,
        layout.workers_per_rank,
        layout.batch_size,
        first,
        layout.initial_nodes,
    )
    if shuffle is None:
        return _mark_repeated(places, num_samples)
    nodes, seed, block_size = layout.canonical_nodes, shuffle.seed, shuffle.block_size
    order = get_shuffle("py1e", shard_sizes, nodes, seed, epoch, block_size)
    if shuffle.balance is not None:
        assert repeats == 1
        order = balanced_order(order, shuffle.balance, seed=seed, epoch=epoch, block_size=block_size)
    if repeats > 1 and shared_decodes:
        ids = _repeat_on_rank(order, np.maximum(places, 0), layout, repeats)
        return np.where(places != PADDING, ids, PADDING)
    if repeats > 1:
        order = _repeat(order, layout.canonical_nodes, repeats)
    return np.where(places != PADDING, order[places], PADDING)


def steps_before(epoch: int, first: int, *, samples_per_rank: int, batch_size: int, ranks: int) -> int:
    """Steps that a run which drops short batches has done before sample ``first`` (over all ranks) of an epoch."""
    return epoch * (samples_per_rank // batch_size) + first // (batch_size * ranks)


def _repeat(order: NDArray[np.int64], canonical_nodes: int, repeats: int) -> NDArray[np.int64]:
    """The first share of each canonical node's order, every sample ``repeats`` times with copies counted up.

    Within a canonical node, so that the copies need no shard which another machine holds.
    """
    num_samples = len(order)
    bounds = np.arange(canonical_nodes + 1) * num_samples // canonical_nodes
    begins = np.repeat(bounds[:-1], np.diff(bounds))
    offsets = np.arange(num_samples) - begins
    return order[begins + offsets // repeats] + num_samples * (offsets % repeats)


def _repeat_on_rank(
    order: NDArray[np.int64], places: NDArray[np.int64], layout: Layout, repeats: int
) -> NDArray[np.int64]:
    """Virtual ids of places in the order such that a rank gets the copies of a sample one after the other.

    A function of the place alone, so that a run resumed at any sample, on any number of workers, goes on as it began.
    """
    canonical = layout.canonical_nodes
    nodes = layout.nodes
    if max(nodes, canonical) % min(nodes, canonical):  # then Streaming deals out as to the nodes it began with
        nodes = layout.initial_nodes or nodes
    ranks = nodes * layout.ranks_per_node
    bounds = np.arange(canonical + 1) * len(order) // canonical
    node = np.searchsorted(bounds, places, side="right") - 1
    time = (places - bounds[node]) * canonical + node  # canonical nodes take turns
    turn, rank = np.divmod(time, ranks)  # and so do the ranks
    offset, node = np.divmod(turn // repeats * ranks + rank, canonical)
    # The nodes' shares differ by one sample: at the end of a short one its last sample stands in.
    return order[np.minimum(bounds[node] + offset, bounds[node + 1] - 1)] + len(order) * (turn % repeats)


def _mark_repeated(places: NDArray[np.int64], num_samples: int) -> NDArray[np.int64]:
    in_time = places.transpose(3, 2, 0, 1, 4)
    ids = in_time.flatten()
    later = np.ones(ids.size, bool)
    later[np.unique(ids, return_index=True)[1]] = False
    ids = np.where(later & (ids != PADDING), ids + num_samples, ids)
    return ids.reshape(in_time.shape).transpose(2, 3, 1, 0, 4)
