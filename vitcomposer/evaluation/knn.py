"""Classifies by weighted nearest neighbours among the features of all ranks (arXiv:1805.01978, section 3.4)."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from vitcomposer.collectives import all_reduce, gather, rank_and_world_size

BANK_ROWS = 16_384  # of the bank that one step compares, and that travel between ranks at once
QUERY_ROWS = 1_024  # of the queries that one step compares


def knn_accuracy(
    bank: tuple[Tensor, Tensor],
    queries: tuple[Tensor, Tensor],
    *,
    k: Sequence[int],
    temperature: float,
    bank_rows: int = BANK_ROWS,
) -> dict[str, float]:
    """``top1_k<k>`` and, above five classes, ``top5_k<k>`` in [0, 1], the same on every rank.

    Every of the ``k`` nearest neighbours by cosine votes for its class with exp(cosine / temperature), DINO's protocol
    (arXiv:2104.14294, appendix A). A class without a vote is no prediction, also where fewer than five have one. Each
    rank gives its share of both sets and looks up its own queries. The bank passes by in blocks: with ImageNet's
    1.28 million features of 384 float32 a rank holds its share (2 GB on one rank) and a block.

    Args:
        bank: This rank's share of the training features (n, D) and labels (n,).
        queries: The same of the features to classify, (m, D) and (m,). All shares may differ in length.

    Raises:
        ValueError: A ``k`` above the number of features in the bank.
    """
    size = int(all_reduce(bank[1].new_tensor(len(bank[1]))))
    if max(k) > size:
        raise ValueError(f"knn.k must be at most {size}, the number of training features, got {max(k)}. Lower it.")
    # A rank may have none, where its images cannot be read.
    last = bank[1].max() if len(bank[1]) else bank[1].new_tensor(-1)
    num_classes = 1 + int(all_reduce(last, dist.ReduceOp.MAX))
    features, labels = F.normalize(queries[0].float(), dim=1), queries[1]
    blocks = _blocks_of_all_ranks(F.normalize(bank[0].float(), dim=1), bank[1], bank_rows)
    cosines, neighbours = nearest(features, blocks, max(k))
    found = {}
    for count in k:
        counts = _count_correct(cosines[:, :count], neighbours[:, :count], labels, num_classes, temperature)
        top1, top5, total = all_reduce(counts).tolist()
        found[f"top1_k{count}"] = top1 / total
        if num_classes > 5:
            found[f"top5_k{count}"] = top5 / total
    return found


def nearest(queries: Tensor, blocks: Iterator[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` highest products (m, k), sorted, of each query with the rows of all blocks, and the labels of these."""
    best = queries.new_full((len(queries), k), -torch.inf)
    labels = torch.zeros(len(queries), k, dtype=torch.long, device=queries.device)
    for rows, row_labels in blocks:
        for begin in range(0, len(queries), QUERY_ROWS):
            part = slice(begin, begin + QUERY_ROWS)
            products, index = (queries[part] @ rows.T).topk(min(k, len(rows)), dim=1)
            merged = torch.cat((best[part], products), dim=1)
            best[part], chosen = merged.topk(k, dim=1)
            labels[part] = torch.cat((labels[part], row_labels[index]), dim=1).gather(1, chosen)
    return best, labels


def _count_correct(cosines: Tensor, neighbours: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """How many queries are right at the first guess and among the first five, and how many there are: int64 (3,)."""
    counts = torch.zeros(3, dtype=torch.long, device=labels.device)
    for begin in range(0, len(labels), QUERY_ROWS):
        part = slice(begin, begin + QUERY_ROWS)
        near = cosines[part]
        # Divided by the nearest one's weight: the order stays, and no exponential overflows.
        weights = ((near - near[:, :1]) / temperature).exp()
        votes = near.new_zeros(len(near), num_classes).scatter_add_(1, neighbours[part], weights)
        most, guesses = votes.topk(min(5, num_classes), dim=1)
        right = (guesses == labels[part, None]) & (most > 0)
        counts += torch.stack((right[:, 0].sum(), right.sum(), right.new_tensor(len(right), dtype=torch.long)))
    return counts


def _blocks_of_all_ranks(features: Tensor, labels: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of every rank, ``rows`` at a time; all ranks see the same blocks in the same order."""
    own, ranks = rank_and_world_size()
    sizes = gather(labels.new_tensor(len(labels))).tolist()
    for rank in range(ranks):
        for begin in range(0, sizes[rank], rows):
            count = min(rows, sizes[rank] - begin)
            if rank == own:
                block = features[begin : begin + count].contiguous(), labels[begin : begin + count].contiguous()
            else:
                block = features.new_empty(count, features.shape[1]), labels.new_empty(count)
            if ranks > 1:
                for tensor in block:
                    dist.broadcast(tensor, src=rank)
            yield block
