"""Reads the rows of MDS shards on this node: shards are mapped into memory and samples are slices of the map.

Python's own ``mmap`` keeps a file descriptor open for each map until version 3.13, and a shuffle block spans hundreds
to thousands of shards, more than the usual limit of 1,024 descriptors: the map is made by libc's mmap here, which
needs none.
"""

import ctypes
import mmap
import os
import struct
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from streaming.base.format.mds.reader import MDSReader

from vitcomposer.data.jpeg.raw import raw_sample
from vitcomposer.data.mds.index import IMAGE_COLUMNS, IMAGE_ENCODINGS
from vitcomposer.data.mds.small_column import LOW_RESOLUTION_COLUMN, read_small_side
from vitcomposer.errors import ConfigError, ShardError

LABEL_COLUMNS = ("label", "y", "target")
LABEL_FORMATS = {
    "int": "<q",
    "int8": "<b",
    "int16": "<h",
    "int32": "<i",
    "int64": "<q",
    "uint8": "<B",
    "uint16": "<H",
    "uint32": "<I",
    "uint64": "<Q",
    "str_int": None,  # decimal digits
}

# Address space and page tables (8 bytes for each 4 KiB that was read), no memory and no descriptor. Fewer than the
# shards of a shuffle block would map and unmap a file for almost every sample.
MAX_MAPS = 4096

Image = bytes | memoryview


class Row(NamedTuple):
    """What is read of a sample; ``image_small`` where it is stored beside the image, see ``small_column``."""

    image: Image
    label: int
    image_small: Image | None


class FileMapping:
    """A file in memory, read-only, for as long as an array or memoryview over it lives."""

    def __init__(self, file: int, size: int) -> None:
        self.address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
        if self.address == _FAILED:
            error = ctypes.get_errno()
            raise OSError(error, f"it cannot be mapped into memory: {os.strerror(error)}")
        self.size = size
        self.__array_interface__ = {"version": 3, "data": (self.address, True), "shape": (size,), "typestr": "|u1"}

    def __del__(self) -> None:
        if self.address != _FAILED and _LIBC is not None:  # the module may be gone when the interpreter ends
            _LIBC.munmap(self.address, self.size)


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value
_WILLNEED = 3  # on Linux and macOS alike


class _Shard(NamedTuple):
    """A mapped shard. ``state`` tells its file from another that took its name, or its size since."""

    data: memoryview
    address: int
    begins: memoryview  # of the rows, and the end of the last
    state: tuple[int, ...]


class _Columns:
    """Where image and label lie in a row: sizes of its variable columns, then all columns one after the other."""

    def __init__(self, shard: MDSReader, index: str, image_columns: tuple[str, ...]) -> None:
        names, encodings, sizes = shard.column_names, shard.column_encodings, shard.column_sizes
        found = ", ".join(f"{name}: {encoding}" for name, encoding in zip(names, encodings, strict=True))
        if "pkl" in encodings:
            raise ConfigError(
                f"{index}: a column of encoding pkl runs code when it is read and is refused, got columns {found}. "
                "Write the split again with `vitcomposer convert`."
            )
        typed = list(zip(names, encodings, strict=True))
        image = [i for i, (name, enc) in enumerate(typed) if name in image_columns and enc in IMAGE_ENCODINGS]
        label = [i for i, (name, enc) in enumerate(typed) if name in LABEL_COLUMNS and enc in LABEL_FORMATS]
        if image_columns == (LOW_RESOLUTION_COLUMN,) and not image:
            raise ConfigError(
                f"augment.low_resolution must be false for data without a column {LOW_RESOLUTION_COLUMN}, got true, "
                f"and {index} has columns {found}. Set augment.low_resolution=false, or write the split again with "
                "`vitcomposer convert --raw-below`."
            )
        if len(image) != 1 or len(label) != 1:
            raise ConfigError(
                f"{index}: one column {' or '.join(IMAGE_COLUMNS)} of encoding {', '.join(IMAGE_ENCODINGS)} and one "
                f"column {', '.join(LABEL_COLUMNS)} of an integer encoding are required, got {found}. "
                "Write the split again with `vitcomposer convert`."
            )
        self.heads = struct.Struct(f"<{sum(not size for size in sizes)}I")
        self.fixed = sum(size for size in sizes if size)
        self.image = self._place(sizes, image[0])
        self.label = self._place(sizes, label[0])
        self.is_pil = encodings[image[0]] == "pil"
        small = [i for i, column in enumerate(typed) if column == (LOW_RESOLUTION_COLUMN, "bytes")]
        self.small = self._place(sizes, small[0]) if small else None
        code = LABEL_FORMATS[encodings[label[0]]]
        self.label_format = struct.Struct(code) if code else None
        if self.label_format and self.label[2] != self.label_format.size:
            raise ConfigError(
                f"{index}: a column of encoding {encodings[label[0]]} has {self.label_format.size} bytes, got "
                f"{self.label[2]}. Write the split again with `vitcomposer convert`."
            )

    @staticmethod
    def _place(sizes: Sequence[int | None], column: int) -> tuple[int, int, int]:
        """Bytes of fixed size and number of variable columns before a column, and its size or 0."""
        before = sizes[:column]
        return sum(size or 0 for size in before), sum(not size for size in before), sizes[column] or 0


