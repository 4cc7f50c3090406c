"""Looks up a teacher's stored answers to fixed views of every image, in the loader, instead of running the teacher.

A cache holds K crop-sets of a training split, written by ``vitcomposer cache-teacher``. The view of a sample in set s
is the one that an ordinary run with the cache's seed draws in epoch s: it is drawn again when it is needed, and what is
stored of it, seed, crop and flip, only proves that it is the same. The answers are those of a teacher that runs beside
the student, bit for bit where both see batches of one size; else float16 may round to a neighbour::

    CACHE/teacher.json            what it was made from, and the hash of each index
    CACHE/set.0000/index.json     shard.00000.mds ...   rows in the order of the samples
"""

import dataclasses
import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from filelock import FileLock
from numpy.typing import NDArray

from vitcomposer.data.batch import TEACHER_CLASSES, TEACHER_LOGITS, TEACHER_REST, Batch, Sample
from vitcomposer.data.boxes import Box
from vitcomposer.data.mds.reader import MAX_MAPS
from vitcomposer.data.mds.shards import INDEX
from vitcomposer.data.mds.stream import ImageStream
from vitcomposer.data.random import view_seed
from vitcomposer.data.synthetic import SyntheticImages
from vitcomposer.errors import ConfigError, ShardError, require
from vitcomposer.origins import weights_file
from vitcomposer.schema import Distill
from vitcomposer.stores.download import DownloadError, download, open_downloader
from vitcomposer.teacher.rows import bytes_per_row, column_encodings, map_rows, row_dtype

MANIFEST = "teacher.json"
VERSION = 1
SPLIT, WEIGHTS = "data.train_split", "teacher.weights"  # known by the hash of a file

# How often a sample's views come and whether they share a decode: the pixels of a view are the same.
_NOT_PIXELS = ("repeated_augmentation", "shared_decodes", "low_resolution_stages")
_ANOTHER = "or write a cache for this run with `vitcomposer cache-teacher`."


def set_name(crop_set: int) -> str:
    """Folder of a crop-set."""
    return f"set.{crop_set:04}"


def shard_name(number: int) -> str:
    """File in the folder of each crop-set."""
    return f"shard.{number:05}.mds"


def conditions(cfg: Distill) -> dict[str, Any]:
    """Every choice of a yaml that changes a view or the answer to it, by its key.

    Raises:
        ConfigError: Views that cannot be made again.
    """
    augment, teacher = cfg.augment, cfg.teacher
    remedy = "Convert the images first, or set cache=null."
    require(cfg.data.source == "mds", "data.source", "mds with a teacher cache", cfg.data.source, remedy)
    exact = augment.decode_scale == "exact" or not augment.shared_decodes
    rule = "exact with augment.shared_decodes and a teacher cache: shared decodes are exact"
    require(exact, "augment.decode_scale", rule, augment.decode_scale, "Set augment.decode_scale=exact.")
    changing = [field.name for field in dataclasses.fields(augment) if field.name not in _NOT_PIXELS]
    found = {
        "teacher.name": teacher.name,
        "teacher.options": teacher.options,
        "teacher.image_size": teacher.image_size or cfg.model.image_size,
        "teacher.mean": teacher.mean,
        "teacher.std": teacher.std,
        "teacher.precision": teacher.precision or cfg.precision,
        "model.num_classes": cfg.model.num_classes,
        "model.image_size": cfg.model.image_size,
        **{f"augment.{name}": getattr(augment, name) for name in changing},
    }
    return json.loads(json.dumps(found))  # as the manifest holds it


