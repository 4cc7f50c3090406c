"""Photographs with the statistics of ImageNet's training files, cut from the sample pictures of installed packages.

ImageNet's files are about 500 x 375 pixels, 0.19 Mpx and 110 KB on average: baseline JPEG, 4:2:0, of high quality and
with the grain of a sensor. What a decoder costs is set by these numbers and hardly by what a picture shows, so eleven
photographs give as many different files as asked for: other parts, scales, orientations, sharpness, grain and quality.
"""

import io
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.input.candidates import photo_files

SETS = {
    "full": "original files",
    "s256": "shorter side 256, quality 90",
    "q90": "original size, quality 90",
}

_SIZES = {  # width, height: share of the files
    (500, 375): 0.39,
    (500, 333): 0.16,
    (375, 500): 0.14,
    (333, 500): 0.06,
    (500, 500): 0.05,
    (640, 480): 0.08,
    (400, 300): 0.04,
    (500, 400): 0.04,
    (320, 240): 0.02,
    (500, 281): 0.02,
}


def build_photos(folder: Path, kind: str, count: int) -> dict[str, float]:
    """Write ``count`` files as ``folder/<source>/<number>.jpg`` unless they are there, and return their statistics.

    The statistics are kept beside the folder, since readers of the folder take every file in it for an image.
    """
    report = folder.with_suffix(".json")
    if not report.exists():
        for name in _sources():
            (folder / name).mkdir(parents=True, exist_ok=True)
        jobs = [(folder, kind, number) for number in range(count)]
        with ProcessPoolExecutor() as pool:
            list(pool.map(_write_photo, jobs, chunksize=16))
        report.write_text(json.dumps(_statistics(folder), indent=1) + "\n")
    return json.loads(report.read_text())


def _statistics(folder: Path) -> dict[str, float]:
    files = photo_files(folder)
    sizes = np.array([file.stat().st_size for file in files])
    shapes = []
    for file in files:
        with Image.open(file) as image:
            shapes.append(image.size)
    pixels = np.array([width * height for width, height in shapes])
    p10, p50, p90 = np.percentile(sizes, (10, 50, 90))
    return {
        "files": len(files),
        "mean_bytes": float(sizes.mean()),
        "p10_bytes": float(p10),
        "p50_bytes": float(p50),
        "p90_bytes": float(p90),
        "mean_width": float(np.mean([width for width, _ in shapes])),
        "mean_height": float(np.mean([height for _, height in shapes])),
        "mean_pixels": float(pixels.mean()),
        "bits_per_pixel": float(8 * sizes.sum() / pixels.sum()),
    }


def _write_photo(job: tuple[Path, str, int]) -> None:
    folder, kind, number = job
    names = list(_sources())
    name = names[number % len(names)]
    (folder / name / f"{number:05}.jpg").write_bytes(make_photo(kind, number))


def make_photo(kind: str, number: int) -> bytes:
    """The photo of this number in one of the SETS; the other sets are made from the file of ``full``."""
    original = _original(number)
    if kind == "full":
        return original
    image = Image.open(io.BytesIO(original)).convert("RGB")
    if kind == "s256":
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _encode(image, 90)


def _original(number: int) -> bytes:
    rng = np.random.default_rng(number)
    sources = _sources()
    photo = sources[list(sources)[number % len(sources)]]()
    sizes = list(_SIZES)
    shares = np.array(list(_SIZES.values()))
    width, height = sizes[rng.choice(len(sizes), p=shares / shares.sum())]
    # Pixels of the source a pixel of the file, at most what the source has.
    zoom = min(rng.uniform(0.8, 2.0), photo.width / width, photo.height / height)
    cut_width, cut_height = int(width * zoom), int(height * zoom)
    left = int(rng.integers(photo.width - cut_width + 1))
    top = int(rng.integers(photo.height - cut_height + 1))
    box = (left, top, left + cut_width, top + cut_height)
    image = photo.resize((width, height), Image.Resampling.LANCZOS, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.filter(ImageFilter.UnsharpMask(radius=1, percent=int(rng.uniform(20, 80)), threshold=0))
    pixels = np.asarray(image, np.float32)
    grain = np.exp(rng.normal(np.log(2.5), 0.5))  # standard deviation in levels
    pixels = pixels + grain * rng.standard_normal((height, width, 1)) + grain / 2 * rng.standard_normal(pixels.shape)
    quality = int(np.clip(round(rng.normal(96, 1.6)), 88, 100))
    return _encode(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), quality)


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _sources() -> dict[str, Callable[[], Image.Image]]:
    samples = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
    return {
        **{name: _from_skimage(name) for name in samples},
        "motorcycle_left": lambda: _motorcycle(0),
        "motorcycle_right": lambda: _motorcycle(1),
        "china": lambda: _from_sklearn("china.jpg"),
        "flower": lambda: _from_sklearn("flower.jpg"),
        "grace_hopper": _grace_hopper,
    }


def _from_skimage(name: str) -> Callable[[], Image.Image]:
    return lambda: _skimage_photo(name)


@cache
def _skimage_photo(name: str) -> Image.Image:
    from skimage import data

    return Image.fromarray(getattr(data, name)())


@cache
def _motorcycle(side: int) -> Image.Image:
    from skimage import data

    return Image.fromarray(data.stereo_motorcycle()[side])


@cache
def _from_sklearn(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))


@cache
def _grace_hopper() -> Image.Image:
    from matplotlib import get_data_path

    with Image.open(Path(get_data_path(), "sample_data", "grace_hopper.jpg")) as image:
        return image.convert("RGB")
