"""What an order of samples costs: bytes that nodes download, the wait for the first batch, and how well it mixes.

Computed for benchmarks.scale from what ``vitcomposer.data.mds.order`` really deals out.
"""

import math
import statistics
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMAGES, IMAGE_BYTES, SHARD_BYTES = (
    1_281_167,
    110_000,
    64 << 20,
)  # ImageNet-1k; the mean file, see benchmarks/input/photos.py
SHARD_IMAGES = SHARD_BYTES // IMAGE_BYTES
RANKS_PER_NODE, WORKERS = 8, 8
BANDWIDTH = 1.25e9  # bytes per second from the store to a node: 10 Gbit/s, all of it
LAYOUTS = {8: 128, 64: 64}  # ranks: images of a rank in a step
BLOCKS = (1 << 13, 1 << 15, 1 << 17, 1 << 18, 1 << 20)
CANONICAL = (1, 8, 64)
EPOCHS = 2
CACHE_SHARE = 0.25  # of what a node reads in an epoch
NEAR = 0.01  # of an epoch
LEAST_MIXED = 0.95  # of the shards in a batch that a uniformly random order has, for what is recommended
MOST_TRAFFIC = 1.05  # times the least that the nodes together can download


@dataclass(frozen=True)
class Order:
    """Which shard each sample of an epoch comes from, by node and step: (nodes, steps, images of a node in a step)."""

    shards: NDArray[np.int64]
    ids: NDArray[np.int64]


