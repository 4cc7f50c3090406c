"""Makes the chunks of a conversion, in this process or in workers: reads, checks and stores their images."""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from vitcomposer.data.conversion.encode import store_image
from vitcomposer.data.conversion.plan import Chunk, to_json
from vitcomposer.data.conversion.shard import Sample, empty_shard_bytes, encode_shard, sample_overhead
from vitcomposer.data.conversion.sources import Source
from vitcomposer.data.jpeg import reading
from vitcomposer.stores.objects import Store

_Marker = dict[str, Any]
_LOOK = 0.25  # seconds between two looks at how far the workers are

_job: tuple[Source, Store, Any]  # set once per process, as the source may be large; and a shared number of images


def _start_worker(source: Source, store: Store, images: Any) -> None:
    global _job
    _job = source, store, images
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what happens on Ctrl-C
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End when the parent is killed: waiting for work on a pipe that it holds open itself, a worker would stay."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _make_chunk_in_worker(chunk: Chunk) -> dict[str, Any]:
    source, store, images = _job

    def add(done: int) -> None:
        with images.get_lock():
            images.value += done

    return _make_chunk(chunk, source, store, add)


def _make_chunk(chunk: Chunk, source: Source, store: Store, add: Callable[[int], None]) -> dict[str, Any]:
    with reading(chunk.options.reading):
        return _store_chunk(chunk, source, store, add)


def _store_chunk(chunk: Chunk, source: Source, store: Store, add: Callable[[int], None]) -> dict[str, Any]:
    """Write the shards of a chunk and its done-marker; the marker's content is all that the merge needs.

    Args:
        add: Called with the number of images that were looked at since the call before.
    """
    shards = _Shards(store, chunk)
    bad: list[dict[str, str]] = []
    total = {key: Counter[str]() for key in ("sizes", "formats", "classes", "outcomes")}
    original_bytes = 0
    for at, item in enumerate(chunk.items):
        add(int(at > 0))  # the one before
        try:
            data = source.read(item)
        except OSError as error:  # a disk or network that fails is no bad image: nothing may be left out for it
            raise ValueError(f"{item.name} cannot be read: {error}. Mend it and call again.") from error
        except ValueError as error:  # no file, as the walk has told
            bad.append({"file": item.name, "reason": str(error)})
            continue
        try:
            image = store_image(data, chunk.options, item.name)
        except ValueError as error:
            bad.append({"file": item.name, "reason": str(error)})
            continue
        shards.add((image.columns, item.label))
        original_bytes += len(data)
        values = (f"{image.width}x{image.height}", image.format, str(item.label), image.outcome)
        for counter, value in zip(total.values(), values, strict=True):
            counter[value] += 1
    add(1)
    shards.flush()
    sizes = {"bytes": shards.bytes, "original_bytes": original_bytes}
    marker = {"bad": bad, "shards": shards.written, **total, **sizes, "plan": chunk.plan}
    store.write(chunk.marker, to_json(marker))
    return marker


class _Shards:
    """The shards of one chunk, none above the limit unless a single image is."""

    def __init__(self, store: Store, chunk: Chunk) -> None:
        self._store, self._chunk, self._limit = store, chunk, chunk.limit
        self._columns = chunk.options.columns
        self._samples: list[Sample] = []
        self._size = 0
        self.written: list[dict[str, Any]] = []  # their entries in index.json
        self.bytes = 0  # in the columns of bytes

    def add(self, sample: Sample) -> None:
        """Take a sample; store the shard before it if there is no room for it."""
        values = sum(map(len, sample[0]))
        size = values + sample_overhead(self._columns)
        if self._size + size > self._limit:
            self.flush()
        if not self._samples:
            self._size = empty_shard_bytes(self._limit, self._columns)
        self._samples.append(sample)
        self._size += size
        self.bytes += values

    def flush(self) -> None:
        """Store what is held as a shard."""
        if self._samples:
            basename = self._chunk.basename(len(self.written))
            data, entry = encode_shard(self._samples, self._columns, self._limit, basename)
            self._store.write(f"{self._chunk.split}/{basename}", data)
            self.written.append(entry)
            self._samples = []


def run_chunks(
    source: Source, store: Store, chunks: list[Chunk], workers: int | None, progress: Callable[[int], None]
) -> Iterator[tuple[Chunk, dict[str, Any]]]:
    """Make the chunks in any order and yield each with its marker; ``progress`` is told of every few images."""
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be 1 or more, got {workers}. Leave it out for one per core.")
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    if workers <= 1:
        yield from ((chunk, _make_chunk(chunk, source, store, progress)) for chunk in chunks)
        return
    if any(chunk.options.seekable for chunk in chunks):
        from vitcomposer.data.jpeg.seekable import compile_kernels

        compile_kernels()  # once, not in every worker at the same time
    # spawn, not fork: the parent may run threads (progress bar, S3 client), and a forked lock stays locked for ever
    context = multiprocessing.get_context("spawn")
    images = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(source, store, images))
    try:
        futures = {pool.submit(_make_chunk_in_worker, chunk): chunk for chunk in chunks}
        for future in _ended(set(futures), lambda: images.value, progress):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A worker process died, most likely for want of memory. Call again to continue, with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ended(
    waiting: set[Future[_Marker]], images: Callable[[], int], progress: Callable[[int], None]
) -> Iterator[Future[_Marker]]:
    """Futures as they end; several times a second, also while none does, what ``images`` has grown by is told."""
    told = 0
    while waiting:
        ended, waiting = wait(waiting, timeout=_LOOK, return_when=FIRST_COMPLETED)
        now = images()
        progress(now - told)
        told = now
        yield from ended
