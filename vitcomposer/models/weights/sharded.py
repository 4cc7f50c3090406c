"""Reads checkpoints of which every rank wrote a share: folders in torch's distributed format, without running code.

``.metadata`` is a pickle that says where each tensor's pieces and each other value lie in the files of the ranks; every
piece and every value is a torch file by itself. ``digests.json`` has a digest of each file, as the ranks wrote them.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from vitcomposer.models.weights.plain_pickle import Blank, Maker, MalformedError, Names, fill_blank, read_pickle
from vitcomposer.models.weights.torch_file import read_torch_slice
from vitcomposer.models.weights.torch_names import TorchNames
from vitcomposer.models.weights.zip_records import DamagedError, FileSlice

DIGESTS = "digests.json"
_METADATA = ".metadata"
_MOST_BYTES = 1 << 28  # of .metadata
_ROOM = 64  # bytes of memory for each of its bytes
_BLANKS = {
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    **dict.fromkeys(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath")),
}


@dataclass(frozen=True)
class Piece:
    """Where one value lies."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = field(default=None, repr=False)  # torch asks for it; we write none


def read_shares(folder: Path, *, tensors: bool = True) -> dict[str, Any]:
    """What the ranks saved together, nested as they gave it, tensors whole and on the CPU.

    Args:
        tensors: Also those; else their places stay empty.

    Raises:
        OSError, ValueError: Not whole, or not harmless.
    """
    index = read_index(folder)
    content: dict[str, Any] = {}
    for key, kind in index.state_dict_metadata.items():
        path = index.planner_data.get(key, (key,))
        if isinstance(kind, TensorStorageMetadata):
            if tensors:
                _put(content, path, _tensor(folder, index, key, kind))
        else:
            _put(content, path, read_piece(folder, _at(index, MetadataIndex(key))))
    return content


def read_piece(folder: Path, piece: Any) -> Any:
    """The value that one entry of the index stands for."""
    with (folder / piece.relative_path).open("rb") as file:
        return read_torch_slice(FileSlice(file, piece.offset, piece.length))


def check_shares(folder: Path, *, read: bool) -> None:
    """Raise ValueError where a folder is no whole checkpoint; ``read`` compares every byte with its digest."""
    try:
        pieces: list[Piece] = list(read_index(folder).storage_data.values())
        for piece in pieces:
            path = folder / piece.relative_path
            if path.stat().st_size < piece.offset + piece.length:
                raise DamagedError(f"cut short in {path.name}")
        if read:
            _check_bytes(folder, pieces)
            read_shares(folder, tensors=False)
    except FileNotFoundError as error:
        raise DamagedError(f"without {Path(str(error.filename)).name}") from error


def _check_bytes(folder: Path, pieces: list[Piece]) -> None:
    if not (folder / DIGESTS).is_file():  # of an older version
        for piece in pieces:
            try:
                read_piece(folder, piece)
            except ValueError as error:
                raise DamagedError(f"damaged in {piece.relative_path} ({error})") from error
        return
    stated = json.loads((folder / DIGESTS).read_bytes())
    if not isinstance(stated, dict):
        raise DamagedError(f"damaged in {DIGESTS}")
    for name in sorted({_METADATA, *(piece.relative_path for piece in pieces)}):
        if stated.get(name) != digest_of(folder / name):
            raise DamagedError(f"damaged in {name}, its digest is another")


def digest_of(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        whole = FileSlice(file)
        return whole.digest(whole.length).hexdigest()


def digests_of_rank(folder: Path, rank: int) -> dict[str, str]:
    """Of the files that a rank has written, by name; of rank 0 the index is one."""
    names = [path.name for path in folder.glob(f"__{rank}_*")] + [_METADATA] * (rank == 0)
    return {name: digest_of(folder / name) for name in names}


def read_index(folder: Path) -> Metadata:
    """``.metadata`` as torch's own records, after a look at each of them.

    Raises:
        OSError, ValueError: It is not whole, not harmless, or names files outside of the folder.
    """
    with (folder / _METADATA).open("rb") as file:
        whole = FileSlice(file)
        data = whole.read(0, min(whole.length, _MOST_BYTES))
    content, end = read_pickle(data, _names(), room=_ROOM * len(data))
    if end != whole.length:
        raise DamagedError(f"damaged in {_METADATA}")
    try:
        return _metadata(_state(content, "Metadata"))
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"damaged in {_METADATA} ({error!r})") from error


def _names() -> Names:
    values, fill = TorchNames(0).names
    blanks = [f"{module}.{name}" for module, names in _BLANKS.items() for name in names]
    known = {name: Maker(name, lambda *values, name=name: Blank(name.rpartition(".")[2], values)) for name in blanks}
    return Names({**values, **known}, {**fill, Blank: fill_blank})


