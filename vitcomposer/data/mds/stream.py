"""Streams training and evaluation samples from MDS shards, on disk or on an object store."""

import multiprocessing
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from ctypes import c_bool, c_char
from dataclasses import dataclass
from time import time_ns
from typing import Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.format.mds.reader import MDSReader
from streaming.base.world import World

from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.mds.bad_images import BadImages
from vitcomposer.data.mds.balance import Balance
from vitcomposer.data.mds.cache import prepare_within_limit
from vitcomposer.data.mds.fetch_ahead import FetchAhead
from vitcomposer.data.mds.order import PADDING, Layout, Shuffle, arrange, steps_before
from vitcomposer.data.mds.reader import Row, RowReader
from vitcomposer.data.mds.shards import INDEX, ShardStream
from vitcomposer.data.mds.shared_memory import lock_in_memory, one_start_at_a_time
from vitcomposer.errors import ConfigError, ShardError
from vitcomposer.foundations import (
    access_times,
    begin_epoch,
    cache_lock,
    open_locks,
    rank_of,
    shard_codes,
    shard_states,
    wait_for_workers,
)

_REMOTE, _PREPARING, _LOCAL = shard_codes()
_RETRIES = 7  # how often a shard may be evicted before a sample of it is read
_CHUNK = 64  # samples between two looks at failures and evictions, less than a tenth of a second of decoding
_CHUNKS_PER_CHECK = 16  # of the mapped files, a microsecond each, and of whether their pages are in memory


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How shards are fetched and mixed; the fields are those of the block ``data`` in a yaml."""

    cache_limit: str | None = None  # such as 200gb; no effect on a data set without remote
    predownload: int | None = None  # samples
    download_retry: int = 5
    download_timeout: float = 60.0  # seconds
    validate_hash: str | None = "xxh64"
    num_canonical_nodes: int | None = None  # null: the number of nodes
    shuffle_block_size: int | None = None  # samples
    max_bad_fraction: float = 0.0  # of the images


class _Failure:
    """The first failure among the loader processes of a rank. Must be made before the workers are forked.

    Streaming's own Event is one per process, which leaves the other workers waiting for a shard that nobody brings.
    """

    def __init__(self) -> None:
        self._failed = multiprocessing.RawValue(c_bool, False)
        self._text = multiprocessing.Array(c_char, 8192)

    def record(self, message: str) -> None:
        with self._text.get_lock():
            if not self._failed.value:
                self._text.value = message.encode()[:8000]
                self._failed.value = True

    def raise_if_set(self) -> None:
        if self._failed.value:
            raise ShardError(self._text.value.decode(errors="replace"))


class ImageStream(StreamingDataset):
    """One split of an MDS data set. Yields ``image``, ``label``, ``sample_id``, ``copy``, ``epoch``, ``step``.

    ``image`` is an encoded file or a raw sample, as bytes or as memoryview of the mapped shard, as is ``image_small``
    where the split has it with its ``small_side`` (see ``small_column``); else it is None. Order, resumption,
    downloads and eviction are Streaming's; samples are read without its locks, and without any thread once all
    shards are here and no ``cache_limit`` can take them away. ``step`` is Composer's ``timestamp.batch`` of the batch
    that the sample is for, where the loader drops short batches.

    Never ends an epoch short and never waits for a shard that failed: it raises ShardError, in all loader
    processes of the rank. Other ranks of the node notice when their DataLoader's timeout or the launcher ends them.
    Without ``shuffle`` (evaluation) samples repeated to give all ranks equal work have IGNORE_LABEL.

    Args:
        local: Folder with the splits, or the cache of ``remote``.
        batch_size: Per rank, the DataLoader's.
        repeats: Views of a sample in an epoch (repeated augmentation); see ``order.arrange``.
        shared_decodes: The views of a sample are neighbours in a batch; see ``order.arrange``.
        low_resolution: Take the image from the column ``image_small``.
    """

    def __init__(  # noqa: PLR0913 (all are named at the call)
        self,
        *,
        local: str,
        split: str,
        batch_size: int,
        shuffle: bool,
        seed: int,
        remote: str | None = None,
        repeats: int = 1,
        shared_decodes: bool = False,
        low_resolution: bool = False,
        options: StreamOptions | None = None,
    ) -> None:
        options = options or StreamOptions()
        self.stream = ShardStream(
            remote=remote,
            local=local,
            split=split,
            download_retry=options.download_retry,
            download_timeout=options.download_timeout,
            validate_hash=options.validate_hash,
            trust_cache=options.cache_limit is not None,
        )
        with one_start_at_a_time():
            super().__init__(
                streams=[self.stream],
                # Eviction deletes files, which is only right in a cache.
                cache_limit=None if self.stream.is_origin else options.cache_limit,
                predownload=max(options.predownload or 8 * batch_size, batch_size),
                num_canonical_nodes=options.num_canonical_nodes or World.detect().num_nodes,
                batch_size=batch_size,
                shuffle=shuffle,
                shuffle_seed=seed,
                shuffle_block_size=options.shuffle_block_size,
            )
            lock_in_memory(self)
        self._check_nodes()
        self.repeats, self.shared_decodes = repeats, shared_decodes
        self.balance: Balance | None = None  # to be set before the loader starts its workers
        self._ends = np.cumsum(self.samples_per_shard)
        index = str(self.stream.folder / INDEX)
        self._rows = RowReader(cast(list[MDSReader], self.shards), self.stream.folder, index, low_resolution)
        self.small_side = self._rows.small_side
        address = remote or local
        self.bad = BadImages(
            self.num_samples,
            options.max_bad_fraction,
            split=os.path.join(address, split),
            remedy=f"`vitcomposer inspect {address} --split {split} --decode`",
        )
        self._epoch = 0
        self._pid: int | None = None
        self._failure = _Failure()
        self._ahead: FetchAhead | None = None
        # Forked workers would share the connection that fetched the index.
        self.stream.downloader.clean_up()

    def _check_nodes(self) -> None:
        canonical, nodes = self.num_canonical_nodes or 1, rank_of(self).num_nodes
        if canonical % nodes and nodes % canonical or canonical > self.num_samples:
            raise ConfigError(
                f"data.num_canonical_nodes must divide the {nodes} nodes or be a multiple of them, and not exceed the "
                f"{self.num_samples} samples, got {canonical}. Leave it out."
            )

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch."""
        return self._layout(rank_of(self)).samples_per_rank(self.num_samples)

    def _layout(self, world: World) -> Layout:
        assert self.batch_size is not None
        return Layout(
            nodes=world.num_nodes,
            ranks_per_node=world.ranks_per_node,
            workers_per_rank=world.workers_per_rank,
            batch_size=self.batch_size,
            canonical_nodes=self.num_canonical_nodes or world.num_nodes,
            initial_nodes=self.initial_physical_nodes,
        )

    def _ids_of_worker(self, epoch: int, first: int) -> NDArray[np.int64]:
        """Virtual ids of this worker: each computes the whole order, which is quicker than sharing it safely."""
        world = self._worker
        block = self.shuffle_block_size or 1 << 18
        shuffle = Shuffle(seed=self.shuffle_seed, block_size=block, balance=self.balance)
        plan = arrange(
            self.samples_per_shard,
            self._layout(world),
            epoch=epoch,
            first=first,
            shuffle=shuffle if self.shuffle else None,
            repeats=self.repeats,
            shared_decodes=self.shared_decodes,
        )
        self._epoch = epoch
        # Nobody may ask for the next epoch before the leader has counted it.
        wait_for_workers(self, world.workers_per_node)
        return plan[world.node, world.rank_of_node, world.worker_of_rank].flatten()

    def _locate(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Shard, row, sample_id and copy of virtual ids."""
        copies, ids = np.divmod(ids, self.num_samples)
        shards = np.searchsorted(self._ends, ids, side="right")
        return shards, ids - (self._ends - self.samples_per_shard)[shards], ids, copies

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sample of a virtual id, waiting for its shard; of no batch, so its step is 0."""
        shard, row, sample_id, copy = (int(value[0]) for value in self._locate(np.array([at])))
        return self._sample(self._read(shard, row), sample_id, copy, self._epoch, 0)

    def _sample(self, row: Row, sample_id: int, copy: int, epoch: int, step: int) -> dict[str, Any]:
        if copy and not self.shuffle:
            copy, row = 0, row._replace(label=IGNORE_LABEL)
        return {**row._asdict(), "sample_id": sample_id, "copy": copy, "epoch": epoch, "step": step}

    def replace(self, samples: list[dict[str, Any]], error: ValueError) -> list[dict[str, Any]]:
        """For views of a sample that cannot be decoded, those of the next one of the split, in the same epoch.

        The rule knows neither worker nor rank nor what was read before, so batches stay the same with any number of
        them and after a resume; and the next sample almost always lies in the same shard, which is here.

        Raises:
            ConfigError: More than ``options.max_bad_fraction`` of the images are bad.
            ShardError: The next one cannot be had.
        """
        bad = samples[0]["sample_id"]
        first = samples[0].get("stands_for", bad)
        following = (bad + 1) % self.num_samples
        self.bad.add(bad, self.place(bad), str(error), f"Sample_id {following} stands in for it.")
        if following == first:
            self._fail(ShardError(f"No image of {self.bad.split} can be decoded. Write it again."))
        shard, row, *_ = (int(value[0]) for value in self._locate(np.array([following])))
        found = {**self._read(shard, row)._asdict(), "sample_id": following, "stands_for": first}
        return [{**sample, **found} for sample in samples]

    def skip(self, sample: dict[str, Any], error: ValueError) -> None:
        """Count a sample that cannot be decoded and that evaluation goes on without.

        Raises:
            ConfigError: As :meth:`replace`.
        """
        sample_id = sample["sample_id"]
        self.bad.add(sample_id, self.place(sample_id), str(error), "It is left out of the evaluation.")

    def rows_on_disk(self, ids: NDArray[np.int64]) -> Iterator[Row | None]:
        """What shards that are here say, before anything of them is checked; None where one cannot be read."""
        shards, rows, *_ = self._locate(ids)
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            try:
                yield self._rows.read(shard, row)
            except (OSError, ShardError, ValueError):  # reading it in earnest will tell
                yield None

    def describe(self, sample_id: int) -> str:
        """Where a sample lies, with its split."""
        return f"{self.bad.split}/{self.place(sample_id)} (sample_id {sample_id})"

    def place(self, sample_id: int) -> str:
        """Shard of a sample and its row there."""
        shard, row, *_ = (int(value[0]) for value in self._locate(np.array([sample_id])))
        return f"{self.shards[shard].file_pairs[0][0].basename}, sample {row}"

    def _read(self, shard_id: int, row: int) -> Row:
        """Image and label of a row, bringing the shard back where it is not here or not checked yet."""
        for _ in range(1 + _RETRIES):
            if shard_states(self)[shard_id] != _LOCAL:
                self.prepare_shard(shard_id)
            try:
                return self._rows.read(shard_id, row)
            except FileNotFoundError:
                self.prepare_shard(shard_id)
            except Exception as error:
                if shard_states(self)[shard_id] == _LOCAL:  # else it was evicted meanwhile
                    self._fail(self.stream.error(self.shards[shard_id], str(error)), error)
        fault = "it is gone each time it is read"
        remedy = "Raise data.cache_limit" if self.cache_limit else "Find what deletes it"
        self._fail(ShardError(f"{self.stream.error(self.shards[shard_id], fault)} {remedy}."))

    def _fail(self, failure: ShardError, cause: BaseException | None = None) -> NoReturn:
        self._failure.record(str(failure))
        raise failure from cause

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Have a shard on disk; not blocking, skip it while another process is at it."""
        if not blocking and shard_states(self)[shard_id] == _LOCAL:
            # Streaming's own takes a lock first, which all workers of the node share. Should the shard be evicted
            # before it is read, reading it finds out.
            access_times(self)[shard_id] = time_ns()
            return
        self._failure.raise_if_set()
        self._enter_process()
        try:
            check, download, prepare = self._failure.raise_if_set, self.stream.prepare_shard, super().prepare_shard
            if self.cache_limit:
                prepare_within_limit(self, shard_id, download, prepare, may_wait=blocking, check=check)
            else:
                prepare(shard_id, blocking)
        except Exception as error:
            if shard_states(self)[shard_id] == _PREPARING:
                shard_states(self)[shard_id] = _REMOTE
            if cache_lock(self).is_locked:  # it failed while it evicted
                cache_lock(self).release(force=True)
            if isinstance(error, ShardError):
                self._fail(error)
            self._fail(self.stream.error(self.shards[shard_id], f"{type(error).__name__}: {error}"), error)

    def _prepare_ahead(self, shard_id: int) -> None:
        try:
            self.prepare_shard(shard_id, blocking=False)
        except Exception as error:  # what a thread raises reaches nobody
            self._failure.record(str(error) if isinstance(error, ShardError) else f"{type(error).__name__}: {error}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This worker's samples of the next epoch, or the rest of the one that was resumed.

        A generator, for what iter() raises kills a persistent worker of torch, and its message with it.
        """
        self._failure.raise_if_set()
        self._enter_process()
        self._worker, epoch, first = begin_epoch(self)
        plan = self._ids_of_worker(epoch, first)
        plan = plan[plan != PADDING]
        steps = self._steps(len(plan), epoch, first)
        assert self.predownload is not None
        chunk = max(1, min(_CHUNK, self.predownload // 2))
        ahead = self._begin_ahead(np.searchsorted(self._ends, plan % self.num_samples, side="right"))
        faults, cold_until = -1, 0
        try:
            for begin in range(0, len(plan), chunk):
                self._failure.raise_if_set()
                if ahead:
                    ahead.advance(begin)
                if self.cache_limit:
                    self._rows.forget(shard_states(self) != _LOCAL)
                if begin % (_CHUNKS_PER_CHECK * chunk) == 0:
                    self._rows.forget_changed()
                if (seen := resource.getrusage(resource.RUSAGE_SELF).ru_majflt) != faults:
                    faults, cold_until = seen, begin + _CHUNKS_PER_CHECK * chunk
                places = slice(begin, begin + chunk)
                yield from self._chunk(plan[places], epoch, steps[places], is_cold=begin < cold_until)
        finally:  # an epoch that is broken off leaves no thread behind, and no deleted file on the disk
            if ahead:
                ahead.stop()
            if self.cache_limit:
                self._rows.forget(np.ones(self.num_shards, bool))

    def _steps(self, count: int, epoch: int, first: int) -> NDArray[np.int64]:
        """Steps of this worker's ``count`` samples: the loader takes a batch of each worker in turn."""
        world, batch_size = self._worker, self.batch_size
        assert batch_size is not None
        done = steps_before(epoch, first, samples_per_rank=len(self), batch_size=batch_size, ranks=world.num_ranks)
        return done + world.worker_of_rank + np.arange(count) // batch_size * world.workers_per_rank

    def _begin_ahead(self, shards: NDArray[np.int64]) -> FetchAhead | None:
        if self._ahead:
            self._ahead.stop()
        assert self.predownload is not None
        is_needed = self.cache_limit or np.any(shard_states(self)[shards] != _LOCAL)
        window = self.predownload + 1
        self._ahead = FetchAhead(self._prepare_ahead, shards.astype(np.int32), window) if is_needed else None
        return self._ahead

    def _chunk(
        self, ids: NDArray[np.int64], epoch: int, steps: NDArray[np.int64], is_cold: bool
    ) -> Iterator[dict[str, Any]]:
        states, read = shard_states(self).data, self._rows.read
        times = access_times(self) if self.cache_limit else None
        shards, rows, sample_ids, copies = (values.tolist() for values in self._locate(ids))
        if is_cold:
            self._fetch([place for place in zip(shards, rows, strict=True) if states[place[0]] == _LOCAL])
        for shard, row, sample_id, copy, step in zip(shards, rows, sample_ids, copies, steps.tolist(), strict=True):
            try:
                found = read(shard, row) if states[shard] == _LOCAL else self._read(shard, row)
            except Exception:  # among them that the file is gone
                found = self._read(shard, row)
            if times is not None:
                times[shard] = time_ns()
            yield self._sample(found, sample_id, copy, epoch, step)

    def _fetch(self, places: list[tuple[int, int]]) -> None:
        for shard, row in places:
            with suppress(OSError, ShardError):  # reading finds it again
                self._rows.fetch(shard, row)

    def _enter_process(self) -> None:
        """Drop what does not survive a fork: locks, and threads of an epoch that was begun before it."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        self._ahead = None
        open_locks(self)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint keeps. Between two epochs, where Composer counts 0 samples, it names the coming one."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state
