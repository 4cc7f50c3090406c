"""Stops the run on SIGTERM, SIGUSR1 or Ctrl-C with a checkpoint, so that the same command resumes it."""

import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader

from vitcomposer.callbacks.knn import KNNMonitor

log = logging.getLogger(__name__)

# Of Kubernetes and scancel; of ``sbatch --signal=USR1@120``; of a terminal.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_WAIT = b"stopping after this step; again to drop it\n"  # a terminal has just shown ^C
STOPPED_BY_SIGNAL, STOPPED_BY_HAND = 143, 130  # what the process then exits with


class Preemption(Callback):
    """Ends training after the step in which any rank got a signal; :class:`Checkpoints` then saves that step.

    No evaluation runs any more, since it could take longer than the time that a scheduler grants; one that runs is
    finished. A SIGTERM in the very last step changes nothing: the run is over and deserves its evaluation. Workers of
    the data loaders outlive one signal too, because Slurm sends it to every process of a job and a terminal sends
    Ctrl-C to all, and without them the step couldn't end. More signals change nothing, also while the checkpoint is
    written; after a stop they stay ignored until the process ends.

    But a second Ctrl-C is a KeyboardInterrupt at once, and so is the first one where nothing would be lost: between two
    steps, in an evaluation, with the last step saved. A launcher that hands the signal on counts for nothing of it.

    Attributes:
        status: 143 or 130 when a signal ended the run, with which the process should exit; 0 before.
    """

    def __init__(self) -> None:
        self.status = 0
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._state: State | None = None
        self._first_batch, self._in_step = -1, False

    @property
    def stopped(self) -> bool:
        """Whether a signal ended the run."""
        return self.status != 0

    def fit_start(self, state: State, logger: Logger) -> None:
        if threading.current_thread() is not threading.main_thread():
            log.warning("Training outside the main thread: Python delivers no signals here, SIGTERM will kill the run.")
            return
        self._received, self._state = None, state
        self._first_batch, self._in_step = state.timestamp.batch.value, False
        for loader in _loaders(state):
            # Two evaluators may share one loader.
            if getattr(loader.worker_init_fn, "func", None) is not _init_worker:
                loader.worker_init_fn = functools.partial(_init_worker, loader.worker_init_fn)
        for number in SIGNALS:
            handler = signal.signal(number, self._on_signal)
            self._previous.setdefault(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._received == signal.SIGINT or not self._would_lose():
                raise KeyboardInterrupt
            if dist.get_local_rank() == 0:  # not by way of a stream that may be in use
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _WAIT)
        if self._received != signal.SIGINT:
            self._received = signal.Signals(number)

    def _would_lose(self) -> bool:
        """Whether an end at this moment would cost a step that no checkpoint has."""
        assert self._state is not None, "the handlers come after it"
        savers = [callback for callback in self._state.callbacks if isinstance(callback, CheckpointSaver)]
        saved = [saver.last_checkpoint_batch.value for saver in savers if saver.last_checkpoint_batch is not None]
        return self._in_step or self._state.timestamp.batch.value not in (self._first_batch, *saved)

    def batch_start(self, state: State, logger: Logger) -> None:
        self._in_step = True

    def batch_end(self, state: State, logger: Logger) -> None:
        self._in_step = False
        self._look(state)

    def eval_after_all(self, state: State, logger: Logger) -> None:
        # Of a run that goes on: the signal came in the evaluation. At the end there is nothing left to stop.
        if not self.stopped and not is_last_batch(state):
            self._look(state)

    def _look(self, state: State) -> None:
        received = self._of_any_rank(state)
        if received is None or (received != signal.SIGINT and is_last_batch(state)):
            return
        self.status = STOPPED_BY_HAND if received == signal.SIGINT else STOPPED_BY_SIGNAL
        # stop_training() makes this the end of training, which by itself would start a whole evaluation.
        for evaluator in state.evaluators:
            evaluator.eval_interval = never
        state.stop_training()
        if dist.get_global_rank() == 0 and received != signal.SIGINT:  # whoever pressed Ctrl-C has been answered
            name = self._received.name if self._received else "a signal on another rank"
            log.warning("Stopped by %s after step %d.", name, state.timestamp.batch.value)

    def _of_any_rank(self, state: State) -> signal.Signals | None:
        """The signal that stops all ranks; Ctrl-C where any of them got that."""
        if dist.get_world_size() == 1:
            return self._received
        own = 0 if self._received is None else 1 + (self._received == signal.SIGINT)
        flag = state.device.tensor_to_device(torch.tensor([own], dtype=torch.uint8))
        dist.all_reduce(flag, reduce_operation="MAX")
        return (None, signal.SIGTERM, signal.SIGINT)[int(flag.item())]

    def close(self, state: State, logger: Logger) -> None:
        # Not at FIT_END, which the last evaluation follows.
        while self._previous:
            number, handler = self._previous.popitem()
            if self.stopped and number != signal.SIGINT:
                # Another signal must not turn the status: launchers end the ranks that leave last with a SIGTERM.
                handler = signal.SIG_IGN
            # None stands for a handler that was not set from Python and can't be set back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._state = None


def _loaders(state: State) -> Iterator[DataLoader[Any]]:
    """All whose workers may run while there is training."""
    monitors = [callback for callback in state.callbacks if isinstance(callback, KNNMonitor)]
    of_monitors = [data.dataloader for monitor in monitors for data in (monitor.train, monitor.val)]
    of_evaluators = [evaluator.dataloader.dataloader for evaluator in state.evaluators]
    for loader in (state.dataloader, *of_evaluators, *of_monitors):
        if isinstance(loader, DataLoader):
            yield loader


def _init_worker(inner: Callable[[int], None] | None, worker_id: int) -> None:
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive_one)
    if inner is not None:
        inner(worker_id)


def _outlive_one(number: int, frame: FrameType | None) -> None:
    # Only one: a stuck worker has to go when its parent ends and terminates it.
    signal.signal(number, signal.SIG_DFL)


def never(state: State, event: Any) -> bool:
    """An interval that does not come."""
    return False


def is_last_batch(state: State) -> bool:
    """Whether nothing but the end of the run follows; an epoch only counts as done after its last BATCH_END."""
    assert state.max_duration is not None, "Composer has set it before training"
    if state.timestamp >= state.max_duration:
        return True
    epoch_done = state.dataloader_len is not None and state.timestamp.batch_in_epoch >= state.dataloader_len
    return epoch_done and state.timestamp.to_next_epoch() >= state.max_duration
