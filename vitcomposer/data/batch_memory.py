"""Keeps the memory of a loader worker's batches in use, so that none is made anew for each batch.

A worker hands its batches over in shared memory. Taken anew for each batch, all its pages are made by faults in the
worker and mapped by faults in the main process, here 0.2 of 1.1 ms an image. So a worker keeps its buffers, the main
process keeps them mapped, and the last byte of a buffer says whether a batch in it is still in use. The main process
clears it when the tensor that it got and all views of it are gone: whoever keeps a batch keeps its buffer, and the
worker takes another. A buffer whose batch is not followed (a view was sent instead of it, or nothing) stays in use
for ever, which is safe.
"""

import os
from collections import OrderedDict
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

MAX_BUFFERS = 16  # of a worker, all sizes; a batch beyond them has memory of its own

_FREE, _IN_USE, _DROPPED = 0, 1, 2
_buffers: OrderedDict[int, Tensor] = OrderedDict()  # of this worker, by address, least recently used first
_attached: dict[int, tuple[int, Tensor]] = {}  # in the main process: a worker's pid and its buffer, by address


def empty_batch(count: int, size: int) -> Tensor:
    """Uninitialised uint8 (count, 3, size, size), a channels-first view of channels-last memory.

    In a loader worker it is shared memory, so that the main process gets it without a copy. The tensor itself must
    be handed over for its buffer to be used again, not a view of it.
    """
    shape = (count, size, size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    length = count * size * size * 3
    buffer = _take_buffer(length + 1)
    if buffer is None:
        return _shared(length).view(shape).permute(0, 3, 1, 2)
    images = buffer[:-1].view(shape).permute(0, 3, 1, 2).as_subclass(_Images)
    images.buffer = buffer
    return images


def _shared(length: int) -> Tensor:
    storage: Any = torch.UntypedStorage._new_shared(length)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class _Images(Tensor):
    """A batch in a buffer, as the worker holds it. Views of it are ordinary tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    buffer: Tensor


def _take_buffer(length: int) -> Tensor | None:
    """A buffer that no batch is in, marked as in use; None where all MAX_BUFFERS are."""
    free = [address for address, buffer in _buffers.items() if buffer[-1] == _FREE]
    address = next((address for address in free if len(_buffers[address]) == length), None)
    if address is None:
        if len(_buffers) == MAX_BUFFERS:
            if not free:
                return None
            _buffers.pop(free[0])[-1] = _DROPPED  # of another size, which is no longer asked for
        buffer = _shared(length)
        address = buffer.data_ptr()
        _buffers[address] = buffer
    _buffers.move_to_end(address)
    _buffers[address][-1] = _IN_USE
    return _buffers[address]


def _reduce(images: _Images) -> tuple[Any, ...]:
    return _attach, (images.buffer, tuple(images.permute(0, 2, 3, 1).shape), os.getpid())


ForkingPickler.register(_Images, _reduce)


class _Lease:
    """The memory of a batch in the process that received it; frees the buffer when nobody looks at it any more."""

    def __init__(self, buffer: Tensor, shape: tuple[int, ...]) -> None:
        self._buffer, self._pid = buffer.numpy(), os.getpid()
        data = (buffer.data_ptr(), False)
        self.__array_interface__ = {"version": 3, "data": data, "shape": shape, "typestr": "|u1"}

    def __del__(self) -> None:
        if self._pid == os.getpid():  # not the copy in a process that was forked meanwhile
            self._buffer[-1] = _FREE


def _attach(buffer: Tensor, shape: tuple[int, ...], pid: int) -> Tensor:
    """The batch in a worker's buffer. Torch maps a buffer that is already held here to the same address."""
    if buffer.data_ptr() not in _attached:
        for address, (owner, other) in list(_attached.items()):
            if other[-1] == _DROPPED or not _is_alive(owner):
                del _attached[address]
        _attached[buffer.data_ptr()] = (pid, buffer)
    return torch.from_numpy(np.asarray(_Lease(buffer, shape))).permute(0, 3, 1, 2)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
