"""Images per CPU second of the training collate against torchvision with Pillow, alternating in one process.

    python benchmarks/collate.py benchmarks/results/collate_cpu.json

One thread, batches of 50, 224 px, RandomResizedCrop and flip from 200 JPEGs of 500 x 375 that are cut from the sample
photographs of scikit-learn and scikit-image. Ratios are taken inside a round; the first of the rounds is warm-up.
"""

import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms

from vitcomposer.data.collate import TrainCollate
from vitcomposer.schema import Augment, Mixing

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
IMAGES, BATCH, SIZE, ROUNDS = 200, 50, 224, 8


def photographs() -> list[bytes]:
    """JPEG files with sensor-like grain, so that their size is that of real ones."""
    rng = np.random.default_rng(0)
    arrays = (*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket())
    files = []
    for i in range(IMAGES):
        photo = Image.fromarray(arrays[i % len(arrays)])
        width = int(min(photo.width, photo.height * 4 / 3) * rng.uniform(0.6, 1))
        height = width * 3 // 4
        x, y = int(rng.integers(photo.width - width + 1)), int(rng.integers(photo.height - height + 1))
        crop = photo.crop((x, y, x + width, y + height)).resize((500, 375), Image.Resampling.BICUBIC)
        grain = np.asarray(crop) + rng.normal(0, 4, (375, 500, 3))
        buffer = io.BytesIO()
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    return files


def ours(files: list[bytes], rand_augment: str | None) -> Callable[[], object]:
    augment = Augment(
        crop_scale=(0.08, 1.0),
        interpolation="bicubic",
        flip_prob=0.5,
        rand_augment=rand_augment,
        three_augment=False,
        color_jitter=0.0,
        random_erasing=0.25,
        repeated_augmentation=1,
    )
    mixing = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1)
    collate = TrainCollate(augment, mixing, image_size=SIZE, num_classes=10, seed=0)
    samples = [{"image": f, "label": i % 10, "sample_id": i, "copy": 0, "epoch": 0} for i, f in enumerate(files)]
    return lambda: [collate(samples[i : i + BATCH]) for i in range(0, IMAGES, BATCH)]


def torchvision_pillow(files: list[bytes], rand_augment: str | None) -> Callable[[], object]:
    bicubic = transforms.InterpolationMode.BICUBIC
    steps: list[Callable] = [
        transforms.RandomResizedCrop(SIZE, interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
    ]
    if rand_augment:
        params = {"translate_const": 100, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
        steps.append(rand_augment_transform(rand_augment, params))
    steps.append(transforms.PILToTensor())

    def view(file: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        for step in steps:
            image = step(image)
        return image

    return lambda: [torch.stack([view(f) for f in files[i : i + BATCH]]) for i in range(0, IMAGES, BATCH)]


def main(out: str) -> None:
    torch.set_num_threads(1)
    files = photographs()
    candidates = {
        "vitcomposer": ours(files, None),
        "torchvision": torchvision_pillow(files, None),
        "vitcomposer + RandAugment": ours(files, RAND_AUGMENT),
        "torchvision + timm RandAugment": torchvision_pillow(files, RAND_AUGMENT),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    seconds = {name: values[1:] for name, values in seconds.items()}
    ratios = {
        f"{a} / {b}": [y / x for x, y in zip(seconds[a], seconds[b], strict=True)]
        for a, b in (list(candidates)[:2], list(candidates)[2:])
    }
    report = {
        "images_per_cpu_second": {
            name: {"median": IMAGES / statistics.median(v), "min": IMAGES / max(v), "max": IMAGES / min(v)}
            for name, v in seconds.items()
        },
        "ratio": {name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in ratios.items()},
        "bytes_per_image": sum(map(len, files)) / IMAGES,
        "rounds": ROUNDS - 1,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "timm", "pillow", "simplejpeg", "numpy")},
    }
    Path(out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: report[key] for key in ("images_per_cpu_second", "ratio")}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1])
