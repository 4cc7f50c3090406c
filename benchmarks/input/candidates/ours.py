"""The training path of vitcomposer: ImageStream over shards, TrainCollate as the DataLoader's collate_fn.

``vitcomposer convert`` writes its shards.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.input.candidates import BATCH, SIZE, lengthen_epoch
from vitcomposer.data.collate import TrainCollate
from vitcomposer.data.mds.small_column import largest_view
from vitcomposer.data.mds.stream import ImageStream, StreamOptions
from vitcomposer.schema import Augment, Mixing

PACKAGES = ("vitcomposer", "mosaicml-streaming", "torch", "simplejpeg", "numba", "numpy")

_FLAGS = {"plain": ["--no-seekable"], "seekable": ["--seekable"], "raw": ["--raw-fraction", "1.0"]}


def write(photos: Path, store: Path, *, kind: str, small: int | None = None, quality: int | None = None) -> None:
    command = [sys.executable, "-m", "vitcomposer", "convert", "folder", str(photos), str(store)]
    beside = [] if small is None else ["--raw-below", str(small)]
    beside += [] if quality is None else ["--small-quality", str(quality)]
    subprocess.run([*command, "--val-fraction", "0", *_FLAGS[kind], *beside], check=True)
    lengthen_epoch(store / "train" / "index.json")


def batches(
    store: Path, *, workers: int = 0, size: int = SIZE, on_device: bool = False, **augment: Any
) -> Iterator[Tensor]:
    torch.set_num_threads(1)
    chosen: dict[str, Any] = {
        "crop_scale": (0.08, 1.0),
        "interpolation": "bicubic",
        "flip_prob": 0.5,
        "rand_augment": None,
        "three_augment": False,
        "color_jitter": 0.0,
        "random_erasing": 0.0,
        "repeated_augmentation": 1,
        **augment,
    }
    mixing = Mixing(mixup_alpha=0, cutmix_alpha=0, prob=0, switch_prob=0, mode="batch", label_smoothing=0)
    stream = image_stream(store, batch_size=BATCH, repeats=chosen["repeated_augmentation"])
    collate = TrainCollate(
        Augment(**chosen), mixing, image_size=size, num_classes=1000, seed=0, augment_on_device=on_device
    )
    collate.largest_small = largest_view(stream.small_side or 0)
    loader = DataLoader(
        stream,
        batch_size=BATCH,
        collate_fn=collate,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    while True:
        for batch in loader:
            yield batch["image"]


def image_stream(store: Path, *, batch_size: int, repeats: int = 1) -> ImageStream:
    # Hashes are checked once in a run, of some hundred epochs; here that would be in most turns.
    return ImageStream(
        local=str(store),
        split="train",
        batch_size=batch_size,
        shuffle=True,
        seed=0,
        repeats=repeats,
        options=StreamOptions(validate_hash=None),
    )
