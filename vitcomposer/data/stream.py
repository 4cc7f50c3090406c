"""Training and evaluation samples from MDS shards, on disk or on an object store."""

import itertools
import multiprocessing
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from ctypes import c_bool, c_char
from dataclasses import dataclass
from pathlib import Path
from time import sleep, time_ns
from typing import Any, NoReturn, cast

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.constant import CACHE_FILELOCK, TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.distributed import get_local_rank
from streaming.base.format.mds.reader import MDSReader
from streaming.base.shared import prefix
from streaming.base.spanner import Spanner
from streaming.base.world import World

from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.order import PADDING, Layout, Shuffle, arrange
from vitcomposer.data.shards import INDEX, RowReader, ShardError, ShardStream
from vitcomposer.schema import ConfigError


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How shards are fetched and mixed; the fields are those of the block ``data`` in a yaml."""

    cache_limit: str | None = None  # such as 200gb; no effect on a data set without remote
    predownload: int | None = None  # samples
    download_retry: int = 2
    download_timeout: float = 60.0  # seconds
    validate_hash: str | None = "xxh64"
    num_canonical_nodes: int | None = None  # null: the number of nodes
    shuffle_block_size: int | None = None  # samples


class _Failure:
    """The first failure among the loader processes of a rank, in the shape of the Event that Streaming asks.

    Must be made before the workers are forked. Streaming's own Event is one per process, which leaves the other
    workers waiting for a shard that nobody will bring.
    """

    def __init__(self) -> None:
        self._failed = multiprocessing.RawValue(c_bool, False)
        self._text = multiprocessing.Array(c_char, 8192)

    def is_set(self) -> bool:
        return self._failed.value

    def set(self) -> None:
        self.record("A loader process failed; its own message is above.")

    def record(self, message: str) -> None:
        with self._text.get_lock():
            if not self._failed.value:
                self._text.value = message.encode()[:8000]
                self._failed.value = True

    def raise_if_set(self) -> None:
        if self.is_set():
            raise ShardError(self._text.value.decode(errors="replace"))


class _VirtualSpanner(Spanner):
    """Shard and row of a virtual id: Streaming's threads look every id up before it is read."""

    def __init__(self, shard_sizes: NDArray[np.int64]) -> None:
        super().__init__(shard_sizes)
        self._ends = np.cumsum(shard_sizes).tolist()
        self._begins = [0, *self._ends[:-1]]

    def __getitem__(self, index: int) -> tuple[int, int]:
        sample_id = int(index) % self._ends[-1]
        shard = bisect_right(self._ends, sample_id)
        return shard, sample_id - self._begins[shard]


@contextmanager
def one_start_at_a_time() -> Iterator[None]:
    """Let the runs of a machine set up their StreamingDatasets one after the other.

    Streaming looks for a free name in shared memory and takes it in a second step, so two runs that start together can
    choose the same. Its ranks look on their own: they wait until their leader holds the lock. After a minute it goes
    on without, since two runs that share several nodes could wait for each other. Each node of a run looks from a
    number of its own, so that two nodes can also be two launchers on one machine.
    """
    node = World.detect().node
    lock = FileLock(Path(tempfile.gettempdir(), f"vitcomposer-{os.getuid()}-{node}.lock"), timeout=60)
    numbers = prefix._each_prefix_int
    prefix._each_prefix_int = lambda: itertools.count(10_000 * node)
    if get_local_rank() == 0:
        with suppress(Timeout):
            lock.acquire()
    try:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        yield
    finally:
        prefix._each_prefix_int = numbers
        lock.release()


