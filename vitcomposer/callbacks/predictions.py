"""Keeps what the last evaluation said about each image of the validation split, for the report of the run."""

import logging
from pathlib import Path

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.models.weights.averages import EMA_LABEL
from vitcomposer.runs import layout
from vitcomposer.runs.predictions import Predictions, write_predictions

log = logging.getLogger(__name__)

_FILES = {EMA_LABEL: layout.PREDICTIONS_EMA}  # by the label of the Evaluator


class KeptPredictions(Callback):
    """Writes class and confidence of each evaluated image into the run folder, as ``runs.predictions`` has them.

    A file holds one evaluation, the last; the trained weights and their average have one each. Until an evaluation
    ends a rank keeps 28 bytes for each of its images on its device, and nothing here waits for the device; then rank 0
    gets those of all ranks. Tasks with other outputs than the logits of one classifier (linear probes) keep none. A
    disk that fails does not end the run: that is said once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[tuple[Tensor, ...]] = []
        self._warned = False

    def eval_start(self, state: State, logger: Logger) -> None:
        self._parts.clear()

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        logits, batch = state.outputs, state.batch
        if not isinstance(logits, Tensor) or logits.ndim != 2 or "sample_id" not in batch:
            return
        labels = batch["label"]  # (B,)
        shares = logits.detach().float().softmax(dim=1)  # (B, C)
        confidence, guesses = shares.max(dim=1)
        own = shares.gather(1, labels.clamp(0, shares.shape[1] - 1)[:, None])[:, 0]
        self._parts.append((batch["sample_id"], labels.int(), guesses.int(), confidence, own))

    def eval_end(self, state: State, logger: Logger) -> None:
        mine = [torch.cat(column).cpu().numpy() for column in zip(*self._parts, strict=True)]
        self._parts.clear()
        everywhere = [part for part in dist.all_gather_object(mine) if part]
        if dist.get_global_rank() != 0 or not everywhere:
            return
        columns = [np.concatenate(parts) for parts in zip(*everywhere, strict=True)]
        known = columns[1] != IGNORE_LABEL  # not padding, and no image that could not be decoded
        if not known.any():
            return
        ids, labels, guesses, confidence, own = (column[known] for column in columns)
        found = Predictions(ids, labels, guesses, confidence, own, state.timestamp.batch.value)
        try:
            write_predictions(self._folder / _FILES.get(state.dataloader_label or "", layout.PREDICTIONS), found)
        except OSError as error:
            if not self._warned:
                log.warning("What was said about each image is not kept: %s. Training goes on.", error)
            self._warned = True
