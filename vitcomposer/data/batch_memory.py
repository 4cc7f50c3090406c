"""Takes a loader worker's batches to the main process: images in memory that is used again, small tensors as bytes.

A worker hands its batches over in shared memory. Taken anew for each batch, all its pages are made by faults in the
worker and mapped by faults in the main process, here 0.2 of 1.1 ms an image. So a worker keeps its buffers, the main
process keeps them mapped, and the last byte of a buffer says whether a batch in it is still in use. The main process
clears it when the tensor that it got and all views of it are gone: whoever keeps a batch keeps its buffer, and the
worker takes another. A buffer whose batch is not followed (a view was sent instead of it, or nothing) stays in use
for ever, which is safe.

Torch opens a connection between the two processes for each tensor in shared memory, 0.2 ms of both. So a buffer is sent
once: a byte of it says that the main process has it, and from then on its address is enough. Labels, boxes and other
small tensors are sent as their bytes (:func:`by_value`).
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

_SMALL = 1 << 16  # bytes of a tensor that is sent by value

_FREE, _IN_USE, _DROPPED = 0, 1, 2
_STATE, _ARRIVED, _MARKS = -1, -2, 2  # the last bytes of a buffer: one of the three; whether the main process has it
_buffers: OrderedDict[int, Tensor] = OrderedDict()  # of this worker, by address, least recently used first
_attached: dict[tuple[int, int], Tensor] = {}  # in the main process: buffers, by a worker's pid and their address there


def empty_batch(count: int, size: int) -> Tensor:
    """Uninitialised uint8 (count, 3, size, size), a channels-first view of channels-last memory.

    In a loader worker it is shared memory, so that the main process gets it without a copy. The tensor itself must
    be handed over for its buffer to be used again, not a view of it.
    """
    shape = (count, size, size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    length = count * size * size * 3
    buffer = _take_buffer(length + _MARKS)
    if buffer is None:
        return _shared(length).view(shape).permute(0, 3, 1, 2)
    images = buffer[:-_MARKS].view(shape).permute(0, 3, 1, 2).as_subclass(_Images)
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
    free = [address for address, buffer in _buffers.items() if buffer[_STATE] == _FREE]
    address = next((address for address in free if len(_buffers[address]) == length), None)
    if address is None:
        if len(_buffers) == MAX_BUFFERS:
            if not free:
                return None
            _buffers.pop(free[0])[_STATE] = _DROPPED  # of another size, which is no longer asked for
        buffer = _shared(length)
        buffer[_ARRIVED] = False
        address = buffer.data_ptr()
        _buffers[address] = buffer
    _buffers.move_to_end(address)
    _buffers[address][_STATE] = _IN_USE
    return _buffers[address]


def _reduce(images: _Images) -> tuple[Any, ...]:
    buffer = images.buffer
    place, shape = (os.getpid(), buffer.data_ptr()), tuple(images.permute(0, 2, 3, 1).shape)
    return (_lease, (place, shape)) if buffer[_ARRIVED] else (_attach, (buffer, place, shape))


ForkingPickler.register(_Images, _reduce)


def by_value(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, its small tensors such that a loader worker sends them as bytes; as it is in the main process."""
    if get_worker_info() is None:
        return batch
    small = {key: entry for key, entry in batch.items() if type(entry) is Tensor and entry.nbytes <= _SMALL}
    return {**batch, **{key: entry.as_subclass(_Values) for key, entry in small.items()}}


class _Values(Tensor):
    """A small tensor, as the worker holds it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]


def _reduce_values(values: _Values) -> tuple[Any, ...]:
    return torch.from_numpy, (values.numpy(),)


ForkingPickler.register(_Values, _reduce_values)


class _Lease:
    """The memory of a batch in the process that received it; frees the buffer when nobody looks at it any more."""

    def __init__(self, buffer: Tensor, shape: tuple[int, ...]) -> None:
        self._buffer, self._pid = buffer.numpy(), os.getpid()
        data = (buffer.data_ptr(), False)
        self.__array_interface__ = {"version": 3, "data": data, "shape": shape, "typestr": "|u1"}

    def __del__(self) -> None:
        if self._pid == os.getpid():  # not the copy in a process that was forked meanwhile
            self._buffer[_STATE] = _FREE


def _attach(buffer: Tensor, place: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """The batch in a worker's buffer, which comes for the first time, or again before the worker has seen its mark."""
    if place not in _attached or _attached[place].data_ptr() != buffer.data_ptr():
        for other in list(_attached):
            if _attached[other][_STATE] == _DROPPED or not _is_alive(other[0]):
                del _attached[other]
        _attached[place] = buffer
    buffer[_ARRIVED] = True
    return _lease(place, shape)


def _lease(place: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """The batch in a buffer that is here."""
    return torch.from_numpy(np.asarray(_Lease(_attached[place], shape))).permute(0, 3, 1, 2)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
