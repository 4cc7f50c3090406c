"""Opens MDS shards: the index is checked before anything is read, each shard before its first sample is."""

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.constant import TICK
from streaming.base.format import FileInfo, Reader
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hashes, is_hash
from streaming.base.util import wait_for_file_to_exist
from streaming.base.world import World

from vitcomposer.data.mds.index import CLASS_NAMES, INDEX, index_fault, no_split
from vitcomposer.data.mds.small_column import largest_view, small_side
from vitcomposer.data.mds.unpack import unpack
from vitcomposer.errors import ConfigError, ShardError
from vitcomposer.foundations import transfer_with
from vitcomposer.json_file import MOST_BYTES, read_json
from vitcomposer.schema import Data
from vitcomposer.stores.addresses import masked
from vitcomposer.stores.download import DownloadError, download, longest_wait, open_downloader, remove_parts

log = logging.getLogger(__name__)


class ShardStream(Stream):
    """A Stream that says what is wrong with its index and hands out no shard of the wrong size or hash.

    Without ``cache_limit`` every shard is checked once per node and run, before its first use: reading it for xxh64
    costs 4 % of what decoding its images does, and leaves it in the page cache. With a limit, shards of
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
            self.downloader = open_downloader(remote)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"data.remote must be a location that Streaming reads, got {remote!r}: {error}"
            ) from error
        transfer_with(self, self._fetch, self._unpack)
        self.folder = Path(local, split)
        self._algorithm = validate_hash
        self._raw_sizes: dict[str, int] = {}
        self._most_bytes: dict[str, int] = {}
        self.is_origin = remote is None or os.path.realpath(remote) == os.path.realpath(local)
        self._trust_cache = trust_cache and not self.is_origin

    def uri(self, basename: str) -> str:
        """Where the data set keeps a file: remote, or on disk for a data set without remote."""
        return os.path.join(self.remote or self.local, self.split, basename)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """The shards of the index, which is downloaded when it is not there yet."""
        if not (self.folder / INDEX).exists():
            if self.remote is None:
                raise ConfigError(no_split(self.local, self.split))
            if world.is_local_leader:
                self._fetch_index()
            else:  # before Streaming's own look, which gives the leader the time of one try
                self._await_index()
        try:
            if fault := index_fault(read_json(self.folder / INDEX)):
                raise ValueError(fault)
            # Columns are judged by RowReader: Streaming's own error would tell the user to allow unsafe types.
            shards = super().get_shards(world, allow_unsafe_types=True)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{self.folder / INDEX} must be the index of an MDS data set: {error or type(error).__name__}. "
                "Delete it if it is a cached copy, else write the split again with `vitcomposer convert`."
            ) from error
        self._check_index(shards)
        pairs = [shard.file_pairs[0] for shard in shards]
        self._raw_sizes = {zipped.basename: raw.bytes for raw, zipped in pairs if zipped}
        # What is a little larger than its index says is told as damage, what never ends is not waited for.
        self._most_bytes = {info.basename: 2 * info.bytes + MOST_BYTES for pair in pairs for info in pair if info}
        return shards

    def _fetch_index(self) -> None:
        for name in (CLASS_NAMES, INDEX):  # in this order: the other ranks of this node go on when they see the index
            try:
                self._fetch(name)
            except DownloadError as error:
                # A store that did not answer for the first is not asked for the second, as often and as long again.
                if name == INDEX or not error.was_answered:
                    with suppress(OSError):  # a start that is refused leaves no empty folders
                        self.folder.rmdir()
                        Path(self.local).rmdir()
                    raise ConfigError(
                        f"data.remote: {self.uri(name)} cannot be read: {error}. {_remedy(error)}"
                    ) from error
                log.log(logging.INFO if error.missing else logging.WARNING, "No %s: %s", self.uri(name), error)

    def _await_index(self) -> None:
        # The class names may take as long.
        wait = 2 * longest_wait(self.download_retry, self.download_timeout)
        wait_for_file_to_exist(
            str(self.folder / INDEX), TICK, wait, f"{self.uri(INDEX)} did not come to this node in {wait:.0f} s."
        )

    def _fetch(self, basename: str) -> str:
        """Instead of Streaming's: a file appears whole, and is not asked for again where that can't help."""
        local = self.folder / basename
        if not local.exists():
            local.parent.mkdir(parents=True, exist_ok=True)
            download(
                self.downloader,
                self.uri(basename),
                local,
                retries=self.download_retry,
                timeout=self.download_timeout,
                most=self._most_bytes.get(basename, MOST_BYTES),
            )
        return str(local)

    def _unpack(self, zip_info: FileInfo, zip_filename: str, raw_filename: str, compression: str | None) -> None:
        """Instead of Streaming's, which unpacks whatever is in there."""
        path, size = Path(zip_filename), self._raw_sizes[zip_info.basename]
        if fault := self._size_fault(zip_info):
            raise ValueError(fault)
        part = Path(raw_filename + ".tmp")
        part.write_bytes(unpack(compression or "", path.read_bytes(), size))
        part.replace(raw_filename)
        if not self.safe_keep_zip:
            path.unlink()

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
        if not self.is_origin:
            remove_parts(self.folder)
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
        except DownloadError as error:
            self._forget(shard)
            raise self.error(shard, str(error), error.remedy) from error
        except Exception as error:  # among them a disk that is full
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

    def error(self, shard: Reader, fault: str, remedy: str | None = None) -> ShardError:
        """The error that names the shard."""
        if self.is_origin:
            remedy = "Restore that file, or write the split again with `vitcomposer convert`."
        remedy = remedy or "Check that the object is there, whole and readable from this machine."
        return ShardError(f"Shard {masked(self.uri(_name(shard)))} cannot be read: {fault}. {remedy}")

    def _size_fault(self, info: FileInfo) -> str | None:
        size = (self.folder / info.basename).stat().st_size
        return None if size == info.bytes else f"{info.basename} has {size} bytes, its index says {info.bytes}"

    def _fault(self, shard: Reader) -> str | None:
        info = shard.file_pairs[0][0]
        expected = info.hashes.get(self._algorithm) if self._algorithm else None
        fault = self._size_fault(info)
        if fault or expected is None or self._algorithm is None:
            return fault
        found = _hash(self._algorithm, self.folder / info.basename)
        return None if found == expected else f"its {self._algorithm} is {found}, its index says {expected}"


