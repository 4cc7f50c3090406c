"""Saves checkpoints that a kill or a full disk in the middle of a save cannot tear."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from vitcomposer.callbacks.best import Best
from vitcomposer.callbacks.throughput import Throughput
from vitcomposer.errors import SaveError
from vitcomposer.foundations import save_checkpoints_with
from vitcomposer.models.weights.sharded import digests_of_rank
from vitcomposer.runs import layout
from vitcomposer.runs.checkpoints import finish_shares, keep_newest, partial_of, remove, save_whole


class Checkpoints(CheckpointSaver):
    """Composer's CheckpointSaver with files that appear whole, on the disk, and only then replace older ones.

    What it saves, when, and under which names stays Composer's: ``ep{epoch}-ba{batch}-rank0.pt`` and the link
    ``latest-rank0.pt``. Rank 0 writes, for FSDP2 too, whose state dict is gathered as a whole. Unless it is sharded:
    then the name is that of a folder, into which each rank writes its share of weights and optimizer state, and rank 0
    the rest.

    Args:
        folder: Created with the first checkpoint.
        interval: Composer time string; the end of training is always saved.
        keep: The number of whole checkpoints that stay, those of earlier starts among them.
        throughput: Is told how long it took.
        best: May want a step to be saved that the interval leaves out, and is told of what was saved.
    """

    def __init__(
        self,
        folder: Path,
        *,
        interval: str,
        keep: int,
        throughput: Throughput | None = None,
        best: Best | None = None,
    ) -> None:
        super().__init__(
            folder=str(folder),
            remote_file_name=None,
            latest_filename=layout.LATEST,
            latest_remote_file_name=None,
            save_interval=interval,
            overwrite=True,  # by the same state, where a run went on from an older checkpoint
            num_checkpoints_to_keep=keep,
        )
        save_checkpoints_with(self, self._save)
        self._throughput, self._best = throughput, best
        self._is_due: Callable[[State, Event], bool] = self.save_interval
        self.save_interval = self._is_wanted
        self.tmp_dir_for_symlink.cleanup()  # of uploads; a killed run would leave it behind

    def init(self, state: State, logger: Logger) -> None:
        """Nothing: the folder comes with the first checkpoint, so that a start which is refused leaves none."""

    def _is_wanted(self, state: State, event: Event) -> bool:
        return self._is_due(state, event) or (self._best is not None and self._best.wants(state))

    def _save(self, state: State, logger: Logger) -> None:
        began = time.perf_counter()
        if state.fsdp_sharded_state_dict_enabled:
            self._save_shares(state)
        else:
            self._save_file(state)
        self.last_checkpoint_batch = state.timestamp.batch  # not before: Preemption relies on it
        if self._best is not None:
            self._best.saved(state, Path(self.filename.format(state)))
        if self._throughput is not None:
            self._throughput.saving_seconds += time.perf_counter() - began

    def _save_file(self, state: State) -> None:
        # On all ranks: shares of the weights, the averages and the random states come together here.
        content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        fault: list[str | None] = [None]
        if dist.get_global_rank() == 0:
            fault[0] = self._write(content, Path(self.filename.format(state)))
        # The others wait for the disk here, and none of them for one that has failed.
        dist.broadcast_object_list(fault, src=0)
        if fault[0] is not None:
            raise SaveError(fault[0])

    def _write(self, content: dict[str, Any], path: Path) -> str | None:
        try:
            save_whole(content, path)
            keep_newest(path.parent, path, self.num_checkpoints_to_keep)
        except (OSError, RuntimeError) as error:
            return _explain(path, error)
        self.saved_checkpoints = [str(path)]
        return None

    def _save_shares(self, state: State) -> None:
        """Every rank writes its share into a folder on a disk that all nodes see, which then gets its name."""
        name = [self.filename.format(state)]
        dist.broadcast_object_list(name, src=0)
        path, first = Path(name[0]), dist.get_global_rank() == 0
        content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        if first:
            remove(partial_of(path))
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            content.pop("rng")  # that of all ranks, as in a file
        dist.barrier()
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        fault: list[str | None] = [None]
        digests: dict[str, str] = {}
        try:
            save(content, storage_writer=FileSystemWriter(partial_of(path)), planner=planner)
            digests = digests_of_rank(partial_of(path), dist.get_global_rank())
        except (OSError, RuntimeError, CheckpointException) as error:  # the last one is that of any rank, on all ranks
            fault[0] = _explain(path, error)
        everywhere = dist.all_gather_object((fault[0], digests))
        fault[0] = next((each for each, _ in everywhere if each is not None), None)
        if first and fault[0] is None:
            fault[0] = self._finish_shares(
                path, {name: each for _, found in everywhere for name, each in found.items()}
            )
        dist.broadcast_object_list(fault, src=0)
        if fault[0] is not None:
            raise SaveError(fault[0])
        self.saved_checkpoints = [str(path)]

    def _finish_shares(self, path: Path, digests: dict[str, str]) -> str | None:
        try:
            finish_shares(path, digests)
            keep_newest(path.parent, path, self.num_checkpoints_to_keep)
        except OSError as error:
            return _explain(path, error)
        return None


def _explain(path: Path, error: BaseException) -> str:
    # Torch's own error about the disk's says nothing: "unexpected pos 64 vs 0".
    reason = error.__context__ if isinstance(error.__context__, OSError) else error
    if isinstance(error, CheckpointException):
        rank, (reason, _) = next(iter(error.failures.items()))
        path = path.with_name(f"{path.name}, the share of rank {rank},")
    return (
        f"The checkpoint {path} could not be saved: {type(reason).__name__}: {reason}. Those saved before are "
        "whole. Make room or mend the disk, then start the same command again."
    )
