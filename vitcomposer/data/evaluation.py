"""Loads centre crops of chosen samples, to take features of them beside training without moving its order on."""

from collections.abc import Iterator

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vitcomposer.data.augment.transforms import EvalTransform
from vitcomposer.data.batch import Sample
from vitcomposer.data.collate import EvalCollate
from vitcomposer.data.jpeg import decode as jpeg
from vitcomposer.data.loader import Split, holds_seekable, open_dataset, source_of
from vitcomposer.data.mds.shared_memory import ignore_interrupt
from vitcomposer.data.mds.stream import ImageStream
from vitcomposer.data.mds.worker_room import check_worker_room
from vitcomposer.data.synthetic import NUM_IMAGES, SyntheticImages
from vitcomposer.data.workers import number_of_workers
from vitcomposer.errors import ConfigError, ShardError
from vitcomposer.schema.recipe import Recipe

Statistics = tuple[float, float, float]


def open_images(cfg: Recipe, split: Split, *, batch_size: int) -> ImageStream | SyntheticImages:
    """The samples of a split that is not trained on.

    Raises:
        ConfigError: Data that cannot be found; a shard on disk missing or cut.
    """
    try:
        return open_dataset(cfg.data, split, num_classes=NUM_IMAGES, batch_size=batch_size, seed=cfg.seed)
    except ShardError as error:  # found before anything is read
        raise ConfigError(str(error)) from error


class ChosenSamples(IterableDataset):
    """Samples by their ids, in batches of one worker each, read beside the epochs of the data set.

    Its order and position stay where they are. Streaming refuses a second data set over the same cache, so the
    neighbours of a k-NN monitor come out of the one that is being trained on.
    """

    def __init__(self, images: ImageStream | SyntheticImages, ids: NDArray[np.int64], batch_size: int) -> None:
        self._images, self._ids, self._batch_size = images, ids, batch_size

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        size = self._batch_size
        for begin in range(first * size, len(self._ids), workers * size):
            for at in self._ids[begin : begin + size]:
                yield self._images[int(at)]
        if isinstance(self._images, ImageStream) and self._images.cache_limit:
            # This worker stays, and a shard that it has mapped stays on the disk when it is evicted.
            self._images._rows.forget(np.ones(self._images.num_shards, bool))


def choose_samples(num_samples: int, count: int | None, seed: int) -> NDArray[np.int64]:
    """``count`` different ids of ``num_samples``, drawn by ``seed`` and sorted; None or too large a count is all."""
    if count is None or count >= num_samples:
        return np.arange(num_samples)
    # RandomState, because numpy promises its stream for ever.
    return np.sort(np.random.RandomState(seed & 0xFFFFFFFF).permutation(num_samples)[:count])


def build_centre_crops(
    cfg: Recipe,
    images: ImageStream | SyntheticImages,
    *,
    mean: Statistics,
    std: Statistics,
    device_batch_size: int,
    num_samples: int | None = None,
) -> DataSpec:
    """This rank's share of the samples, each once over all ranks, with the evaluation's crop and no randomness.

    Args:
        cfg: With the blocks ``model``, ``data`` and ``evaluation``, and a ``seed`` that draws the subset.
        images: Whose samples; a training data set may be in the middle of an epoch.
        device_batch_size: Images per batch and rank.
        num_samples: Of a random subset; None is all.
    """
    ids = choose_samples(images.num_samples, num_samples, cfg.seed)
    share = np.array_split(ids, dist.get_world_size())[dist.get_global_rank()]
    jpeg.warm_up(seekable=holds_seekable(images))
    image_size = cfg.evaluation.image_size or cfg.model.image_size
    batch_bytes, ahead = device_batch_size * 3 * image_size**2, cfg.data.prefetch_factor
    workers = number_of_workers(cfg.data, gpu=torch.cuda.is_available(), batch_bytes=batch_bytes)
    check_worker_room("data.num_workers", workers, prefetch_factor=ahead, batch_bytes=batch_bytes)
    loader = DataLoader(
        ChosenSamples(images, share, device_batch_size),
        batch_size=device_batch_size,
        collate_fn=EvalCollate(
            image_size=image_size,
            crop_ratio=cfg.evaluation.crop_ratio,
            interpolation=cfg.evaluation.interpolation,
            # A trunk without classes says nothing about which labels there may be.
            num_classes=cfg.model.num_classes or 1 << 62,
            source=source_of(images),
        ),
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        worker_init_fn=ignore_interrupt,
        persistent_workers=workers > 0,  # made before there is anything to disturb, see KNNMonitor
        timeout=cfg.data.timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # an iterator draws a seed, which must not come from the training's generator
    )
    return DataSpec(loader, num_samples=len(ids), microbatch_transforms=EvalTransform(mean, std))
