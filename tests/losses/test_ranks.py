"""Losses on two ranks equal those of one rank with the joint batch, and so do gradients after DDP's averaging."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.gloo_ranks import on_ranks
from vitcomposer.losses import DINOLoss, SwAVLoss, info_nce, moco_contrastive, sinkhorn

RANKS, BATCH, WIDTH, PROTOTYPES, CROPS, STEPS = 2, 3, 5, 6, 4, 5
Result = dict[str, Any]


def several_ranks() -> bool:
    """Not whether there is a group: Composer leaves one of a single rank in the process of the tests."""
    return dist.is_initialized() and dist.get_world_size() > 1


def values(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def share(tensor: Tensor, crops: int = 1) -> Tensor:
    """This rank's images of a crop-major tensor of the global batch."""
    if not several_ranks():
        return tensor
    by_crop = tensor.view(crops, RANKS, BATCH, tensor.shape[1])
    return by_crop[:, dist.get_rank()].flatten(0, 1)


def with_gradient(loss_of: Callable[[Tensor], Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over ranks of the loss and of its gradient by a shared parameter, as DDP makes it."""
    weight = weight.clone().requires_grad_()
    loss = loss_of(weight)
    loss.backward()
    assert weight.grad is not None
    mean, gradient = loss.detach().clone(), weight.grad
    if several_ranks():
        for tensor in (mean, gradient):
            dist.all_reduce(tensor)
            tensor /= RANKS
    return mean, gradient


def sinkhorn_results() -> Result:
    scores = values(RANKS * BATCH, PROTOTYPES, 0).tanh()
    sent, real = [], dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return real(tensor, *arguments, **options)

    dist.all_reduce = counted
    codes = sinkhorn(share(scores), epsilon=0.05, iterations=3)
    dist.all_reduce = real
    # Rank 0 has four samples and rank 1 two.
    first = slice(None) if not several_ranks() else (slice(0, 4), slice(4, 6))[dist.get_rank()]
    uneven = sinkhorn(scores[first].float(), epsilon=0.03, iterations=3)
    return {"codes": codes, "uneven": uneven, "sent": torch.tensor(sent)}


def swav_results() -> Result:
    torch.manual_seed(0)
    loss = SwAVLoss(
        num_crops=CROPS, temperature=0.1, epsilon=0.05, iterations=3, queue_length=15, embedding_dim=WIDTH
    ).double()
    prototypes = torch.nn.functional.normalize(values(PROTOTYPES, WIDTH, 99), dim=1)
    losses, gradients = [], []
    for step in range(STEPS):
        features = share(values(CROPS * RANKS * BATCH, WIDTH, step), CROPS)

        def loss_of(weight: Tensor, features: Tensor = features, step: int = step) -> Tensor:
            embeddings = torch.nn.functional.normalize(features @ weight, dim=1)
            return loss([embeddings @ prototypes.T], embeddings, [prototypes], use_queue=step >= 3)

        mean, gradient = with_gradient(loss_of, torch.eye(WIDTH, dtype=torch.float64))
        losses.append(mean)
        gradients.append(gradient)
    return {"losses": torch.stack(losses), "gradients": torch.stack(gradients), "queue": loss.queue}


def contrastive_results() -> Result:
    first, second, third = (share(values(RANKS * BATCH, WIDTH, seed)) for seed in range(3))
    weight = values(WIDTH, WIDTH, 7)
    return {
        "info_nce": with_gradient(lambda w: info_nce(first @ w, (second @ w).tanh(), temperature=0.2), weight),
        "three_views": with_gradient(lambda w: info_nce(first @ w, second, third @ w, temperature=0.2), weight),
        "moco": with_gradient(lambda w: moco_contrastive(first @ w, second, temperature=0.2), weight),
    }


def dino_results() -> Result:
    loss = DINOLoss(WIDTH, student_temperature=0.1, center_momentum=0.9).double()
    student = share(values(CROPS * RANKS * BATCH, WIDTH, 0), CROPS)
    teacher = share(values(2 * RANKS * BATCH, WIDTH, 1), 2)
    weight = torch.eye(WIDTH, dtype=torch.float64)
    steps = [with_gradient(lambda w: loss(student @ w, teacher, 0.04), weight) for _ in range(3)]
    return {"steps": steps, "center": loss.center}


def all_results() -> Result:
    return {
        "sinkhorn": sinkhorn_results(),
        "swav": swav_results(),
        "contrastive": contrastive_results(),
        "dino": dino_results(),
    }


@pytest.fixture(scope="module")
def one() -> Result:
    return all_results()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return on_ranks(all_results, RANKS, folder)


def test_two_ranks_give_the_codes_of_one(one: Result, two: list[Result]) -> None:
    codes = torch.cat([rank["sinkhorn"]["codes"] for rank in two])
    torch.testing.assert_close(codes, one["sinkhorn"]["codes"])
    assert not torch.allclose(codes, torch.cat([codes[:BATCH], codes[:BATCH]])), "the ranks have different samples"


def test_ranks_with_unequal_numbers_of_samples_give_the_codes_of_one(one: Result, two: list[Result]) -> None:
    assert [len(rank["sinkhorn"]["uneven"]) for rank in two] == [4, 2]
    torch.testing.assert_close(torch.cat([r["sinkhorn"]["uneven"] for r in two]), one["sinkhorn"]["uneven"])


def test_sinkhorn_sends_one_vector_of_prototypes_and_one_per_iteration(one: Result, two: list[Result]) -> None:
    assert one["sinkhorn"]["sent"].tolist() == []
    assert all(rank["sinkhorn"]["sent"].tolist() == [PROTOTYPES] * (1 + 3) for rank in two)


def test_two_ranks_give_the_swav_losses_of_one_with_a_queue(one: Result, two: list[Result]) -> None:
    for rank in two:
        torch.testing.assert_close(rank["swav"]["losses"], one["swav"]["losses"])
        torch.testing.assert_close(rank["swav"]["gradients"], one["swav"]["gradients"])


def test_every_rank_has_the_queue_of_one(one: Result, two: list[Result]) -> None:
    assert torch.equal(two[0]["swav"]["queue"], two[1]["swav"]["queue"])
    torch.testing.assert_close(two[0]["swav"]["queue"], one["swav"]["queue"])


@pytest.mark.parametrize("loss", ["info_nce", "three_views", "moco"])
def test_two_ranks_give_the_contrastive_loss_and_gradient_of_one(one: Result, two: list[Result], loss: str) -> None:
    for rank in two:
        for found, expected in zip(rank["contrastive"][loss], one["contrastive"][loss], strict=True):
            torch.testing.assert_close(found, expected)


def test_two_ranks_give_the_dino_loss_gradient_and_center_of_one(one: Result, two: list[Result]) -> None:
    for rank in two:
        torch.testing.assert_close(rank["dino"]["center"], one["dino"]["center"])
        for found, expected in zip(rank["dino"]["steps"], one["dino"]["steps"], strict=True):
            torch.testing.assert_close(found, expected)
