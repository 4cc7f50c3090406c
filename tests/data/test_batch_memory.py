"""Memory of a batch: its layout, that a worker uses it again, and never while somebody still looks at it."""

import os
from multiprocessing import resource_sharer

import pytest
import torch
from torch.utils.data import DataLoader

from vitcomposer.data import batch_memory
from vitcomposer.data.batch_memory import MAX_BUFFERS, empty_batch

pytestmark = pytest.mark.timeout(60)


def fill(numbers: list[int]) -> dict:
    images = empty_batch(len(numbers), 8)
    for number, image in zip(numbers, images, strict=True):
        image.fill_(number % 256)
    return {"image": images, "first": numbers[0], "is_shared": images.is_shared()}


def fill_sizes(numbers: list[int]) -> dict:
    """Another size every 20 batches, as with a curriculum of resolutions."""
    images = empty_batch(len(numbers), 4 + numbers[0] // 80)
    return {"image": images.fill_(numbers[0] % 256), "first": numbers[0]}


def fill_view(numbers: list[int]) -> dict:
    batch = fill(numbers)
    return {**batch, "image": batch["image"][:, :2]}


def loader(count: int, workers: int = 1, collate=fill, batch_size: int = 4) -> DataLoader:
    return DataLoader(range(count), batch_size, collate_fn=collate, num_workers=workers, timeout=30)


def expect(images: torch.Tensor, first: int) -> None:
    for offset, image in enumerate(images):
        assert image.unique().tolist() == [(first + offset) % 256]


def test_the_main_process_gets_ordinary_channels_last_memory():
    images = empty_batch(5, 8)
    assert (images.shape, images.dtype) == ((5, 3, 8, 8), torch.uint8)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images[2].permute(1, 2, 0).is_contiguous()
    assert type(images) is torch.Tensor and not images.is_shared()
    assert empty_batch(0, 8).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_uses_its_buffers_again(workers):
    addresses = set()
    for batch in loader(800, workers):
        images = batch["image"]
        assert batch["is_shared"] and type(images) is torch.Tensor
        assert images.is_contiguous(memory_format=torch.channels_last)
        expect(images, batch["first"])
        addresses.add(images.data_ptr())
        images.zero_()  # the consumer may write to it
    # Two prepared ahead, one on its way and one in use here for each worker, of 200 batches.
    assert len(addresses) <= 4 * workers


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_kept_are_never_overwritten(workers):
    batches = list(loader(400, workers))
    assert len(batches) > 2 * MAX_BUFFERS * workers
    for first, batch in zip(range(0, 400, 4), batches, strict=True):
        assert batch["first"] == first
        expect(batch["image"], first)


@pytest.mark.parametrize("keep", [lambda images: images[1:], lambda images: images.numpy(), lambda images: images.mT])
def test_a_view_keeps_the_buffer(keep):
    kept = []
    for number, batch in enumerate(loader(400)):
        view = None
        if number % 9 == 0:
            view = keep(batch["image"])
            kept.append((view, torch.as_tensor(view).clone()))
        del batch, view
    assert all(torch.equal(torch.as_tensor(view), copy) for view, copy in kept)


def test_a_view_that_is_sent_arrives_whole():
    for batch in list(loader(200, collate=fill_view)):
        assert batch["image"].shape == (4, 2, 8, 8)
        expect(batch["image"], batch["first"])


def test_old_sizes_are_let_go():
    largest = 0
    for batch in loader(4000, collate=fill_sizes):
        assert batch["image"].unique().tolist() == [batch["first"] % 256]
        largest = max(largest, len(batch_memory._attached))
    assert largest <= MAX_BUFFERS + 4  # those of ended workers go with the next buffer


def test_buffers_of_ended_workers_are_let_go():
    for _ in range(3):
        list(loader(40))
    list(loader(40))
    assert len({pid for pid, _ in batch_memory._attached}) == 1


def values(numbers: list[int]) -> dict:
    """Of the types that batches have, and one too large to be sent by value."""
    first = torch.tensor(numbers)
    small = {str(kind): first.to(kind) for kind in (torch.int64, torch.int32, torch.float16, torch.float32)}
    large = torch.full((1 << 15,), numbers[0])
    return {**batch_memory.by_value({**small, "box": first.repeat(4, 1).T, "large": large}), "image": empty_batch(4, 8)}


def test_a_buffer_is_sent_once_and_small_tensors_as_bytes(monkeypatch):
    opened = []
    original = resource_sharer.DupFd.detach
    monkeypatch.setattr(resource_sharer.DupFd, "detach", lambda self: opened.append(1) or original(self))
    for number, batch in enumerate(loader(400, collate=values)):
        numbers = torch.arange(4 * number, 4 * number + 4)
        for kind in (torch.int64, torch.int32, torch.float16, torch.float32):
            assert batch[str(kind)].dtype == kind and torch.equal(batch[str(kind)], numbers.to(kind))
            batch[str(kind)] += 1  # the consumer may write to it
        assert torch.equal(batch["box"], numbers.repeat(4, 1).T)
        assert type(batch["torch.int64"]) is torch.Tensor and not batch["torch.int64"].is_shared()
        assert batch["large"].is_shared()
    # The large tensor of each of 100 batches, and each of the buffers, some of them before the worker knows.
    assert 100 < len(opened) <= 100 + 2 * MAX_BUFFERS


def test_a_forked_process_frees_no_buffer():
    batches = iter(loader(400))
    held = next(batches)["image"]
    pid = os.fork()
    if not pid:
        del held
        os._exit(0)
    os.waitpid(pid, 0)
    for _ in range(40):
        next(batches)
    expect(held, 0)
