"""Counts the images that a run could not decode, and logs their number once for all ranks."""

import sys
from collections.abc import Iterable
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from tqdm import tqdm

from vitcomposer.data.mds.bad_images import BadImages
from vitcomposer.data.mds.stream import ImageStream


class BadImageCount(Callback):
    """Counts the images that the loaders of all ranks could not decode, after each epoch and evaluation.

    Logs ``data/bad_images`` of the training split, of which others stood in, and ``data/bad_eval_images`` of the
    evaluated ones, which no metric counts; a sample counts once in a run, also in one that is resumed. Ranks exchange
    what they found only here, between the steps, so that each line about an image comes from one of them.

    Raises:
        ConfigError: On a call, more of a split are bad than ``data.max_bad_fraction``; on all ranks together.
    """

    def __init__(self) -> None:
        self._before: dict[str, list[int]] = {}  # of the run that is resumed, by split
        self._splits: dict[str, BadImages] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        for bad in self._all(state):
            bad.learn(self._before.get(bad.split, []))

    def epoch_end(self, state: State, logger: Logger) -> None:
        logger.log_metrics({"data/bad_images": _share([_of(state.train_dataloader)])})

    def fit_end(self, state: State, logger: Logger) -> None:
        bad = _of(state.train_dataloader)
        logger.log_metrics({"data/bad_images": _share([bad])})
        if bad is not None and len(bad):
            _say(bad, f"Others stood in for them, see data.max_bad_fraction. {bad.remedy} lists them.")

    def eval_after_all(self, state: State, logger: Logger) -> None:
        found = [bad for bad in self._all(state) if bad is not _of(state.train_dataloader)]
        logger.log_metrics({"data/bad_eval_images": _share(found)})
        for bad in found:
            if len(bad):
                _say(bad, f"The metrics are of the other {bad.num_samples - len(bad):,}. {bad.remedy} lists them.")

    def state_dict(self) -> dict[str, Any]:
        return {bad.split: bad.ids() for bad in self._splits.values()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = dict(state)

    def _all(self, state: State) -> list[BadImages]:
        """Of every split, each once: two evaluators may share a loader."""
        loaders = [state.train_dataloader, *(evaluator.dataloader.dataloader for evaluator in state.evaluators)]
        found = [bad for loader in loaders if (bad := _of(loader)) is not None]
        self._splits = {bad.split: bad for bad in found}
        return list(self._splits.values())


def _of(loader: Any) -> BadImages | None:
    dataset = getattr(loader, "dataset", None)
    return dataset.bad if isinstance(dataset, ImageStream) else None


def _share(splits: Iterable[BadImages | None]) -> int:
    """How many there are, after every rank has learnt what the others found."""
    splits = [bad for bad in splits if bad is not None]
    if dist.get_world_size() > 1:
        # One exchange for all splits: a rank that finds too many stops together with the others.
        everywhere: Any = dist.all_gather_object([bad.ids() for bad in splits])
        for bad, found in zip(splits, zip(*everywhere, strict=True), strict=True):
            bad.learn({sample_id for ids in found for sample_id in ids})
    return sum(len(bad) for bad in splits)


def _say(bad: BadImages, consequence: str) -> None:
    if dist.get_global_rank() == 0:
        # Above the bar of progress, if there is one.
        count = f"{len(bad):,} of the {bad.num_samples:,} images of {bad.split} could not be decoded."
        tqdm.write(f"{count} {consequence}", file=sys.stderr)
