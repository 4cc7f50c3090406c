"""Measures in seconds, without any data, what one core decodes and how long one training step takes."""

import io
import random
import time
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

_HEIGHT, _WIDTH, _SIZE = 375, 500, 224  # pixels: ImageNet's usual photo and crop
_PHOTOS = 8
_CLASSES = 1000


@dataclass(frozen=True)
class Step:
    """A training step of DeiT-S: forward, backward and AdamW.

    Attributes:
        seconds: Of one, the first ones left out.
        images: Of the batch.
    """

    seconds: float
    images: int
    device: str
    precision: str


def decode_rate(seconds: float = 1.0) -> float:
    """Random crops of seekable JPEGs, decoded and resized, a second of one core."""
    from vitcomposer.data.boxes import random_resized_box
    from vitcomposer.data.jpeg.decode import decode_crop
    from vitcomposer.data.jpeg.seekable import make_seekable

    photos, rng = [make_seekable(_photo(seed)).data for seed in range(_PHOTOS)], random.Random(0)
    boxes = [random_resized_box(rng, _HEIGHT, _WIDTH, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(64)]
    for photo, box in zip(photos, boxes, strict=False):
        decode_crop(photo, box, _SIZE)
    began, done = time.process_time(), 0
    while (spent := time.process_time() - began) < seconds:
        decode_crop(photos[done % _PHOTOS], boxes[done % len(boxes)], _SIZE)
        done += 1
    return done / spent


def _photo(seed: int) -> bytes:
    """A JPEG with the detail of a photo: clouds and noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    clouds = np.asarray(Image.fromarray(small).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC), np.float32)
    noisy = clouds + rng.normal(0, 12, (_HEIGHT, _WIDTH, 1))  # (H, W, 3)
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure_step() -> Step:
    """On the first GPU with 64 images in bf16, else on the CPU with 4 in float32."""
    from vitcomposer.models import build_model

    gpu = torch.cuda.is_available()
    device, images, steps = torch.device("cuda" if gpu else "cpu"), 64 if gpu else 4, 10 if gpu else 2
    model = build_model("deit_small_patch16", num_classes=_CLASSES, image_size=_SIZE).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.randn(images, 3, _SIZE, _SIZE, device=device)  # (B, 3, S, S)
    target = torch.randint(_CLASSES, (images,), device=device)  # (B,)
    began = 0.0
    for number in range(2 * steps):
        if number == steps:
            began = _now(gpu)
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            loss = cross_entropy(model(batch).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    name = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    return Step((_now(gpu) - began) / steps, images, name, "amp_bf16" if gpu else "fp32")


def _now(gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter()
