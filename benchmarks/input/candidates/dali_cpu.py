"""DALI's CPU backend with one thread: the fused random-crop decoder of its ImageNet examples, then a resize."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from benchmarks.input.candidates import BATCH, SIZE

PACKAGES = ("nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12")

_FILTERS = {"cubic": types.INTERP_CUBIC, "triangular": types.INTERP_TRIANGULAR}


@pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, seed=0)
def _pipeline(folder: str, filter_type: Any) -> Any:
    files, _ = fn.readers.file(file_root=folder, random_shuffle=True, name="photos")
    images = fn.decoders.image_random_crop(
        files, output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
    )
    images = fn.resize(images, size=(SIZE, SIZE), interp_type=filter_type, antialias=True)
    return fn.flip(images, horizontal=fn.random.coin_flip())


def batches(store: Path, *, filter: str) -> Iterator[np.ndarray]:
    pipeline = _pipeline(str(store), _FILTERS[filter])
    pipeline.build()
    while True:
        (images,) = pipeline.run()
        yield images.as_array()
