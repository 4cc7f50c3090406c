"""Multi-crop of vitcomposer: ImageStream and MultiCrop, with colour and blur here or left to the device."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.input.candidates import MULTICROP_BATCH
from benchmarks.input.candidates.ours import PACKAGES as PACKAGES
from benchmarks.input.candidates.ours import image_stream
from vitcomposer.data.augment.policies import ColorDistortion
from vitcomposer.data.batch import CROPS
from vitcomposer.data.multicrop import MultiCrop


def batches(
    store: Path,
    *,
    num_crops: Sequence[int],
    size_crops: Sequence[int],
    crop_scales: Sequence[tuple[float, float]],
    on_device: bool,
) -> Iterator[list[Tensor]]:
    torch.set_num_threads(1)
    collate = MultiCrop(
        num_crops=num_crops,
        size_crops=size_crops,
        crop_scales=crop_scales,
        distortions=[ColorDistortion(1.0)] * len(num_crops),
        seed=0,
        augment_on_device=on_device,
    )
    loader = DataLoader(
        image_stream(store, batch_size=MULTICROP_BATCH),
        batch_size=MULTICROP_BATCH,
        collate_fn=collate,
        drop_last=True,
    )
    while True:
        for batch in loader:
            yield [crop for crops in batch[CROPS] for crop in crops.split(MULTICROP_BATCH)]
