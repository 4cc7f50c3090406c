"""Multi-crop with DALI's CPU backend and one thread: one decode, then random_resized_crop and colours for each crop."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from benchmarks.input.candidates import MULTICROP_BATCH

PACKAGES = ("nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12")


def batches(
    store: Path,
    *,
    num_crops: Sequence[int],
    size_crops: Sequence[int],
    crop_scales: Sequence[tuple[float, float]],
    distort: bool,
) -> Iterator[list[np.ndarray]]:
    groups = [group for count, *group in zip(num_crops, size_crops, crop_scales, strict=True) for _ in range(count)]

    @pipeline_def(batch_size=MULTICROP_BATCH, num_threads=1, device_id=None, seed=0, enable_conditionals=True)
    def pipeline() -> Any:
        files, _ = fn.readers.file(file_root=str(store), random_shuffle=True, name="photos")
        images = fn.decoders.image(files, output_type=types.RGB)
        crops = []
        for size, scale in groups:
            crop = fn.random_resized_crop(
                images, size=(size, size), random_area=scale, interp_type=types.INTERP_LINEAR, antialias=True
            )
            crop = fn.flip(crop, horizontal=fn.random.coin_flip())
            crops.append(_distort(crop) if distort else crop)
        return tuple(crops)

    running = pipeline()
    running.build()
    while True:
        yield [crop.as_array() for crop in running.run()]


def _distort(image: Any) -> Any:
    """Jitter 0.8, 0.8, 0.8, 0.2 with probability 0.8, grey 0.2 and blur 0.5; DALI turns the hue in YIQ."""
    jitters = _coin(0.8)
    if jitters:
        image = fn.color_twist(
            image,
            brightness=fn.random.uniform(range=(0.2, 1.8)),
            contrast=fn.random.uniform(range=(0.2, 1.8)),
            saturation=fn.random.uniform(range=(0.2, 1.8)),
            hue=fn.random.uniform(range=(-72.0, 72.0)),
        )
    grey = _coin(0.2)
    if grey:
        image = fn.saturation(image, saturation=0.0)
    blurs = _coin(0.5)
    if blurs:
        image = fn.gaussian_blur(image, sigma=fn.random.uniform(range=(0.1, 2.0)))
    return image


def _coin(probability: float) -> Any:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)