class ImageStream(StreamingDataset):
    """One split of an MDS data set. Yields ``image`` (encoded file), ``label``, ``sample_id``, ``copy``, ``epoch``.

    Never ends an epoch short and never waits for a shard that failed: it raises ShardError, in all loader
    processes of the rank. Other ranks of the node notice when their DataLoader's timeout or the launcher ends them.
    Without ``shuffle`` (evaluation) samples repeated to give all ranks equal work have IGNORE_LABEL.

    Args:
        local: Folder with the splits, or the cache of ``remote``.
        batch_size: Per rank, the DataLoader's.
        repeats: Views of a sample in an epoch (repeated augmentation); see ``order.arrange``.
    """

    def __init__(
        self,
        *,
        local: str,
        split: str,
        batch_size: int,
        shuffle: bool,
        seed: int,
        remote: str | None = None,
        repeats: int = 1,
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
        self._check_nodes()
        self.repeats = repeats
        self.spanner = _VirtualSpanner(self.samples_per_shard)
        self._rows = RowReader(cast(list[MDSReader], self.shards), str(self.stream.folder / INDEX))
        self._epoch = 0
        self._pid: int | None = None
        self._failure = _Failure()
        self._event = self._failure  # pyright: ignore[reportAttributeAccessIssue, reportIncompatibleVariableOverride]
        # Forked workers would share the connection that fetched the index.
        self.stream._downloader.clean_up()

    def _check_nodes(self) -> None:
        canonical, nodes = self.num_canonical_nodes or 1, self._unique_rank_world.num_nodes
        if canonical % nodes and nodes % canonical or canonical > self.num_samples:
            raise ConfigError(
                f"data.num_canonical_nodes must divide the {nodes} nodes or be a multiple of them, and not exceed the "
                f"{self.num_samples} samples, got {canonical}. Leave it out."
            )

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch."""
        return self._layout(self._unique_rank_world).samples_per_rank(self.num_samples)

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

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """Virtual ids of this worker: each computes the whole order, which is quicker than sharing it safely."""
        world = self._unique_worker_world
        shuffle = Shuffle(seed=self.shuffle_seed, block_size=self.shuffle_block_size or 1 << 18)
        plan = arrange(
            self.samples_per_shard,
            self._layout(world),
            epoch=epoch,
            first=sample_in_epoch,
            shuffle=shuffle if self.shuffle else None,
            repeats=self.repeats,
        )
        self._epoch = epoch
        # Nobody may ask for the next epoch before the leader has counted it.
        self._shared_barrier(world.workers_per_node)
        return plan[world.node, world.rank_of_node, world.worker_of_rank].flatten()

    def __getitem__(self, at: int) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sample of a virtual id, waiting for its shard."""
        return self.get_item(int(at))

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Sample of a virtual id; ``retry`` bounds how often its shard may be evicted before it is read."""
        self._failure.raise_if_set()
        shard_id, row = self.spanner[sample_id]
        copy, sample_id = divmod(sample_id, self.num_samples)
        for _ in range(1 + retry):
            try:
                image, label = self._read(shard_id, row)
                break
            except FileNotFoundError:
                self.prepare_shard(shard_id)
        else:
            fault = "it is gone each time it is read"
            remedy = "Raise data.cache_limit" if self.cache_limit else "Find what deletes it"
            self._fail(ShardError(f"{self.stream.error(self.shards[shard_id], fault)} {remedy}."))
        if copy and not self.shuffle:
            copy, label = 0, IGNORE_LABEL
        return {"image": image, "label": label, "sample_id": sample_id, "copy": copy, "epoch": self._epoch}

    def _read(self, shard_id: int, row: int) -> tuple[bytes, int]:
        shard = self.shards[shard_id]
        try:
            found = self._rows.read(str(self.stream.folder / shard.file_pairs[0][0].basename), row)
        except FileNotFoundError:
            raise
        except Exception as error:
            self._fail(self.stream.error(shard, str(error)), error)
        self._shard_access_times[shard_id] = time_ns()
        return found

    def _fail(self, failure: ShardError, cause: BaseException | None = None) -> NoReturn:
        self._failure.record(str(failure))
        raise failure from cause

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Have a shard on disk; not blocking, skip it while another process is at it."""
        if not blocking and self._shard_states[shard_id] == _ShardState.LOCAL:
            # Streaming's background thread asks for every sample, under a lock that all workers of the node share.
            # Should the shard have been evicted since, get_item finds out.
            self._shard_access_times[shard_id] = time_ns()
            return
        self._failure.raise_if_set()
        self._enter_process()
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            if self._shard_states[shard_id] == _ShardState.PREPARING:
                self._shard_states[shard_id] = _ShardState.REMOTE
            if self._cache_filelock.is_locked:  # it failed while it evicted
                self._cache_filelock.release(force=True)
            if isinstance(error, ShardError):
                self._fail(error)
            self._fail(self.stream.error(self.shards[shard_id], f"{type(error).__name__}: {error}"), error)

    def on_exception(self, future: Future) -> None:
        """Keep the failure of a background thread: what a done-callback raises reaches nobody."""
        error = future.exception()
        if error is not None:
            self._failure.record(str(error) if isinstance(error, ShardError) else f"{type(error).__name__}: {error}")

    def _ready_thread(self, it: _Iterator) -> None:
        """Count samples as ready once their shard is.

        Streaming's waits for ever for a shard that is evicted while it waits (its issue 964); this one has it
        fetched again.
        """
        assert self.predownload is not None
        while not it.should_exit() and it.ready_index < it.total and not self._failure.is_set():
            if it.ready_index - it.yield_index > self.predownload:
                sleep(TICK)
                continue
            sample_id = it.sample_ids[it.ready_index]
            if sample_id != PADDING:
                shard_id, _ = self.spanner[sample_id]
                if self._shard_states[shard_id] == _ShardState.REMOTE:
                    self.prepare_shard(shard_id, False)
                if self._shard_states[shard_id] != _ShardState.LOCAL:
                    sleep(TICK)
                    continue
            it.ready_index += 1
        it.on_exit()

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        due, done = int((it.sample_ids != PADDING).sum()), 0
        try:
            for sample_id in super()._each_sample_id(it):
                yield sample_id
                done += 1
            # Here and not after Streaming's loop, which first waits for its threads and so for a hanging download.
            self._failure.raise_if_set()
            if done != due and not it.should_exit():
                self._fail(
                    ShardError(f"{self.stream.folder}: epoch {self._epoch} ended after {done} of {due} samples.")
                )
        finally:  # an epoch that is broken off leaves no thread behind
            it.non_blocking_exit()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This worker's samples of the next epoch, or the rest of the one that was resumed."""
        self._failure.raise_if_set()
        self._enter_process()
        # A generator, for what iter() raises kills a persistent worker of torch, and its message with it.
        yield from super().__iter__()

    def _enter_process(self) -> None:
        """Drop what does not survive a fork: locks, and threads of an epoch that was begun before it."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        for name in ("_iterator", "_executor"):
            self.__dict__.pop(name, None)
        self._shared_barrier.lock = FileLock(self._shared_barrier.filelock_path)
        self._cache_filelock = FileLock(self._cache_filelock_path)
        # Streaming asks for its lock under this name and, not finding it, would make a new one for every call.
        setattr(self, CACHE_FILELOCK, self._cache_filelock)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint keeps. Between two epochs, where Composer counts 0 samples, it names the coming one."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return state
