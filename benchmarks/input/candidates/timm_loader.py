"""timm's training transform and fast_collate, which keeps uint8; its PrefetchLoader normalises on the device."""

from collections.abc import Iterator
from pathlib import Path

import torch
from timm.data.loader import fast_collate
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.input.candidates import BATCH, RAND_AUGMENT, SIZE
from benchmarks.input.candidates.folder import image_folder
from benchmarks.timm_posterize import posterize_to_no_bits

PACKAGES = ("timm", "torch", "torchvision", "pillow")

_POLICIES = {
    None: {"color_jitter": None},
    "rand_augment": {"auto_augment": RAND_AUGMENT},
    "three_augment": {"auto_augment": "3a", "color_jitter": 0.3},
}


def batches(store: Path, *, policy: str | None = None, workers: int = 0) -> Iterator[Tensor]:
    torch.set_num_threads(1)
    posterize_to_no_bits()
    transform = create_transform(
        SIZE, is_training=True, interpolation="bicubic", use_prefetcher=True, **_POLICIES[policy]
    )
    loader = DataLoader(
        image_folder(store, transform),  # pyright: ignore[reportArgumentType]
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=fast_collate,
    )
    while True:
        for images, _ in loader:
            yield images
