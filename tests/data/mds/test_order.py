"""The order of samples: the same for any number of ranks and workers, whole in evaluation, repeated on request."""

import time
from collections import Counter

import numpy as np
import pytest

from vitcomposer.data.mds.order import PADDING, Layout, Shuffle, arrange

# Streaming warns of data sets smaller than the number of ranks, which are tried here.
pytestmark = pytest.mark.filterwarnings("ignore:.*to partition")


def in_time(plan: np.ndarray) -> np.ndarray:
    """Virtual ids of one row per global batch of a plan (nodes, ranks, workers, batches, batch_size)."""
    nodes, ranks, workers, per_worker, size = plan.shape
    return plan.transpose(3, 2, 0, 1, 4).reshape(per_worker * workers, nodes * ranks * size)


SIZES = np.array([10, 13, 7, 20, 9])


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_batches_do_not_depend_on_ranks_or_workers(ranks, workers):
    shuffle = Shuffle(seed=1)
    one = arrange(SIZES, Layout(batch_size=8), epoch=2, shuffle=shuffle)
    layout = Layout(ranks_per_node=ranks, workers_per_rank=workers, batch_size=8 // ranks)
    many = in_time(arrange(SIZES, layout, epoch=2, shuffle=shuffle))
    for row, expected in enumerate(in_time(one)[: SIZES.sum() // 8]):
        assert sorted(many[row]) == sorted(expected)


@pytest.mark.parametrize("num_samples", [1, 5, 59, 60, 61])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("nodes, ranks", [(1, 1), (1, 2), (1, 3), (2, 3)])
def test_evaluation_counts_every_sample_once_over_all_ranks(num_samples, workers, nodes, ranks):
    layout = Layout(nodes=nodes, ranks_per_node=ranks, workers_per_rank=workers, batch_size=4)
    plan = arrange(np.array([num_samples]), layout)
    ids = plan[plan != PADDING]
    assert sorted(ids[ids < num_samples]) == list(range(num_samples))
    assert (ids < 2 * num_samples).all()
    per_rank = (plan != PADDING).sum((2, 3, 4))
    assert (per_rank == layout.samples_per_rank(num_samples)).all()


@pytest.mark.parametrize("canonical, nodes", [(1, 1), (2, 1), (4, 2), (1, 2), (3, 3), (6, 2)])
@pytest.mark.parametrize("num_samples", [60, 61, 67])
def test_samples_per_rank_is_what_the_plan_holds(canonical, nodes, num_samples):
    layout = Layout(nodes=nodes, ranks_per_node=2, workers_per_rank=2, batch_size=4, canonical_nodes=canonical)
    plan = arrange(np.array([num_samples]), layout, shuffle=Shuffle(seed=0))
    assert ((plan != PADDING).sum((2, 3, 4)) == layout.samples_per_rank(num_samples)).all()


@pytest.mark.parametrize("canonical", [1, 2])
def test_repeated_augmentation_puts_the_copies_on_different_ranks_of_one_batch(canonical):
    nodes, ranks, repeats, num_samples = canonical, 4, 3, 480
    layout = Layout(nodes=nodes, ranks_per_node=ranks, batch_size=6, canonical_nodes=canonical)
    plan = arrange(np.full(24, 20), layout, epoch=1, shuffle=Shuffle(seed=5), repeats=repeats)
    copies, ids = np.divmod(plan[plan != PADDING], num_samples)
    counts = Counter(ids.tolist())
    assert len(ids) == num_samples
    assert len(counts) == pytest.approx(num_samples / repeats, abs=canonical)
    assert set(counts.values()) == {repeats}
    assert Counter(copies.tolist()) == {0: 160, 1: 160, 2: 160}
    places = {}
    for node, rank, _, batch, slot in np.ndindex(plan.shape):
        places.setdefault(plan[node, rank, 0, batch, slot] % num_samples, []).append((batch, node, rank))
    for place in places.values():
        assert len({batch for batch, _, _ in place}) == 1
        assert len({node for _, node, _ in place}) == 1
        assert len({rank for _, _, rank in place}) == repeats


def test_repeated_augmentation_uses_every_sample_over_epochs():
    seen = set()
    for epoch in range(20):
        plan = arrange(SIZES, Layout(batch_size=4), epoch=epoch, shuffle=Shuffle(seed=0), repeats=3)
        seen |= set((plan[plan != PADDING] % SIZES.sum()).tolist())
    assert seen == set(range(SIZES.sum()))


def by_rank(plan: np.ndarray) -> np.ndarray:
    """Virtual ids of each rank in the order it trains on them, (ranks, samples), without padding."""
    nodes, ranks, workers, per_worker, size = plan.shape
    rows = plan.transpose(0, 1, 3, 2, 4).reshape(nodes * ranks, per_worker * workers * size)
    return np.stack([row[row != PADDING] for row in rows])


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("canonical, nodes", [(1, 1), (2, 2), (4, 2), (2, 1), (1, 2)])
def test_shared_decodes_put_the_copies_next_to_each_other_on_one_rank(canonical, nodes, workers):
    repeats, num_samples = 3, 480
    layout = Layout(nodes=nodes, ranks_per_node=2, workers_per_rank=workers, batch_size=6, canonical_nodes=canonical)
    plan = arrange(np.full(24, 20), layout, epoch=1, shuffle=Shuffle(seed=5), repeats=repeats, shared_decodes=True)
    copies, ids = np.divmod(by_rank(plan), num_samples)
    assert ids.size == num_samples
    assert (copies == np.arange(ids.shape[1]) % repeats).all()
    groups = ids[:, : ids.shape[1] // repeats * repeats].reshape(-1, repeats)
    assert (groups == groups[:, :1]).all()
    assert len(np.unique(groups[:, 0])) == len(groups)
    assert len(groups) == num_samples // repeats


@pytest.mark.parametrize("repeats, batch_size", [(3, 6), (3, 8), (2, 5), (4, 2), (3, 1)])
def test_shared_decodes_need_no_more_decodes_than_the_edges_of_batches_cut(repeats, batch_size):
    """A batch of b consecutive places of groups of r touches at most ceil((b - 1) / r) + 1 groups."""
    layout = Layout(ranks_per_node=2, workers_per_rank=2, batch_size=batch_size)
    plan = arrange(np.array([240]), layout, shuffle=Shuffle(seed=0), repeats=repeats, shared_decodes=True)
    copies, ids = np.divmod(plan[plan != PADDING], 240)
    assert Counter(copies.tolist()) == {copy: 240 // repeats for copy in range(repeats)}
    assert set(Counter(ids.tolist()).values()) == {repeats}
    most = -(-(batch_size - 1) // repeats) + 1
    for batch in plan.reshape(-1, batch_size):
        assert len(set((batch[batch != PADDING] % 240).tolist())) <= (
            batch_size // repeats if batch_size % repeats == 0 else most
        )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("nodes, ranks", [(1, 2), (1, 4), (2, 1)])
def test_shared_decodes_give_every_step_the_same_samples_on_any_number_of_ranks(nodes, ranks, workers):
    shuffle, repeats = Shuffle(seed=1), 3
    shape = {"epoch": 2, "shuffle": shuffle, "repeats": repeats, "shared_decodes": True}
    one = in_time(arrange(SIZES, Layout(batch_size=12, canonical_nodes=nodes), **shape))
    layout = Layout(
        nodes=nodes,
        ranks_per_node=ranks,
        workers_per_rank=workers,
        batch_size=12 // (nodes * ranks),
        canonical_nodes=nodes,
    )
    many = in_time(arrange(SIZES, layout, **shape))
    for row, expected in enumerate(one[: SIZES.sum() // 12]):
        assert sorted(many[row]) == sorted(expected)


@pytest.mark.parametrize(
    "canonical, nodes, initial, batch_size",
    [(1, 1, None, 6), (1, 1, None, 8), (2, 2, None, 8), (4, 2, None, 6), (3, 2, 3, 6)],
)
def test_shared_decodes_resumed_go_on_as_they_began(canonical, nodes, initial, batch_size):
    shape = {"epoch": 3, "shuffle": Shuffle(seed=2), "repeats": 3, "shared_decodes": True}
    began = initial or nodes
    run = {"ranks_per_node": 2, "canonical_nodes": canonical}
    before = Layout(nodes=began, workers_per_rank=2, batch_size=batch_size * nodes // began, **run)
    after = Layout(nodes=nodes, workers_per_rank=3, batch_size=batch_size, initial_nodes=initial, **run)
    whole = in_time(arrange(np.full(9, 32), before, **shape))
    for seen in (1, 4):
        rest = in_time(arrange(np.full(9, 32), after, first=seen * whole.shape[1], **shape))
        for row, expected in enumerate(whole[seen : 288 // whole.shape[1]]):
            assert sorted(rest[row]) == sorted(expected)


def test_shared_decodes_change_with_seed_and_epoch_only():
    def ids(**changed):
        shape = {"epoch": 1, "shuffle": Shuffle(seed=1), "repeats": 3, "shared_decodes": True, **changed}
        return arrange(SIZES, Layout(batch_size=4), **shape)

    assert np.array_equal(ids(), ids())
    assert not np.array_equal(ids(), ids(epoch=2))
    assert not np.array_equal(ids(), ids(shuffle=Shuffle(seed=2)))


@pytest.mark.parametrize("shared_decodes", [False, True])
def test_arranging_imagenet_takes_under_a_second(shared_decodes):
    num_samples = 1_281_167
    sizes = np.full(2000, num_samples // 2000)
    sizes[: num_samples % 2000] += 1
    layout = Layout(ranks_per_node=8, workers_per_rank=8, batch_size=128)
    begin = time.process_time()
    shuffle = Shuffle(seed=0, block_size=1 << 22)
    arrange(sizes, layout, epoch=1, shuffle=shuffle, repeats=3, shared_decodes=shared_decodes)
    assert time.process_time() - begin < 1
