"""Has Composer resume from what our own reader makes of a checkpoint: no byte of the file reaches Python's pickle.

Composer loads with ``torch.load(weights_only=False)``, and the index of a folder of shares with ``pickle.load``. A look
at the file beforehand would be a look at other bytes than those loaded, if somebody exchanges it between.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from vitcomposer.foundations import load_checkpoints_with
from vitcomposer.models.weights.load import read_checkpoint
from vitcomposer.models.weights.sharded import read_index, read_piece

# What shares of before version 0.2.0 lack, and what is read for it.
_SINCE = {"state.callbacks.Best.kept": "null"}


@contextmanager
def own_reader() -> Iterator[None]:
    """Within it Composer loads checkpoints through ``read_checkpoint``."""
    with load_checkpoints_with(_load, _SharesReader):
        yield


def _load(checkpoint_filepath: Path | str, map_location: str) -> Any:
    if map_location != "cpu":
        raise ValueError(f"checkpoints are loaded to the CPU, not to {map_location}")
    return read_checkpoint(checkpoint_filepath)


class _SharesReader(FileSystemReader):
    """Reads a folder of shares with :mod:`vitcomposer.models.weights.sharded`."""

    def read_metadata(self) -> Metadata:
        index = read_index(Path(self.path))
        assert index.storage_meta is not None, "it was made with one"
        index.storage_meta.load_id = self.load_id
        for name in _SINCE:
            index.state_dict_metadata.setdefault(name, BytesStorageMetadata())
        return index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            piece = self.storage_data.get(item.storage_index)
            value: Any = _SINCE[item.dest_index.fqn] if piece is None else read_piece(Path(self.path), piece)
            if item.type == LoadItemType.BYTE_IO:
                # The planner unpickles what it is given, which is therefore written anew.
                written = io.BytesIO()
                torch.save(value, written)
                written.seek(0)
                planner.load_bytes(item, written)
            else:
                target = planner.resolve_tensor(item).detach()
                part = narrow_tensor_by_index(value, item.storage_offsets, item.lengths)
                if part.shape != target.shape:
                    raise ValueError(f"{item.dest_index.fqn} has the shape {part.shape}, {target.shape} is needed")
                target.copy_(part)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
