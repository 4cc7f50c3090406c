"""MDS shards: the index is checked before anything is read, each shard before its first sample is."""

import json
import logging
import os
import struct
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from numpy.typing import NDArray
from streaming.base.format import FileInfo, Reader
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash, get_hashes, is_hash
from streaming.base.stream import Stream
from streaming.base.world import World

from vitcomposer.schema import ConfigError

log = logging.getLogger(__name__)

INDEX = "index.json"
CLASS_NAMES = "class_names.json"
IMAGE_COLUMNS = ("image", "x")
IMAGE_ENCODINGS = ("bytes", "jpeg", "png", "pil")
LABEL_COLUMNS = ("label", "y", "target")
LABEL_ENCODINGS = ("int", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "str_int")


class ShardError(RuntimeError):
    """A shard that cannot be had or is damaged; the message names shard, cause and remedy."""


class RowReader:
    """Reads encoded image and label of a row; nothing is decoded but the label.

    A ``pil`` column holds raw pixels: they are packed as PNG, which is lossless, so that every sample is a file.
    """

    def __init__(self, shards: list[MDSReader], index: str) -> None:
        columns = {(tuple(s.column_names), tuple(s.column_encodings), tuple(s.column_sizes)) for s in shards}
        if len(columns) != 1:
            raise ConfigError(f"{index}: every shard must have the same columns, got {sorted(map(str, columns))}.")
        names, encodings, self._sizes = columns.pop()
        found = ", ".join(f"{name}: {encoding}" for name, encoding in zip(names, encodings, strict=True))
        if "pkl" in encodings:
            raise ConfigError(
                f"{index}: a column of encoding pkl runs code when it is read and is refused, got columns {found}. "
                "Write the split again with `vitcomposer convert`."
            )
        typed = list(zip(names, encodings, strict=True))
        image = [i for i, (name, enc) in enumerate(typed) if name in IMAGE_COLUMNS and enc in IMAGE_ENCODINGS]
        label = [i for i, (name, enc) in enumerate(typed) if name in LABEL_COLUMNS and enc in LABEL_ENCODINGS]
        if len(image) != 1 or len(label) != 1:
            raise ConfigError(
                f"{index}: one column {' or '.join(IMAGE_COLUMNS)} of encoding {', '.join(IMAGE_ENCODINGS)} and one "
                f"column {', '.join(LABEL_COLUMNS)} of an integer encoding are required, got {found}. "
                "Write the split again with `vitcomposer convert`."
            )
        self._image, self._label = image[0], label[0]
        self._is_pil = encodings[self._image] == "pil"
        self._label_encoding = encodings[self._label]
        self._heads = struct.Struct(f"<{sum(not size for size in self._sizes)}I")

    def read(self, path: str, row: int) -> tuple[bytes, int]:
        """Image file and label of one row. Raises ShardError when the shard ends early, OSError when it is missing."""
        file = os.open(path, os.O_RDONLY)
        try:
            begin, end = struct.unpack("<2I", _exactly(file, 8, 4 + 4 * row))
            lengths = iter(self._heads.unpack(_exactly(file, self._heads.size, begin)))
            at, spans = begin + self._heads.size, []
            for size in self._sizes:
                length = size or next(lengths)
                spans.append((length, at))
                at += length
            if at != end:
                raise ShardError(f"sample {row} ends at byte {at} by its columns, at {end} by the shard's table")
            image, label = _exactly(file, *spans[self._image]), _exactly(file, *spans[self._label])
        finally:
            os.close(file)
        return (_png(image) if self._is_pil else image), int(mds_decode(self._label_encoding, label))


def _exactly(file: int, count: int, offset: int) -> bytes:
    data = os.pread(file, count, offset)
    if len(data) != count:
        raise ShardError(f"the file ends within the {count} bytes at {offset}")
    return data


def _png(pixels: bytes) -> bytes:
    file = BytesIO()
    mds_decode("pil", pixels).save(file, format="PNG", compress_level=1)
    return file.getvalue()


