"""Makes samples without a data set: for a smoke run, or for the speed of everything but the disk."""

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from streaming.base.world import World
from torch.utils.data import IterableDataset

from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.data.mds.order import PADDING, Layout, Shuffle, arrange, steps_before

NUM_IMAGES = 16
IMAGE_PIXELS = 256


class SyntheticImages(IterableDataset):
    """A few JPEGs of coloured clouds over and over, in the form that ImageStream yields.

    The label is a function of the image, so a model can learn it. Every iteration is the next epoch; the order is
    shared among ranks and workers as that of ImageStream.

    Args:
        batch_size: Per rank, the DataLoader's.
        repeats: Views of a sample in an epoch; with ``shared_decodes`` in a row. See ``order.arrange``.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        num_classes: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        repeats: int = 1,
        shared_decodes: bool = False,
    ) -> None:
        self.num_samples, self.num_classes, self.batch_size = num_samples, num_classes, batch_size
        self.shuffle, self.seed, self.repeats, self.shared_decodes = shuffle, seed, repeats, shared_decodes
        self._next_epoch = 0
        self._images = [_cloud(seed, index) for index in range(NUM_IMAGES)]

    def __len__(self) -> int:
        """Samples of this rank in an epoch."""
        return self._layout(World.detect()).samples_per_rank(self.num_samples)

    def __getitem__(self, at: int) -> dict[str, Any]:
        """Sample of an id, beside the epochs."""
        image = at % NUM_IMAGES
        label = image % self.num_classes
        return {"image": self._images[image], "label": label, "sample_id": at, "copy": 0, "epoch": 0}

    def _layout(self, world: World) -> Layout:
        return Layout(
            nodes=world.num_nodes,
            ranks_per_node=world.ranks_per_node,
            workers_per_rank=world.workers_per_rank,
            batch_size=self.batch_size,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        world = World.detect()
        plan = arrange(
            np.array([self.num_samples]),
            self._layout(world),
            epoch=epoch,
            shuffle=Shuffle(seed=self.seed) if self.shuffle else None,
            repeats=self.repeats,
            shared_decodes=self.shared_decodes,
        )
        size, per_rank = self.batch_size, self._layout(world).samples_per_rank(self.num_samples)
        done = steps_before(epoch, 0, samples_per_rank=per_rank, batch_size=size, ranks=world.num_ranks)
        for place, virtual_id in enumerate(plan[world.node, world.rank_of_node, world.worker_of_rank].ravel()):
            if virtual_id == PADDING:
                continue
            step = done + world.worker_of_rank + place // size * world.workers_per_rank
            copy, sample_id = divmod(int(virtual_id), self.num_samples)
            image = sample_id % NUM_IMAGES
            label = image % self.num_classes
            if copy and not self.shuffle:
                copy, label = 0, IGNORE_LABEL
            sample = {"image": self._images[image], "label": label, "sample_id": sample_id, "copy": copy}
            yield {**sample, "epoch": epoch, "step": step}


def _cloud(seed: int, index: int) -> bytes:
    grid = np.random.default_rng((seed, index)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(grid).resize((IMAGE_PIXELS, IMAGE_PIXELS), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