def order_of(ranks: int, canonical: int, block: int, epoch: int) -> Order:
    """As ``ImageStream`` deals it out; the steps of a rank are made by its workers in turn."""
    from vitcomposer.data.mds.order import Layout, Shuffle, arrange

    nodes = ranks // RANKS_PER_NODE
    layout = Layout(
        nodes=nodes,
        ranks_per_node=RANKS_PER_NODE,
        workers_per_rank=WORKERS,
        batch_size=LAYOUTS[ranks],
        canonical_nodes=canonical,
    )
    plan = arrange(shard_sizes(), layout, epoch=epoch, shuffle=Shuffle(seed=0, block_size=block))
    steps = plan.transpose(0, 3, 2, 1, 4).reshape(nodes, -1, RANKS_PER_NODE * LAYOUTS[ranks])
    full = (steps >= 0).all(axis=(0, 2))  # the last, short batch is dropped
    ids = steps[:, full]
    return Order(shards=ids // SHARD_IMAGES, ids=ids)


def shard_sizes() -> NDArray[np.int64]:
    sizes = np.full(math.ceil(IMAGES / SHARD_IMAGES), SHARD_IMAGES, dtype=np.int64)
    sizes[-1] = IMAGES - SHARD_IMAGES * (len(sizes) - 1)
    return sizes


def downloads(epochs: list[NDArray[np.int64]], limit: int) -> list[int]:
    """Shards that a node downloads in each epoch when it keeps the ``limit`` that were used last.

    Args:
        epochs: The shards (steps, images) of the node in each of them.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    counts = []
    for steps in epochs:
        count = 0
        for step in steps:
            for shard in np.unique(step).tolist():
                if shard in cache:
                    cache.move_to_end(shard)
                    continue
                count += 1
                cache[shard] = None
                if len(cache) > limit:
                    cache.popitem(last=False)
        counts.append(count)
    return counts


def in_use(steps: NDArray[np.int64]) -> int:
    """The most shards of a node that are between their first and their last use at one time."""
    begins, ends = np.full(len(shard_sizes()), len(steps)), np.full(len(shard_sizes()), -1)
    for number, step in enumerate(steps):
        ends[step] = number
    for number, step in reversed(list(enumerate(steps))):
        begins[step] = number
    used = ends >= 0
    changes = np.bincount(begins[used], minlength=len(steps) + 1)
    changes[1:] -= np.bincount(ends[used], minlength=len(steps))
    return int(np.cumsum(changes).max())


def random_shards(images: int) -> float:
    """Different shards among so many images drawn at random."""
    share = shard_sizes() / IMAGES
    return float((1 - (1 - share) ** images).sum())


def neighbours_near(ids: NDArray[np.int64]) -> float:
    """Share of the images whose neighbour in the shard is trained on within ``NEAR`` of an epoch of them."""
    step_of = np.full(IMAGES, -1, dtype=np.int64)
    for node in ids:
        step_of[node] = np.arange(len(node))[:, None]
    both = (step_of[:-1] >= 0) & (step_of[1:] >= 0)
    distance = np.abs(step_of[1:] - step_of[:-1])[both]
    return float((distance <= NEAR * ids.shape[1]).mean())


def compute_row(ranks: int, canonical: int, block: int) -> dict[str, Any]:
    nodes, batch = ranks // RANKS_PER_NODE, ranks * LAYOUTS[ranks]
    orders = [order_of(ranks, canonical, block, epoch) for epoch in range(EPOCHS)]
    first = orders[0]
    distinct = [[len(np.unique(order.shards[node])) for order in orders] for node in range(nodes)]
    seen = [len(np.unique(np.concatenate([order.shards[node].ravel() for order in orders]))) for node in range(nodes)]
    # Node 0 stands for all where the cache is limited.
    limit = max(1, round(CACHE_SHARE * distinct[0][0]))
    short = downloads([order.shards[0] for order in orders], limit)
    batches = first.shards.transpose(1, 0, 2).reshape(first.shards.shape[1], -1)
    sample = batches[:: max(1, len(batches) // 100)]
    first_batch = max(len(np.unique(first.shards[node, 0])) for node in range(nodes))
    all_workers = max(len(np.unique(first.shards[node, :WORKERS])) for node in range(nodes))
    return {
        "ranks": ranks,
        "num_canonical_nodes": canonical,
        "shuffle_block_size": block,
        "bytes_first_epoch": statistics.mean(each[0] for each in distinct) * SHARD_BYTES,
        "bytes_second_epoch": statistics.mean(s - each[0] for s, each in zip(seen, distinct, strict=True))
        * SHARD_BYTES,
        "traffic": sum(each[0] for each in distinct) / len(shard_sizes()),
        "cache_bytes": in_use(first.shards[0]) * SHARD_BYTES,
        "short_cache_downloads": [count / distinct[0][0] for count in short],
        "bytes_first_batch": first_batch * SHARD_BYTES,
        "bytes_all_workers": all_workers * SHARD_BYTES,
        "seconds_first_batch": first_batch * SHARD_BYTES / BANDWIDTH,
        "seconds_all_workers": all_workers * SHARD_BYTES / BANDWIDTH,
        "shards_in_batch": float(np.mean([len(np.unique(row)) for row in sample])),
        "shards_in_random_batch": random_shards(batch),
        "neighbours_near": neighbours_near(first.ids),
    }


def recommended(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For a cache that holds all that a node reads the quickest start that mixes as well as at random; for one that
    holds ``CACHE_SHARE`` of it the best mix that downloads nothing twice in an epoch."""
    thrifty = [row for row in rows if row["traffic"] <= MOST_TRAFFIC]
    mixed = [row for row in thrifty if row["shards_in_batch"] >= LEAST_MIXED * row["shards_in_random_batch"]]
    small = [row for row in thrifty if row["short_cache_downloads"][0] <= MOST_TRAFFIC]
    return {
        "large": min(mixed, key=lambda row: row["bytes_all_workers"]),
        "small": max(small, key=lambda row: row["shards_in_batch"]),
    }


def compute() -> dict[str, Any]:
    rows, begin = [], time.process_time()
    for ranks in LAYOUTS:
        nodes = ranks // RANKS_PER_NODE
        for canonical in CANONICAL:
            if canonical % nodes and nodes % canonical:
                continue
            for block in BLOCKS:
                rows.append(compute_row(ranks, canonical, block))
                print(f"{ranks} ranks, {canonical} canonical nodes, blocks of {block}", file=sys.stderr, flush=True)
    chosen = {ranks: recommended([row for row in rows if row["ranks"] == ranks]) for ranks in LAYOUTS}
    return {
        "shards": len(shard_sizes()),
        "images_in_shard": SHARD_IMAGES,
        "neighbours_near_at_random": 1 - (1 - NEAR) ** 2,
        "rows": rows,
        "recommended": {str(ranks): row for ranks, row in chosen.items()},
        "cpu_seconds": time.process_time() - begin,
    }


def computed_page(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Computed: ImageNet over 8 and 64 ranks",
        "",
        f"From the order that `vitcomposer.data.mds.order.arrange` deals out, seed 0: {IMAGES:,} images of "
        f"{IMAGE_BYTES // 1000} KB in {found['shards']:,} shards of 64 MiB ({found['images_in_shard']} images), "
        f"{RANKS_PER_NODE} ranks a node, {WORKERS} workers a rank, "
        + " and ".join(f"{batch} images a step on each of {ranks} ranks" for ranks, batch in LAYOUTS.items())
        + f". Bandwidth: {BANDWIDTH / 1e9:g} GB/s from the store to each node, all of it used.",
        "",
        "- GB a node: downloaded in the first epoch into a cache that holds everything, mean of the nodes, and what "
        "the second epoch adds. In brackets: of all nodes together, times the data set.",
        "- cache: GB of the shards of a node that are between their first and last use at one time: the smallest "
        "`data.cache_limit` under which an epoch downloads nothing twice. In brackets: downloads of a shard in the "
        f"first and the second epoch with a limit of {CACHE_SHARE:g} of what the node reads; the one used longest ago "
        "goes first, and nothing is fetched ahead.",
        "- first batch: seconds until the shards of the first batch are on the node, if nothing else is fetched; then "
        "until those of the first batch of every worker are, which all begin at once and share the bandwidth.",
        "- shards in a batch: different ones in a global batch, of those a uniformly random order has.",
        f"- neighbours: share of the images whose neighbour in the shard comes within {NEAR:.0%} of an epoch; "
        f"{found['neighbours_near_at_random']:.1%} at random.",
        "",
        "| ranks | num_canonical_nodes | shuffle_block_size | GB a node | cache | first batch, s | "
        "shards in a batch | neighbours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        bold = "**" if row in found["recommended"][str(row["ranks"])].values() else ""
        share = row["shards_in_batch"] / row["shards_in_random_batch"]
        cells = [
            f"{bold}{row['ranks']}{bold}",
            f"{bold}{row['num_canonical_nodes']}{bold}",
            f"{bold}{row['shuffle_block_size']:,}{bold}",
            f"{row['bytes_first_epoch'] / 1e9:.0f} + {row['bytes_second_epoch'] / 1e9:.0f} ({row['traffic']:.2f})",
            f"{row['cache_bytes'] / 1e9:.0f} ({', '.join(f'{n:.1f}' for n in row['short_cache_downloads'])})",
            f"{row['seconds_first_batch']:.1f}, {row['seconds_all_workers']:.1f}",
            f"{row['shards_in_batch']:.0f} ({share:.2f})",
            f"{row['neighbours_near']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", advice(found["recommended"])]
    return lines


def advice(chosen: dict[str, dict[str, dict[str, Any]]]) -> str:
    def settings(size: str) -> str:
        return "; ".join(
            f"{ranks} ranks `data.num_canonical_nodes={rows[size]['num_canonical_nodes']} "
            f"data.shuffle_block_size={rows[size]['shuffle_block_size']}`"
            for ranks, rows in chosen.items()
        )

    return (
        f"Bold, where a cache holds all that a node reads: the quickest start whose batches have at least "
        f"{LEAST_MIXED:.0%} of the shards of a random order and whose nodes together download at most {MOST_TRAFFIC:g} "
        f"times the data set: {settings('large')}. Where it holds {CACHE_SHARE:g} of that: the best mixed one that "
        f"downloads nothing twice in an epoch: {settings('small')}. A cache smaller than the shards in use at one time "
        "downloads every shard hundreds of times: lower `data.shuffle_block_size` then. `vitcomposer convert` shuffles "
        "the images before it writes them, so that a shard holds images of all classes already: a smaller block costs "
        "variety between batches, not balance of classes. `num_canonical_nodes` fixes the global order: a run may go "
        "on with any number of nodes that divides it."
    )
