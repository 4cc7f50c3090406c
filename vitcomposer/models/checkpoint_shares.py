"""Checkpoints of which every rank wrote a share: folders in torch's distributed format, read without running code.

``.metadata`` is a pickle that says where each tensor's pieces and each other value lie in the files of the ranks; every
piece and every value is a file of ``torch.save`` by itself.
"""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

Load = Callable[[io.BytesIO], Any]

_METADATA = ".metadata"
_KNOWN = {
    metadata: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    filesystem: ("_StorageInfo",),
}


class _Unpickler(pickle.Unpickler):
    """Builds the records of ``.metadata`` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        for known, names in _KNOWN.items():
            if module == known.__name__ and name in names:
                return getattr(known, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return PosixPath
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is none of the records of a checkpoint")


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"a checkpoint holds dense tensors, not {name}")
    return torch.strided


def read_shares(folder: Path, load: Load, *, tensors: bool = True) -> dict[str, Any]:
    """What the ranks saved together, nested as they gave it, tensors whole and on the CPU.

    Args:
        load: Reads one value that is no tensor without running code.
        tensors: Also those; else their places stay empty.

    Raises:
        FileNotFoundError, OSError, ValueError, pickle.UnpicklingError: Not whole, or not harmless.
    """
    index = _read_index(folder)
    content: dict[str, Any] = {}
    for key, kind in index.state_dict_metadata.items():
        path = index.planner_data.get(key, (key,))
        if isinstance(kind, metadata.TensorStorageMetadata):
            if tensors:
                _put(content, path, _tensor(folder, index, key, kind))
        else:
            _put(content, path, load(_slice(folder, index.storage_data[metadata.MetadataIndex(key)])))
    return content


def damage_of_shares(folder: Path, *, read: bool) -> str | None:
    """What keeps a folder from being a whole checkpoint, or None; ``read`` compares every byte with its checksum."""
    try:
        index = _read_index(folder)
        for info in index.storage_data.values():
            path = _file(folder, info)
            if path.stat().st_size < info.offset + info.length:
                return f"cut short in {path.name}"
            if read and (broken := zipfile.ZipFile(_slice(folder, info)).testzip()) is not None:
                return f"damaged in {path.name}, {broken}"
    except FileNotFoundError as error:
        return f"without {Path(str(error.filename)).name}"
    except (ValueError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        return f"damaged ({str(error) or type(error).__name__})"
    return None


def _read_index(folder: Path) -> metadata.Metadata:
    with (folder / _METADATA).open("rb") as file:
        index = _Unpickler(file).load()
    if not isinstance(index, metadata.Metadata):
        raise ValueError(f"{folder / _METADATA} is a {type(index).__name__}, not the index of a checkpoint")
    return index


def _tensor(folder: Path, index: metadata.Metadata, key: str, kind: metadata.TensorStorageMetadata) -> Tensor:
    whole = torch.empty(kind.size, dtype=kind.properties.dtype)
    for chunk in kind.chunks:
        info = index.storage_data[metadata.MetadataIndex(key, chunk.offsets)]
        piece = torch.load(_slice(folder, info), map_location="cpu", weights_only=True)
        place = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[place] = piece
    return whole


def _slice(folder: Path, info: Any) -> io.BytesIO:
    with _file(folder, info).open("rb") as file:
        file.seek(info.offset)
        return io.BytesIO(file.read(info.length))


def _file(folder: Path, info: Any) -> Path:
    if Path(info.relative_path).name != info.relative_path or getattr(info, "transform_descriptors", None):
        raise ValueError(f"{info.relative_path!r} is no plain file of this folder")
    return folder / info.relative_path


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