class ShardStream(Stream):
    """A Stream that says what is wrong with its index and hands out no shard of the wrong size or hash.

    Without ``cache_limit`` every shard is checked once per node and run, before its first use: reading it for xxh64
    is a few percent of what decoding its images costs, and leaves it in the page cache. With a limit, shards of
    the cache count as checked when they were downloaded (their size is looked at when a run starts), since checking
    them again would need the eviction that frees their space.
    """

    def __init__(
        self,
        *,
        remote: str | None,
        local: str,
        split: str,
        download_retry: int,
        download_timeout: float,
        validate_hash: str | None,
        trust_cache: bool,
    ) -> None:
        if validate_hash is not None and not is_hash(validate_hash):
            raise ConfigError(
                f"data.validate_hash must be null or one of {', '.join(sorted(get_hashes()))}, got {validate_hash!r}. "
                "Use xxh64."
            )
        try:
            super().__init__(
                remote=remote,
                local=local,
                split=split,
                download_retry=download_retry,
                download_timeout=download_timeout,
            )
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"data.remote must be a location that Streaming reads, got {remote!r}: {error}"
            ) from error
        self.folder = Path(local, split)
        self._algorithm = validate_hash
        self.is_origin = remote is None or os.path.realpath(remote) == os.path.realpath(local)
        self._trust_cache = trust_cache and not self.is_origin

    def uri(self, basename: str) -> str:
        """Where the data set keeps a file: remote, or on disk for a data set without remote."""
        return os.path.join(self.remote or self.local, self.split, basename)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """The shards of the index, which is downloaded when it is not there yet."""
        if not (self.folder / INDEX).exists():
            if self.remote is None:
                raise ConfigError(self._no_split())
            if world.is_local_leader:
                self._fetch_index()
        try:
            # Columns are judged by RowReader: Streaming's own error would tell the user to allow unsafe types.
            shards = super().get_shards(world, allow_unsafe_types=True)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.folder / INDEX} must be the index of an MDS data set, got {type(error).__name__}: {error}. "
                "Delete it if it is a cached copy, else write the split again with `vitcomposer convert`."
            ) from error
        self._check_index(shards)
        return shards

    def _no_split(self) -> str:
        root = Path(self.local)
        if not root.is_dir():
            given = "which does not exist"
        else:
            given = (
                f"where the splits are: {', '.join(sorted(p.parent.name for p in root.glob(f'*/{INDEX}'))) or 'none'}"
            )
        return (
            f"data.local must be a folder with the split {self.split!r}, got {self.local!r}, {given}. "
            "Set data.local, data.train_split and data.val_split, or write the split with `vitcomposer convert`."
        )

    def _fetch_index(self) -> None:
        part = self.folder / f"{INDEX}.tmp"
        part.unlink(missing_ok=True)  # left by a killed run, it would be taken for the whole file
        try:
            self._download_file(INDEX, part.name)
        except Exception as error:  # every object store has its own
            raise ConfigError(
                f"data.remote: {self.uri(INDEX)} cannot be read: {type(error).__name__}: {error}. {_remedy(error)}"
            ) from error
        try:  # before the index appears, which is what the other ranks of this node wait for
            self._downloader.download(self.uri(CLASS_NAMES), str(self.folder / CLASS_NAMES), self.download_timeout)
        except Exception as error:
            log.info("No %s: %s", self.uri(CLASS_NAMES), error)
        part.rename(self.folder / INDEX)

    def _check_index(self, shards: list[Reader]) -> None:
        index = self.folder / INDEX
        if not sum(shard.samples for shard in shards):
            raise ConfigError(f"{index} must list at least one sample, got none. Write it with `vitcomposer convert`.")
        for shard in shards:
            if not isinstance(shard, MDSReader):
                raise ConfigError(f"{index} must list shards of format mds, got {type(shard).__name__}.")
            for name in (shard.raw_data.basename, *([shard.zip_data.basename] if shard.zip_data else [])):
                posix, windows = PurePosixPath(name), PureWindowsPath(name)
                if posix.is_absolute() or windows.is_absolute() or windows.drive or ".." in windows.parts:
                    raise ConfigError(
                        f"{index}: a shard must lie below its folder, got {name!r}. Do not trust this index."
                    )
        if self._algorithm and not all(self._algorithm in shard.file_pairs[0][0].hashes for shard in shards):
            log.warning(
                "%s has no %s of its shards, so damage is found by their size only (data.validate_hash).",
                index,
                self._algorithm,
            )

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Look at the size of every file that is already on this node; runs once per node."""
        for shard in shards:
            present = self._present(shard)
            faults = [fault for info in present if (fault := self._size_fault(info))]
            if self.is_origin and (faults or not present):
                raise self.error(shard, faults[0] if faults else "the file does not exist")
            if faults:
                log.warning("%s is damaged (%s) and is downloaded again.", self.uri(_name(shard)), faults[0])
                shard.evict()
        super().set_up_local(shards, cache_usage_per_shard)
        if not self._trust_cache:
            cache_usage_per_shard[:] = 0  # Streaming takes such a shard for absent: prepare_shard will check it

    def prepare_shard(self, shard: Reader) -> int:
        """Have the shard on disk, complete and with the hash of the index; returns the bytes this added."""
        if self.is_origin and not self._present(shard):
            raise self.error(shard, "the file does not exist")
        try:
            added = super().prepare_shard(shard)
            fault = self._fault(shard)
            if fault and not self.is_origin:
                log.warning("%s is damaged (%s) and is downloaded again.", self.uri(_name(shard)), fault)
                added -= shard.evict()
                added += super().prepare_shard(shard)
                fault = self._fault(shard)
        except Exception as error:  # every object store has its own
            self._forget(shard)
            raise self.error(shard, f"{type(error).__name__}: {error}") from error
        if fault:
            self._forget(shard)
            raise self.error(shard, fault)
        return added

    def _present(self, shard: Reader) -> list[FileInfo]:
        return [info for info in shard.file_pairs[0] if info and (self.folder / info.basename).is_file()]

    def _forget(self, shard: Reader) -> None:
        """A damaged file of the cache would be taken for good by the next run."""
        if not self.is_origin:
            shard.evict()

    def error(self, shard: Reader, fault: str) -> ShardError:
        """The error that names the shard."""
        if self.is_origin:
            remedy = "Restore that file, or write the split again with `vitcomposer convert`."
        else:
            remedy = (
                "Check that the object is there, whole and readable from this machine; data.download_retry and "
                "data.download_timeout set how long to try."
            )
        return ShardError(f"Shard {self.uri(_name(shard))} cannot be read: {fault}. {remedy}")

    def _size_fault(self, info: FileInfo) -> str | None:
        size = (self.folder / info.basename).stat().st_size
        return None if size == info.bytes else f"{info.basename} has {size} bytes, its index says {info.bytes}"

    def _fault(self, shard: Reader) -> str | None:
        info = shard.file_pairs[0][0]
        expected = info.hashes.get(self._algorithm) if self._algorithm else None
        fault = self._size_fault(info)
        if fault or expected is None or self._algorithm is None:
            return fault
        found = get_hash(self._algorithm, (self.folder / info.basename).read_bytes())
        return None if found == expected else f"its {self._algorithm} is {found}, its index says {expected}"


def read_class_names(path: Path) -> list[str] | None:
    """Names of the classes in label order, or None where there is no such file."""
    if not path.is_file():
        return None
    names = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path} must be a list of names, got {type(names).__name__}. Correct or delete it.")
    return names


def _name(shard: Reader) -> str:
    raw, zipped = shard.file_pairs[0]
    return (zipped or raw).basename


def _remedy(error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "credential" in text or "signature" in text or "accessdenied" in text:
        return "Give this machine credentials for it, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
    if "bucket" in text:
        return "Check the name of the bucket, who may read it and, for a store other than AWS, S3_ENDPOINT_URL."
    return "Check data.remote, data.train_split and data.val_split, or write the split with `vitcomposer convert`."
