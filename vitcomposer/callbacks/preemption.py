"""Stop on SIGTERM or SIGUSR1 with a checkpoint, so that the same command goes on from there."""

import functools
import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of Kubernetes and scancel; of ``sbatch --signal=USR1@120``


class Preemption(Callback):
    """Ends training after the step in which any rank got a signal; :class:`Checkpoints` then saves that step.

    No evaluation runs any more, since it could take longer than the time that a scheduler grants. A signal in the very
    last step changes nothing: the run is over and deserves its evaluation. Workers of the data loaders outlive one
    signal too, because Slurm sends it to every process of a job, and without them the step couldn't end. More signals
    change nothing, also while the checkpoint is written; after a stop they stay ignored until the process ends.

    Attributes:
        stopped: Whether a signal ended the run; the process should then exit with status 143.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        if threading.current_thread() is not threading.main_thread():
            log.warning("Training outside the main thread: Python delivers no signals here, SIGTERM will kill the run.")
            return
        self._received = None
        for loader in (state.dataloader, *(evaluator.dataloader.dataloader for evaluator in state.evaluators)):
            # Two evaluators may share one loader.
            if isinstance(loader, DataLoader) and getattr(loader.worker_init_fn, "func", None) is not _init_worker:
                loader.worker_init_fn = functools.partial(_init_worker, loader.worker_init_fn)
        for number in SIGNALS:
            handler = signal.signal(number, self._on_signal)
            self._previous.setdefault(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self._any_rank_received(state) or _is_last_batch(state):
            return
        self.stopped = True
        # stop_training() makes this the end of training, which by itself would start a whole evaluation.
        for evaluator in state.evaluators:
            evaluator.eval_interval = _never
        state.stop_training()
        if dist.get_global_rank() == 0:
            name = self._received.name if self._received else "a signal on another rank"
            log.warning("Stopped by %s after step %d.", name, state.timestamp.batch.value)

    def _any_rank_received(self, state: State) -> bool:
        received = self._received is not None
        if dist.get_world_size() == 1:
            return received
        flag = state.device.tensor_to_device(torch.tensor([int(received)], dtype=torch.uint8))
        dist.all_reduce(flag, reduce_operation="MAX")
        return bool(flag.item())

    def close(self, state: State, logger: Logger) -> None:
        # Not at FIT_END, which the last evaluation follows.
        while self._previous:
            number, handler = self._previous.popitem()
            if self.stopped:
                # Another signal must not turn the status: launchers end the ranks that leave last with a SIGTERM.
                handler = signal.SIG_IGN
            # None stands for a handler that was not set from Python and can't be set back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _init_worker(inner: Callable[[int], None] | None, worker_id: int) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive_one)
    if inner is not None:
        inner(worker_id)


def _outlive_one(number: int, frame: FrameType | None) -> None:
    # Only one: a stuck worker has to go when its parent ends and terminates it.
    signal.signal(number, signal.SIG_DFL)


def _never(state: State, event: Any) -> bool:
    return False


def _is_last_batch(state: State) -> bool:
    """Whether nothing but the end of the run follows; an epoch only counts as done after its last BATCH_END."""
    assert state.max_duration is not None, "Composer has set it before training"
    if state.timestamp >= state.max_duration:
        return True
    epoch_done = state.dataloader_len is not None and state.timestamp.batch_in_epoch >= state.dataloader_len
    return epoch_done and state.timestamp.to_next_epoch() >= state.max_duration