def read_class_names(path: Path) -> list[str] | None:
    """Names of the classes in label order, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        names = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} must be a list of names in JSON: {error}. Correct or delete it.") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path} must be a list of names, got {type(names).__name__}. Correct or delete it.")
    return names


def images_of(data: Data, split: str) -> dict[str, Any] | None:
    """What tells the images of a split from others, wherever they lie; None where its index is not here.

    Args:
        split: ``data.train_split`` or ``data.val_split``.

    Returns:
        ``source``; ``samples``; ``classes``, the names in label order or None; ``index``, its sha256 or None; ``exif``,
        "apply" where ``vitcomposer convert`` had its images turned upright, else "keep"; ``image_small``, the pixels
        of the largest view that is cut from that column, and None where there is none.

    Raises:
        ConfigError: A class_names.json that is no list of names.
    """
    if data.source == "synthetic":
        return {"source": data.source, "samples": data.synthetic_samples, "classes": None, "index": None}
    folder = Path(data.local or "", split)
    try:
        index = read_json(folder / INDEX)
        samples = sum(shard["samples"] for shard in index["shards"])
    except (OSError, ValueError, KeyError, TypeError):  # said by whoever reads its images
        return None
    classes = read_class_names(folder / CLASS_NAMES)
    with (folder / INDEX).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    exif = "apply" if index.get("exif") == "apply" else "keep"
    side = small_side(index)
    return {
        "source": data.source,
        "samples": samples,
        "classes": classes,
        "index": digest,
        "exif": exif,
        "image_small": None if side is None else largest_view(side),
    }


def _hash(algorithm: str, path: Path) -> str:
    """What streaming.base.hashing.get_hash says of the whole file, without holding it: a third of the time."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, getattr(hashlib, algorithm, None) or getattr(xxhash, algorithm)).hexdigest()


def _name(shard: Reader) -> str:
    raw, zipped = shard.file_pairs[0]
    return (zipped or raw).basename


def _remedy(error: DownloadError) -> str:
    text = f"{type(error.__cause__).__name__} {error}".lower()
    if "credential" in text or "signature" in text or "accessdenied" in text:
        return "Give this machine credentials for it, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
    if "bucket" in text:
        return "Check the name of the bucket, who may read it and, for a store other than AWS, S3_ENDPOINT_URL."
    if error.missing:
        return "Check data.remote, data.train_split and data.val_split, or write the split with `vitcomposer convert`."
    return error.remedy


def describe_cut_shard(folder: Path) -> str | None:
    """The first shard of a split on disk that is shorter than its index says, for a message; None where none is."""
    try:
        shards = read_json(folder / INDEX)["shards"]
        stored = {each["basename"]: each["bytes"] for each in (shard["raw_data"] for shard in shards)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    for name, size in stored.items():
        path = folder / name
        if path.is_file() and (found := path.stat().st_size) < size:
            return f"{path} has {found:,} bytes, its index says {size:,}"
    return None
