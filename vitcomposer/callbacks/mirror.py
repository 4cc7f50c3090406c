"""Keeps a copy of the run folder on an object store while the run goes on."""

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from vitcomposer.runs import layout
from vitcomposer.runs.folder import run_folder
from vitcomposer.runs.remote import RunStore, describe
from vitcomposer.schema.recipe import Recipe

log = logging.getLogger(__name__)

_LONGEST_PAUSE = 60.0  # seconds between two tries
_AT_THE_END = 60.0  # seconds for which a run that is over tries again
_LONGEST_UPLOAD = 300.0  # seconds that the end waits for what is on its way
_AFTER_A_FAILURE = 3.0  # seconds, since the other ranks take one that is silent for dead


class MirrorRun(Callback):
    """Has a thread of rank 0 send what is new in the run folder after each checkpoint and at the end.

    A store that cannot be reached never stops or slows a step: it is said once, tried again with growing pauses, and
    what is newest then is sent.
    """

    def __init__(self, store: RunStore | None) -> None:
        """``store`` is None on the ranks that have nothing to send."""
        self._store = store
        self._latest: list[str] | None = None
        self._thread: threading.Thread | None = None
        self._wake, self._ending = threading.Event(), threading.Event()

    def fit_start(self, state: State, logger: Logger) -> None:
        if self._store is not None and self._thread is None:
            self._ending.clear()
            # A daemon, so that an upload which hangs does not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
            self._thread.start()
            self._look()

    def batch_start(self, state: State, logger: Logger) -> None:
        self._look()

    def eval_start(self, state: State, logger: Logger) -> None:
        self._look()

    def fit_end(self, state: State, logger: Logger) -> None:
        self._look()

    def close(self, state: State, logger: Logger) -> None:
        if self._thread is not None:
            self._ending.set()
            self._wake.set()
            failing = sys.exc_info()[0] is not None and dist.get_world_size() > 1
            self._thread.join(_AFTER_A_FAILURE if failing else _LONGEST_UPLOAD)
            self._thread = None

    def _look(self) -> None:
        """Wake the thread when another checkpoint is the newest or the best; some microseconds."""
        if self._store is None:
            return
        try:
            latest = [os.readlink(self._store.folder / layout.LATEST_CHECKPOINT)]
        except OSError:
            return
        with suppress(OSError):  # none was kept yet
            latest += os.listdir(self._store.folder / layout.BEST)
        if latest != self._latest:
            self._latest = latest
            self._wake.set()

    def _run(self) -> None:
        assert self._store is not None
        failed = 0
        while True:
            pause = min(2.0**failed, _LONGEST_PAUSE) if failed else None
            if not self._ending.is_set():
                self._wake.wait(pause)
            ending = self._ending.is_set()
            self._wake.clear()
            try:
                self._store.sync()
            except Exception as error:  # every object store has its own
                if not failed:
                    text = "%s cannot be written: %s. Training goes on; uploads are tried again."
                    log.warning(text, self._store.uri, describe(error))
                failed += 1
            else:
                if failed:
                    log.warning("%s is up to date again.", self._store.uri)
                failed = 0
            if ending:
                return


def build_mirror(cfg: Recipe, folder: Path) -> MirrorRun:
    """The callback of ``run.remote``.

    Raises:
        ConfigError: The store cannot be reached.
    """
    assert cfg.run.remote is not None
    sends = dist.get_global_rank() == 0
    return MirrorRun(RunStore(cfg.run.remote, folder, keep=cfg.run.keep_checkpoints) if sends else None)


def finish_mirror(cfg: Recipe, status: int) -> int:
    """Send what is left of a run that is over, its report too; called by all ranks.

    Returns:
        ``status``, or 74 in place of 0 where not everything arrived: the same command then sends the rest.
    """
    answer = [status]
    if cfg.run.remote is not None:
        folder = run_folder(cfg)
        if dist.get_global_rank() == 0 and not _send_rest(cfg.run.remote, folder, cfg.run.keep_checkpoints):
            answer[0] = status or os.EX_IOERR
        dist.broadcast_object_list(answer, src=0)  # a rank that ended before would take rank 0 with it
    return answer[0]


def _send_rest(remote: str, folder: Path, keep: int) -> bool:
    store: RunStore | None = None
    began, failed = time.monotonic(), 0
    while True:
        try:
            store = store or RunStore(remote, folder, keep=keep)
            store.sync()
            return True
        except Exception as error:  # every object store has its own
            pause = min(2.0**failed, _LONGEST_PAUSE)
            failed += 1
            if time.monotonic() - began + pause > _AT_THE_END:
                left = store.behind() if store is not None else ["its files"]
                log.error(
                    "%s has not got %d of the files of %s, which keeps them: %s. Start the same command again to send "
                    "them.",
                    remote,
                    len(left),
                    folder,
                    describe(error),
                )
                return False
            time.sleep(pause)