class RowReader:
    """Reads encoded image and label of a row; nothing is decoded but the label.

    The image is a memoryview of the map: its bytes are read from disk when they are used. It stays valid for as long
    as it is held, and so do the disk blocks of its shard, deleted or not: hold a batch of them, not an epoch. The
    map itself is dropped by ``forget`` when the shard is evicted, by ``forget_changed`` when its file is another one,
    and when ``MAX_MAPS`` shards have been read since. A ``pil`` column of others is handed out as a raw sample.

    A file is measured when it is mapped, so one that is too short is an error. One that is cut while it is mapped (by
    writing over it: shards are written beside and renamed, and nothing of ours cuts one) or a disk that fails ends
    the process with SIGBUS, when bytes that are gone are used before the next ``forget_changed``.
    """

    def __init__(self, shards: list[MDSReader], folder: Path, index: str, low_resolution: bool = False) -> None:
        columns = {(tuple(s.column_names), tuple(s.column_encodings), tuple(s.column_sizes)) for s in shards}
        if len(columns) != 1:
            raise ConfigError(f"{index}: every shard must have the same columns, got {sorted(map(str, columns))}.")
        self._columns = _Columns(shards[0], index, (LOW_RESOLUTION_COLUMN,) if low_resolution else IMAGE_COLUMNS)
        beside = self._columns.small is not None and not low_resolution
        self.small_side = read_small_side(Path(index)) if beside else None
        infos = [shard.file_pairs[0][0] for shard in shards]
        self._files = [(str(folder / i.basename), i.bytes, s.samples) for i, s in zip(infos, shards, strict=True)]
        self._mapped: OrderedDict[int, _Shard] = OrderedDict()

    def read(self, number: int, row: int) -> Row:
        """Image file, or raw sample, and label of a row of a shard, with the smaller image stored beside it.

        Raises:
            ShardError: The file is not what its index says; the message lacks the shard's name.
            OSError: There is no such file, or it cannot be mapped.
        """
        shard = self._shard(number)
        columns, data = self._columns, shard.data
        begin, end = shard.begins[row], shard.begins[row + 1]
        at = begin + columns.heads.size
        lengths = columns.heads.unpack_from(data, begin)
        if at + columns.fixed + sum(lengths) != end:
            raise ShardError(f"the columns of sample {row} do not fill its bytes {begin} to {end}")
        image = _value(data, at, lengths, columns.image)
        small = None if columns.small is None else _value(data, at, lengths, columns.small)
        value = _value(data, at, lengths, columns.label)
        label = columns.label_format.unpack(value)[0] if columns.label_format else int(bytes(value))
        return Row(raw_sample(image) if columns.is_pil else image, label, small)

    def fetch(self, number: int, row: int) -> None:
        """Have the kernel begin to read a row from disk, of which ``read`` and the decoder then need not wait.

        Left to page faults, rows that are not in the page cache come one at a time, with as many bytes around them:
        64 rows asked for before the first is used were 2.2 to 2.7 times faster. Takes 5 us where they are cached.

        Raises:
            ShardError, OSError: As ``read``.
        """
        shard = self._shard(number)
        begin = shard.begins[row] & -mmap.PAGESIZE
        _LIBC.madvise(shard.address + begin, shard.begins[row + 1] - begin, _WILLNEED)

    def _shard(self, number: int) -> _Shard:
        shard = self._mapped.get(number)
        if shard is None:
            return self._map(number)
        self._mapped.move_to_end(number)
        return shard

    def _map(self, number: int) -> _Shard:
        path, size, samples = self._files[number]
        file = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(file)
            if status.st_size != size:
                raise ShardError(f"the file has {status.st_size} bytes, its index says {size}")
            mapping = FileMapping(file, size)
        finally:
            os.close(file)
        array = np.asarray(mapping)
        head = 4 * (samples + 2)
        begins = array[4:head].view("<u4") if size >= head else np.zeros(0, "<u4")
        if not len(begins) or array[:4].view("<u4")[0] != samples or begins[0] < head or begins[-1] > size:
            raise ShardError(f"the table of its {samples} samples is damaged")
        if np.any(begins[1:] < begins[:-1].astype(np.int64) + self._columns.heads.size + self._columns.fixed):
            raise ShardError(f"the table of its {samples} samples is damaged")
        shard = _Shard(array.data, mapping.address, begins.astype(np.uint32).data, _state(status))
        self._mapped[number] = shard
        if len(self._mapped) > MAX_MAPS:
            self._mapped.popitem(last=False)
        return shard

    def forget(self, gone: NDArray[np.bool_]) -> None:
        """Drop the maps of the shards for which ``gone`` (one per shard) is set."""
        for number in [number for number in self._mapped if gone[number]]:
            del self._mapped[number]

    def forget_changed(self) -> None:
        """Drop the maps of files that were deleted, replaced, cut or written since; reading them tells what is."""
        for number, shard in list(self._mapped.items()):
            try:
                same = _state(os.stat(self._files[number][0])) == shard.state
            except OSError:
                same = False
            if not same:
                del self._mapped[number]


def _value(data: memoryview, at: int, lengths: Sequence[int], place: tuple[int, int, int]) -> memoryview:
    """The bytes of a column of the row whose columns begin ``at``."""
    fixed, variable, size = place
    start = at + fixed + sum(lengths[:variable])
    return data[start : start + (size or lengths[variable])]


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
