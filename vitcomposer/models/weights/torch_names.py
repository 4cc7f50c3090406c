"""Makes what a torch file may hold beside numbers, texts and containers, from arguments that are checked here.

The names are those that ``torch.save`` writes for tensors, and what Composer (clock, random state), DeiT and their like
(arguments) store beside the weights.
"""

import datetime
import math
import re
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from vitcomposer.models.weights.plain_pickle import Maker, MalformedError, Names

_MOST_DIMENSIONS = 16
_NUMBERS = re.compile(
    r"[<|=]?([biufc](1|2|4|8|16)|\?)"
)  # types of numpy that are numbers; bytes in this machine's order
_STORAGES = {
    **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
    **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
    **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
}


@dataclass(frozen=True)
class StorageKind:
    """Stands for a class of storages."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """Bytes that tensors lie in.

    Attributes:
        memory: None where only the shapes are asked for.
    """

    memory: torch.UntypedStorage | None
    length: int  # bytes
    dtype: torch.dtype

    def bytes(self) -> memoryview:
        """The memory, to be filled."""
        assert self.memory is not None
        return torch.empty(0, dtype=torch.uint8).set_(self.memory).numpy().data


class TorchNames:
    """Everything that one torch file may name.

    Args:
        tensor_room: Bytes that all its tensors together may have, were each by itself: those that overlap have more
            than the file.
    """

    def __init__(self, tensor_room: int) -> None:
        self._room = tensor_room
        self._truths: list[Tensor] = []
        makers = {
            "torch._utils._rebuild_tensor": self.rebuild,
            "torch._utils._rebuild_tensor_v2": self.rebuild,
            "torch._utils._rebuild_tensor_v3": self.rebuild_of_dtype,
            **_MAKERS,
        }
        self.names = Names({**_VALUES, **{name: Maker(name, make) for name, make in makers.items()}}, _FILL)

    def check_truths(self) -> None:
        """Once the storages are filled: what computes with truth values relies on bytes that are 0 or 1."""
        for tensor in self._truths:
            if tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
                raise MalformedError("a tensor of it has truth values that are neither 0 nor 1")

    def rebuild(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any = False, hooks: Any = None, extra: Any = None
    ) -> Tensor:
        """``torch._utils._rebuild_tensor_v2``: a view of the storage."""
        if type(storage) is not Storage:
            raise MalformedError("a tensor of it lies in no storage")
        return self._build(storage, storage.dtype, offset, size, stride, grad, hooks, extra)

    def rebuild_of_dtype(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, extra: Any = None
    ) -> Tensor:
        """``torch._utils._rebuild_tensor_v3``, of newer dtypes."""
        if type(storage) is not Storage or type(dtype) is not torch.dtype:
            raise MalformedError("a tensor of it lies in no storage")
        return self._build(storage, dtype, offset, size, stride, grad, hooks, extra)

    def _build(  # noqa: PLR0913, PLR0917 (those of torch)
        self,
        storage: Storage,
        dtype: torch.dtype,
        offset: Any,
        size: Any,
        stride: Any,
        grad: Any,
        hooks: Any,
        extra: Any,
    ) -> Tensor:
        size, stride, (offset,) = _counts(size), _counts(stride), _counts((offset,))
        if len(size) != len(stride) or hooks or extra or type(grad) is not bool:
            raise MalformedError("a tensor of it is none that torch.save writes")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset - 1
        if (last + 1) * dtype.itemsize > storage.length or count * dtype.itemsize > storage.length:
            raise MalformedError(f"a tensor of shape {size} reaches beyond its {storage.length} bytes")
        self._room -= count * dtype.itemsize
        if self._room < 0:
            raise MalformedError("its tensors overlap so often that they have more bytes than the file")
        if storage.memory is None:
            return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        tensor = torch.empty(0, dtype=dtype).set_(storage.memory, offset, size, stride)  # pyright: ignore
        if dtype == torch.bool:
            self._truths.append(tensor)
        return tensor.requires_grad_(grad)


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MOST_DIMENSIONS:
        raise MalformedError(f"it has more than {_MOST_DIMENSIONS} dimensions, or none that are numbers")
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise MalformedError(f"it has sizes that are no whole numbers from 0 on: {values}"[:200])
    return values


def _parameter(data: Any, grad: Any, hooks: Any) -> nn.Parameter:
    if type(data) is not Tensor or type(grad) is not bool or hooks:
        raise MalformedError("a parameter of it is no tensor")
    return nn.Parameter(data.detach(), requires_grad=grad)


def _size(values: Any) -> torch.Size:
    return torch.Size(_counts(values))


def _device(kind: Any, index: Any = None) -> torch.device:
    if kind not in ("cpu", "cuda", "mps", "xpu", "meta") or not (index is None or index in range(1024)):
        raise MalformedError("it names a device that torch does not have")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _version(text: Any) -> TorchVersion:
    if type(text) is not str or not re.fullmatch(r"[\w.+-]{1,64}", text):
        raise MalformedError("it names a version that torch does not have")
    return TorchVersion(text)


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    if pairs != ():  # only Python 2 wrote the elements here
        raise MalformedError("it is of Python 2")
    return OrderedDict()


def _fill_ordered_dict(target: OrderedDict[Any, Any], state: Any) -> None:
    """``_metadata`` of ``nn.Module.state_dict()``: the versions of its layers."""
    if type(state) is not dict or state.keys() - {"_metadata"}:
        raise MalformedError("a dict of it has attributes")
    vars(target).update(state)


def _timedelta(days: Any, seconds: Any, microseconds: Any) -> datetime.timedelta:
    if not all(type(part) is int for part in (days, seconds, microseconds)):
        raise MalformedError("it has a duration that is no number")
    return datetime.timedelta(days, seconds, microseconds)


def _namespace() -> Namespace:
    return Namespace()


def _fill_namespace(target: Namespace, state: Any) -> None:
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise MalformedError("it has arguments without names")
    vars(target).update(state)


def _set(values: Any) -> set[Any]:
    if type(values) is not list or not all(type(value) in (str, bool, float, type(None)) for value in values):
        raise MalformedError("it has a set of other than texts and numbers")
    return set(values)


def _encode(text: Any, encoding: Any) -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise MalformedError("it has bytes of another encoding")
    return text.encode("latin1")


def _dtype(kind: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    if type(kind) is not str or not _NUMBERS.fullmatch(kind):
        raise MalformedError(f"it has an array of {kind!r}, which is no type of numbers"[:200])
    return np.dtype(kind)


def _fill_dtype(dtype: np.dtype[Any], state: Any) -> None:
    """The order of the bytes, and that there are no fields and no objects: the type is what its name says."""
    plain = type(state) is tuple and len(state) == 8 and state[2:5] == (None, None, None) and state[7] == 0
    if not plain or state[1] not in ("<", "|", "="):
        raise MalformedError("it has an array of another type than numbers in this machine's order of bytes")


def _scalar(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, np.dtype) or type(content) is not bytes or len(content) != dtype.itemsize:
        raise MalformedError("it has a number of numpy that is none")
    return np.frombuffer(_sound(content, dtype), dtype)[0]


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray[Any, Any]:
    """What an array is before its state is given."""
    if kind is not _ARRAY or shape != (0,) or code != b"b":
        raise MalformedError("it has an array that numpy does not write")
    return np.empty(0, np.int8)


def _fill_array(target: np.ndarray[Any, Any], state: Any) -> None:
    if type(state) is not tuple or len(state) != 5 or target.size:
        raise MalformedError("it has an array that numpy does not write")
    version, shape, dtype, fortran, content = state
    whole = isinstance(dtype, np.dtype) and type(content) is bytes and type(fortran) is bool and version == 1
    if not whole or len(content) != math.prod(_counts(shape)) * dtype.itemsize:
        raise MalformedError("it has an array whose bytes are not those of its shape")
    target.__setstate__((1, shape, dtype, fortran, _sound(content, dtype)))  # pyright: ignore[reportArgumentType]


def _sound(content: bytes, dtype: np.dtype[Any]) -> bytes:
    if dtype.kind == "b" and content.translate(None, b"\0\1"):
        raise MalformedError("it has truth values that are neither 0 nor 1")
    return content


def _no_call(*_: Any) -> Any:
    raise MalformedError("it calls numpy.ndarray")


_ARRAY = Maker("numpy.ndarray", _no_call)  # an argument alone
_MAKERS = {
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.torch_version.TorchVersion": _version,
    "collections.OrderedDict": _ordered_dict,
    "datetime.timedelta": _timedelta,
    "argparse.Namespace": _namespace,
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    **dict.fromkeys(("builtins.set", "__builtin__.set"), _set),
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _scalar),
    **dict.fromkeys(("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"), _empty_array),
}
_FILL = {
    OrderedDict: _fill_ordered_dict,
    Namespace: _fill_namespace,
    np.ndarray: _fill_array,
    **{type(np.dtype(f"{kind}")): _fill_dtype for kind in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
}
_VALUES = {
    "numpy.ndarray": _ARRAY,
    **{f"torch.{name}Storage": StorageKind(dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": StorageKind(torch.uint8),
    **{str(value): value for value in vars(torch).values() if type(value) is torch.dtype},
    **{f"torch.{name}": value for name, value in vars(torch).items() if type(value) is torch.dtype},
}
