"""Fetches the shards of coming samples while the samples before them are decoded."""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class FetchAhead:
    """A thread that has the shards of the coming samples prepared: it works per shard and sleeps in between.

    Streaming has two such threads, which look at every sample and wake 140 times a second. A daemon, so that a
    download which hangs does not keep a process from ending.
    """

    def __init__(self, prepare: Callable[[int], None], shards: NDArray[np.int32], window: int) -> None:
        """Shards in the order of the samples; ``prepare`` handles its own errors; ``window`` in samples."""
        self._prepare, self._shards, self._window = prepare, shards, window
        self._at, self._stopped, self._wake = 0, False, threading.Event()
        threading.Thread(target=self._run, name="shards", daemon=True).start()

    def advance(self, at: int) -> None:
        """Sample number ``at`` is about to be read."""
        self._at = at
        self._wake.set()

    def stop(self) -> None:
        """End the thread after the shard it is at."""
        self._stopped = True
        self._wake.set()

    def _run(self) -> None:
        done = 0
        while done < len(self._shards):
            self._wake.clear()
            if self._stopped:
                return
            end = min(self._at + self._window, len(self._shards))
            for shard in dict.fromkeys(self._shards[done:end].tolist()):
                if self._stopped:
                    return
                self._prepare(shard)
            done = max(done, end)
            if done < len(self._shards):
                self._wake.wait()