def _state(blank: Any, *kinds: str) -> Any:
    """The attributes of a record that has to be of a kind."""
    if type(blank) is not Blank or blank.kind not in kinds:
        raise MalformedError(f"its index has a {type(blank).__name__} in the place of a {kinds[0]}")
    return blank.state


def _metadata(state: Mapping[str, Any]) -> Metadata:
    kinds, paths, places = state["state_dict_metadata"], state["planner_data"], state["storage_data"]
    pieces = {
        _index(_state(key, "MetadataIndex")): _piece(_state(info, "_StorageInfo")) for key, info in places.items()
    }
    _check_apart(pieces)
    return Metadata(
        state_dict_metadata={_text(key): _kind(value) for key, value in kinds.items()},
        planner_data={_text(key): _path(path, len(paths)) for key, path in paths.items()},
        storage_data=pieces,
        storage_meta=StorageMeta(),
    )


def _text(value: Any) -> str:
    if type(value) is not str:
        raise MalformedError("its index has a name that is no text")
    return value


def _index(state: Mapping[str, Any]) -> MetadataIndex:
    return MetadataIndex(_text(state["fqn"]), state.get("offset"), state.get("index"))


def _kind(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    state = _state(value, "TensorStorageMetadata", "BytesStorageMetadata")
    if value.kind == "BytesStorageMetadata":
        return BytesStorageMetadata()
    dtype = _state(state["properties"], "TensorProperties")[0]
    chunks = [_state(chunk, "ChunkStorageMetadata") for chunk in state["chunks"]]
    whole = TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=state["size"],
        chunks=[ChunkStorageMetadata(offsets=chunk["offsets"], sizes=chunk["sizes"]) for chunk in chunks],
    )
    if type(dtype) is not torch.dtype or type(whole.size) is not torch.Size:
        raise MalformedError("its index has a tensor without type or size")
    for chunk in whole.chunks:
        parts = zip(chunk.offsets, chunk.sizes, whole.size, strict=True)
        if not all(offset + size <= most for offset, size, most in parts):
            raise MalformedError("its index has a piece outside of its tensor")
    if sum(chunk.sizes.numel() for chunk in whole.chunks) != whole.size.numel():
        raise MalformedError("its index has a tensor that its pieces do not fill")
    return whole


def _path(path: Any, keys: int) -> tuple[str | int, ...]:
    """Names in dicts and places in lists, of which there are no more than keys."""
    if type(path) is not tuple or not all(type(step) is str or step in range(keys) for step in path):
        raise MalformedError(f"its index has a path that is none: {path!r}"[:200])
    return path


def _piece(state: Mapping[str, Any]) -> Piece:
    name, offset, length = state["relative_path"], state["offset"], state["length"]
    whole = type(offset) is int and type(length) is int and offset >= 0 and length >= 0
    if not whole or Path(_text(name)).name != name or state.get("transform_descriptors"):
        raise MalformedError(f"{name!r} is no plain file of this folder")
    return Piece(name, offset, length)


def _check_apart(pieces: Mapping[MetadataIndex, Piece]) -> None:
    """Each byte is part of one piece, so that all of them are no more than the files."""
    ends: dict[str, int] = {}
    for piece in sorted(pieces.values(), key=lambda each: (each.relative_path, each.offset)):
        if piece.offset < ends.get(piece.relative_path, 0):
            raise MalformedError(f"pieces overlap in {piece.relative_path}")
        ends[piece.relative_path] = piece.offset + piece.length


def _at(index: Metadata, key: MetadataIndex) -> Piece:
    if key not in index.storage_data:
        raise DamagedError(f"its index has no place of {key.fqn}")
    return index.storage_data[key]


def _tensor(folder: Path, index: Metadata, key: str, kind: TensorStorageMetadata) -> Tensor:
    dtype = kind.properties.dtype
    places = [_at(index, MetadataIndex(key, chunk.offsets)) for chunk in kind.chunks]
    for chunk, piece in zip(kind.chunks, places, strict=True):  # before memory is asked for
        if math.prod(chunk.sizes) * dtype.itemsize > piece.length:
            raise MalformedError(f"a piece of {key} is larger than its file")
    whole = torch.empty(kind.size, dtype=dtype)
    for chunk, piece in zip(kind.chunks, places, strict=True):
        found = read_piece(folder, piece)
        if type(found) is not Tensor or found.shape != chunk.sizes or found.dtype != dtype:
            raise MalformedError(f"a piece of {key} is not the tensor that its index says")
        whole[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))] = found
    return whole


def _put(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """Set an element of nested dicts and lists, which are made on the way: a whole number is a place in a list."""
    here: Any = content
    for step, following in zip(path, (*path[1:], None), strict=True):
        new = value if following is None else ([] if isinstance(following, int) else {})
        if isinstance(here, list):
            here.extend([None] * (step + 1 - len(here)))
            if following is None or here[step] is None:
                here[step] = new
        elif following is None or step not in here:
            here[step] = new
        here = here[step]
