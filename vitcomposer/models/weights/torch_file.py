"""Reads torch files without running anything in them, and without torch's own reader: zip archives and older ones.

Every byte that counts is compared with a checksum, every tensor lies within the bytes of its record, and memory stays
below about twice the file. What ``torch.save`` has written since version 1.6 is a zip archive: ``data.pkl`` with the
structure, one record for each storage. Before it was four pickles and the storages, one after another.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vitcomposer.models.weights.plain_pickle import MalformedError, Names, UnsafeError, read_pickle
from vitcomposer.models.weights.torch_names import Storage, StorageKind, TorchNames
from vitcomposer.models.weights.zip_records import DamagedError, FileSlice, ZipRecords

__all__ = ["DamagedError", "FileSlice", "MalformedError", "UnsafeError", "read_torch_file", "read_torch_slice"]

_ROOM = 1 << 25  # bytes of memory that the smallest file may need
_OVERLAP = 4  # times the file that tensors which share storages may have together
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LEGACY_STRUCTURE = 1 << 26  # bytes at the beginning of an older file that may be pickles
_ZIP = b"PK\3\4"
_THREADS, _WORTH_THREADS = 4, 1 << 22  # which compare checksums, for so many bytes


def read_torch_file(path: Path, *, tensors: bool = True) -> Any:
    """The content of a torch file, its tensors on the CPU.

    Args:
        tensors: Also their numbers; else they are on the device ``meta`` and have shapes alone.

    Raises:
        OSError: There is no such file, or the disk does not give it.
        UnsafeError: It needs a name that is no data.
        DamagedError, MalformedError: It is not what torch.save wrote.
    """
    with path.open("rb") as file:
        return read_torch_slice(FileSlice(file), tensors=tensors)


def read_torch_slice(file: FileSlice, *, tensors: bool = True) -> Any:
    """As :func:`read_torch_file`, of a part of a file."""
    if file.length == 0:
        raise DamagedError("empty")
    head = file.read(0, min(4, file.length))
    if head == _ZIP:
        return _read_zip(file, tensors)
    if not any(head):
        raise DamagedError("zeros")
    return _read_legacy(file, tensors)


def check_torch_file(path: Path) -> bool:
    """Compare every byte of a torch file with its digest, or where it has none each record with its checksum.

    Returns:
        Whether it has a digest.

    Raises:
        OSError, ValueError: As :func:`read_torch_file`.
    """
    with path.open("rb") as file:
        whole = FileSlice(file)
        read_torch_slice(whole, tensors=False)
        if whole.read(0, 4) != _ZIP:
            return False
        records = ZipRecords(whole)
        if records.digest is None:
            records.verify_records()
        else:
            records.verify_digest()
        return records.digest is not None


def check_directory(path: Path) -> bool:
    """As :func:`check_torch_file`, of the directory at the end of a zip archive alone."""
    with path.open("rb") as file:
        return ZipRecords(FileSlice(file)).digest is not None


def _read_zip(file: FileSlice, tensors: bool) -> Any:
    records = ZipRecords(file)
    folder = next((name[: -len("data.pkl")] for name in records.records if name.endswith("/data.pkl")), None)
    if folder is None:
        raise DamagedError("without the record data.pkl")
    if f"{folder}byteorder" in records.records and records.read(f"{folder}byteorder") != b"little":
        raise MalformedError("its numbers are in the order of another machine")
    structure = records.read(f"{folder}data.pkl")
    storages, names = _Storages(file.length, tensors), TorchNames(_OVERLAP * file.length)
    room = _ROOM + file.length
    content, end = read_pickle(structure, names.names, room=room, stored=storages.find)
    if end != len(structure):
        raise DamagedError("its pickle has bytes after its end")
    for key, storage in storages.found.items():
        record = records.records.get(f"{folder}data/{key}")
        if record is None or record.length != storage.length:
            raise DamagedError(f"the record data/{key} is missing or of another size than its tensors say")
    if tensors:
        _fill_all(records, {f"{folder}data/{key}": storage for key, storage in storages.found.items()})
        names.check_truths()
    return content


def _fill_all(records: ZipRecords, storages: dict[str, Storage]) -> None:
    """Read all storages; where the file has a digest of its whole, that stands for the checksums of its records."""
    records.verify_digest()
    check = records.digest is None
    if sum(storage.length for storage in storages.values()) < _WORTH_THREADS:
        for name, storage in storages.items():
            records.fill(name, storage.bytes(), check=check)
        return
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        filled = [pool.submit(records.fill, name, storage.bytes(), check=check) for name, storage in storages.items()]
        for each in filled:
            each.result()


class _Storages:
    """The storages that a pickle refers to, by key; together they are never larger than the file."""

    def __init__(self, room: int, tensors: bool) -> None:
        self._room, self._tensors = room, tensors
        self.found: dict[str, Storage] = {}

    def find(self, reference: Any) -> Storage:
        """What ``("storage", kind, key, device, number of elements)`` stands for; older files add None."""
        if type(reference) is not tuple or len(reference) not in (5, 6) or any(reference[5:]):
            raise MalformedError("it holds whole modules or views of storages, not tensors")
        word, kind, key, device, count = reference[:5]
        known = word == "storage" and type(kind) is StorageKind and type(key) is str and type(device) is str
        if not known or type(count) is not int or count < 0:
            raise MalformedError("it refers to a storage as torch.save never does")
        length = count * kind.dtype.itemsize
        if key in self.found:
            storage = self.found[key]
            if storage.length != length:
                raise MalformedError(f"its storage {key} has two sizes")
            return Storage(storage.memory, length, kind.dtype)
        self._room -= length
        if self._room < 0:
            raise MalformedError("its storages are larger than the file")
        memory = torch.UntypedStorage(length) if self._tensors else None
        self.found[key] = Storage(memory, length, kind.dtype)
        return self.found[key]


def _read_legacy(file: FileSlice, tensors: bool) -> Any:
    data = file.read(0, min(file.length, _LEGACY_STRUCTURE))
    nothing = Names({}, {})
    storages, names = _Storages(file.length, tensors), TorchNames(_OVERLAP * file.length)
    room = _ROOM + file.length
    try:
        magic, place = read_pickle(data, nothing, room=room)
    except (MalformedError, UnsafeError):
        raise DamagedError("cut short, or not written by torch.save") from None
    if magic != _LEGACY_MAGIC:
        raise MalformedError(
            "it is a pickle or an archive that torch.save did not write. Read it with what wrote it, and save the "
            "tensors with torch.save"
        )
    protocol, place = read_pickle(data, nothing, room=room, start=place)
    system, place = read_pickle(data, nothing, room=room, start=place)
    if protocol != _LEGACY_PROTOCOL or type(system) is not dict or system.get("little_endian") is not True:
        raise MalformedError("it is of another version of torch, or of another kind of machine")
    content, place = read_pickle(data, names.names, room=room, stored=storages.find, start=place)
    keys, place = read_pickle(data, nothing, room=room, start=place)
    del data
    if type(keys) is not list or sorted(map(str, keys)) != sorted(storages.found):
        raise DamagedError("its storages are not those that its tensors lie in")
    for key in keys:
        storage = storages.found[key]
        count = storage.length // storage.dtype.itemsize
        if int.from_bytes(file.read(place, 8), "little") != count or place + 8 + storage.length > file.length:
            raise DamagedError("cut short")
        if tensors:
            file.fill(storage.bytes(), place + 8)
        place += 8 + storage.length
    if place != file.length:
        raise DamagedError("it has bytes after its end")
    names.check_truths()
    return content
