"""Weighted k-NN: against a loop written from the equations, in blocks, and over ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gloo_ranks import on_ranks
from vitcomposer.evaluation import knn as knn_module
from vitcomposer.evaluation.knn import knn_accuracy, nearest

KS = (1, 5, 20)


def made(seed: int, count: int, *, classes: int = 8, width: int = 16, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Features around a centre of each class, of any length."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    features = centres[labels] + spread * torch.randn(count, width, generator=generator)
    return features * (1 + torch.rand(count, 1, generator=generator)), labels


def by_hand(
    bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], k: int, temperature: float
) -> dict[str, float]:
    """Section 3.4 of arXiv:1805.01978 in float64, one query at a time."""
    features, labels = bank[0].double().numpy(), bank[1].tolist()
    top1 = top5 = 0
    for query, label in zip(queries[0].double().numpy(), queries[1].tolist(), strict=True):
        cosines = [float(f @ query / np.linalg.norm(f) / np.linalg.norm(query)) for f in features]
        votes: dict[int, float] = {}
        for index in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[labels[index]] = votes.get(labels[index], 0.0) + math.exp(cosines[index] / temperature)
        guesses = sorted(votes, key=lambda c: -votes[c])
        top1 += guesses[0] == label
        top5 += label in guesses[:5]
    return {f"top1_k{k}": top1 / len(queries[1]), f"top5_k{k}": top5 / len(queries[1])}


@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.005])
def test_equals_a_loop_in_float64(temperature: float) -> None:
    bank, queries = made(1, 300), made(2, 150)
    expected: dict[str, float] = {}
    for k in KS:
        expected |= by_hand(bank, queries, k, temperature)
    found = knn_accuracy(bank, queries, k=KS, temperature=temperature)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.2 < found["top1_k20"] < 0.95 and found["top5_k20"] > found["top1_k20"], "the case must not be trivial"


@pytest.mark.parametrize("rows", [1, 7, 64, 299, 300, 1000])
def test_blocks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = made(1, 300), made(2, 150)
    whole = knn_accuracy(bank, queries, k=KS, temperature=0.07)
    monkeypatch.setattr(knn_module, "QUERY_ROWS", 13)
    assert knn_accuracy(bank, queries, k=KS, temperature=0.07, bank_rows=rows) == whole


def test_nearest_are_sorted_with_their_labels() -> None:
    features, labels = made(1, 50)
    blocks = zip(features.split(8), torch.arange(50).split(8), strict=True)
    cosines, places = nearest(features[:3], iter(blocks), 50)
    assert torch.equal(cosines, cosines.sort(descending=True).values)
    for query in range(3):
        assert sorted(places[query].tolist()) == list(range(50))
        torch.testing.assert_close(cosines[query], features[places[query]] @ features[query])


def test_a_class_without_votes_is_no_guess() -> None:
    bank = torch.eye(6), torch.arange(6)
    queries = torch.eye(6)[:1], torch.tensor([3])
    assert knn_accuracy(bank, queries, k=[1], temperature=0.07) == {"top1_k1": 0.0, "top5_k1": 0.0}


def test_more_neighbours_than_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"knn\.k must be at most 30, .* got 31"):
        knn_accuracy(made(1, 30), made(2, 5), k=[10, 31], temperature=0.07)


def accuracy_of_shares() -> list[dict[str, float]]:
    """Where the first rank has a hundred of each, and where it has all: no image of the other's can be read."""
    rank, found = torch.distributed.get_rank(), []
    for first in (100, 301):
        bank, queries = ([part.tensor_split([first])[rank] for part in made(*of)] for of in ((1, 301), (2, 151)))
        shares = (bank[0], bank[1]), (queries[0], queries[1])
        found.append(knn_accuracy(*shares, k=KS, temperature=0.07, bank_rows=64))
    return found


def test_two_ranks_with_shares_of_different_length_equal_one(tmp_path: Path) -> None:
    whole = knn_accuracy(made(1, 301), made(2, 151), k=KS, temperature=0.07)
    assert on_ranks(accuracy_of_shares, 2, tmp_path) == [[whole, whole], [whole, whole]]