def hash_weights(path: str) -> str | None:
    """What a cache knows of the teacher's file, None where there is no such file."""
    weights = weights_file(path)
    if not weights.is_file():
        return None
    with open(weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_split(dataset: ImageStream | SyntheticImages) -> str:
    """What a cache knows of the images: their order, and through the index every byte."""
    assert isinstance(dataset, ImageStream)
    return hashlib.sha256((dataset.stream.folder / INDEX).read_bytes()).hexdigest()


def compare(before: dict[str, Any], now: dict[str, Any], place: str, otherwise: str = _ANOTHER) -> None:
    """Raise ConfigError for the first key whose value is not the one that the cache at ``place`` was made with."""
    for key, value in now.items():
        made_with = before.get(key)
        hashed = key in (SPLIT, WEIGHTS)
        rule = f"{'of sha256 ' if hashed else ''}{made_with!r} as in the teacher cache {place}"
        remedy = "Use the file that it was made with, " if hashed else f"Set {key}={json.dumps(made_with)}, "
        require(made_with == value, key, rule, value, remedy + otherwise)


def open_cache(cfg: Distill) -> "CachedTeacher":
    """The cache of a run, checked against all of its yaml; a remote one is fetched shard by shard when it is needed.

    Raises:
        ConfigError: There is none, it does not fit the run, or a file of it is missing or cut.
    """
    assert cfg.cache is not None
    now = conditions(cfg)
    weights = hash_weights(cfg.teacher.weights)
    files = _Files(cfg)
    manifest = files.read_manifest()
    if weights is not None:
        now[WEIGHTS] = weights
    compare(manifest["made_from"], now, files.place)
    temperature, stored = cfg.distillation.temperature, manifest["top_k"]
    require(
        temperature == 1 or stored == cfg.model.num_classes,
        "distillation.temperature",
        f"1 with a cache of the {stored} highest logits, since it softens those that are not there too",
        temperature,
        "Set distillation.temperature=1, or write a cache with --top-k all.",
    )
    cached = CachedTeacher(files, manifest, repeats=cfg.augment.repeated_augmentation)
    if dist.get_global_rank() == 0:
        if weights is None:
            file = cfg.teacher.weights
            print(f"{files.place}: teacher.weights={file} is not here, so that the answers are its own is not checked")
        print(f"{files.place}: {cached}")
    return cached


class CachedTeacher:
    """Views and answers of a cache, for ``TrainCollate``. Which set a sample is of follows from its epoch and copy."""

    def __init__(self, files: "_Files", manifest: dict[str, Any], *, repeats: int) -> None:
        self._files, self._manifest, self._repeats = files, manifest, repeats
        self._seed, self.crop_sets = manifest["seed"], manifest["crop_sets"]
        self._top_k, self._rows = manifest["top_k"], manifest["shard_images"]
        self._dtype = row_dtype(self._top_k)
        self._entries = [files.read_index(s, manifest) for s in range(self.crop_sets)]
        self._mapped: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()

    def __str__(self) -> str:
        return (
            f"{self.crop_sets} crop-sets, the {self._top_k} highest logits of "
            f"{self._manifest['made_from']['model.num_classes']}, {bytes_per_row(self._top_k)} bytes a view; "
            f"{describe_epochs(self.crop_sets, self._repeats)}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": OrderedDict()}  # maps belong to one process

    def check_data(self, dataset: ImageStream | SyntheticImages) -> None:
        """Raise ConfigError unless these are the images that the cache is of."""
        compare(self._manifest["made_from"], {SPLIT: hash_split(dataset)}, self._files.place)

    def seed(self, sample: Sample) -> int:
        """Of the sample's view in the set whose turn it is."""
        return view_seed(self._seed, self._crop_set(sample), sample["sample_id"], 0)

    def columns(self, samples: list[Sample], seeds: list[int], boxes: list[Box], flips: NDArray[np.bool_]) -> Batch:
        """The teacher's answers to these views.

        Raises:
            ShardError: A shard that cannot be had, or views that are not those that the teacher saw.
        """
        rows = np.empty(len(samples), self._dtype)
        for i, sample in enumerate(samples):
            crop_set, sample_id = self._crop_set(sample), sample["sample_id"]
            number, row = divmod(sample_id, self._rows)
            shard = self._mapped.get((crop_set, number))
            rows[i] = (self._map(crop_set, number) if shard is None else shard)[row]
        same = rows["sample_id"] == [sample["sample_id"] for sample in samples]
        same &= (rows["view_seed"] == np.array(seeds, np.uint64)) & (rows["flip"] == flips)
        same &= (rows["box"] == boxes).all(axis=1)
        if not same.all():
            at = int(np.argmin(same))
            sample, crop_set = samples[at]["sample_id"], set_name(self._crop_set(samples[at]))
            raise ShardError(
                f"The view of sample {sample} must be that of {crop_set} in {self._files.place}, whose crop is "
                f"{rows['box'][at].tolist()}, but {list(boxes[at])} was drawn. The cache was written by another "
                "version of vitcomposer: write it again."
            )
        return {
            TEACHER_CLASSES: torch.from_numpy(rows["classes"].astype(np.int32)),
            TEACHER_LOGITS: torch.from_numpy(rows["logits"].astype(np.float16)),
            TEACHER_REST: torch.from_numpy(rows["rest"].astype(np.float32)),
        }

    def _crop_set(self, sample: Sample) -> int:
        return (sample["epoch"] * self._repeats + sample["copy"]) % self.crop_sets

    def _map(self, crop_set: int, number: int) -> NDArray[Any]:
        rows = self._files.read_rows(crop_set, self._entries[crop_set][number], self._dtype)
        self._mapped[crop_set, number] = rows
        if len(self._mapped) > MAX_MAPS:
            self._mapped.popitem(last=False)
        return rows


def describe_epochs(crop_sets: int, repeats: int) -> str:
    """How long a run sees a view for the first time."""
    divided = f" ({crop_sets} / augment.repeated_augmentation={repeats})" if repeats > 1 else ""
    return f"views come again after {crop_sets / repeats:.3g} epochs{divided}"


class _Files:
    """The files of a cache on this node, those of a remote one fetched once and checked by size and hash."""

    def __init__(self, cfg: Distill) -> None:
        assert cfg.cache is not None
        self._folder, self._remote = Path(cfg.cache.local), cfg.cache.remote
        self._retries, self._timeout = cfg.data.download_retry, cfg.data.download_timeout
        self.place = self._remote or str(self._folder)

    def read_manifest(self) -> dict[str, Any]:
        """Fetched at every start where there is a remote: a cache may have got more crop-sets since."""
        try:
            if self._remote is not None:
                with self._lock("."):
                    self._fetch(MANIFEST)
            manifest = json.loads((self._folder / MANIFEST).read_bytes())
        except Exception as error:  # every object store has its own
            if isinstance(error, FileNotFoundError) or isinstance(error, DownloadError) and error.missing:
                key = "cache.local" if self._remote is None else "cache.remote"
                remedy = "Write one with `vitcomposer cache-teacher`; one that was broken off is finished by that."
                raise ConfigError(f"{key} must hold {MANIFEST}, got {self.place!r}. {remedy}") from None
            raise ConfigError(f"{self.place}/{MANIFEST} cannot be read: {_cause(error)}.") from error
        written = manifest.get("version") if isinstance(manifest, dict) else None
        rule = f"of format {VERSION}, which this version reads"
        require(written == VERSION, f"{self.place}/{MANIFEST}", rule, written, "Write the cache again.")
        return manifest

    def read_index(self, crop_set: int, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        """Entries of the shards of a set, by number."""
        name, expected = f"{set_name(crop_set)}/{INDEX}", manifest["indexes"][crop_set]
        try:
            if not self._has_hash(name, expected) and self._remote is not None:
                with self._lock(set_name(crop_set)):
                    if not self._has_hash(name, expected):
                        self._fetch(name)
        except Exception as error:  # every object store has its own
            raise ConfigError(f"{self.place}/{name} cannot be read: {_cause(error)}.") from error
        if not self._has_hash(name, expected):
            raise ConfigError(f"{self.place}/{name} is missing or is not that of its {MANIFEST}. {self._remedy(name)}")
        entries = json.loads((self._folder / name).read_bytes())["shards"]
        encodings = list(column_encodings(manifest["top_k"]).values())
        assert all(entry["column_encodings"] == encodings for entry in entries), "the manifest vouches for the index"
        if self._remote is None:
            for entry in entries:
                self._check_size(crop_set, entry["raw_data"])
        return entries

    def read_rows(self, crop_set: int, entry: dict[str, Any], dtype: np.dtype) -> NDArray[Any]:
        """The rows of a shard, brought to this node where they are not or are damaged.

        Raises:
            ShardError: It cannot be had.
        """
        name = f"{set_name(crop_set)}/{entry['raw_data']['basename']}"
        path = self._folder / name
        try:
            return map_rows(path, entry, dtype)
        except (ValueError, OSError) as error:
            if self._remote is None:
                raise self._error(name, error) from error
        with self._lock(set_name(crop_set)):
            try:
                return map_rows(path, entry, dtype)  # another process may have brought it
            except (ValueError, OSError):
                pass
            try:
                self._fetch(name)
                return map_rows(path, entry, dtype)
            except Exception as error:  # every object store has its own
                path.unlink(missing_ok=True)
                raise self._error(name, error) from error

    def _check_size(self, crop_set: int, raw: dict[str, Any]) -> None:
        path = self._folder / set_name(crop_set) / raw["basename"]
        size = path.stat().st_size if path.is_file() else None
        if size != raw["bytes"]:
            fault = "it does not exist" if size is None else f"it has {size} bytes, its index says {raw['bytes']}"
            name = f"{set_name(crop_set)}/{raw['basename']}"
            raise ConfigError(str(self._error(name, ValueError(fault))))

    def _has_hash(self, name: str, expected: str) -> bool:
        path = self._folder / name
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == expected

    def _error(self, name: str, fault: Exception) -> ShardError:
        return ShardError(
            f"Shard {self.place}/{name} of the teacher cache cannot be read: {_cause(fault)}. {self._remedy(name)}"
        )

    def _remedy(self, name: str) -> str:
        if self._remote is not None:
            return "Check that the object is there, whole and readable from this machine."
        return f"Delete {name} and call `vitcomposer cache-teacher` as before: it writes what is missing."

    def _lock(self, folder: str) -> FileLock:
        place = self._folder / folder
        place.mkdir(parents=True, exist_ok=True)
        return FileLock(place / ".lock")

    def _fetch(self, name: str) -> None:
        """Download a file beside its place and move it there."""
        assert self._remote is not None
        path = self._folder / name
        source, downloader = os.path.join(self._remote, name), open_downloader(self._remote)
        download(downloader, source, path, retries=self._retries, timeout=self._timeout)


def _cause(fault: Exception) -> str:
    return str(fault) if type(fault) in (ValueError, DownloadError) else f"{type(fault).__name__}: {fault}"
