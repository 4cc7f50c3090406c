"""How far the pixels of ours, and of the shortcuts that peers take, are from Pillow's full decode and bicubic resize.

    python -m benchmarks.input.quality PHOTOS COUNT

prints a JSON object: for each row its PSNR in dB (mean and 5th percentile over the photos) and largest difference, at
224 pixels in the same random boxes. Ours reads the photo made seekable, everything else reads its file.
"""

import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.nn.functional import interpolate

from benchmarks.input.candidates import SIZE, photo_files
from vitcomposer.data.boxes import Box, random_resized_box
from vitcomposer.data.jpeg.decode import decode_crop
from vitcomposer.data.jpeg.seekable import make_seekable

_NO_DIFFERENCE = 100.0  # dB given to equal images, so that a mean exists

View = Callable[[bytes, Box], np.ndarray]


def measure(photos: Path, count: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    rng = random.Random(0)
    rows: dict[str, list[tuple[float, int]]] = {name: [] for name in _VIEWS}
    files = photo_files(photos)
    for file in files[:: len(files) // count][:count]:
        encoded = file.read_bytes()
        with Image.open(io.BytesIO(encoded)) as image:
            box = random_resized_box(rng, image.height, image.width, (0.08, 1.0), (3 / 4, 4 / 3))
        reference = _pillow(encoded, box, Image.Resampling.BICUBIC)
        for name, view in _VIEWS.items():
            rows[name].append(distance(view(encoded, box), reference))
    return {
        name: {
            "psnr_mean": float(np.mean([psnr for psnr, _ in found])),
            "psnr_p5": float(np.percentile([psnr for psnr, _ in found], 5)),
            "largest_difference": max(difference for _, difference in found),
            "photos": len(found),
        }
        for name, found in rows.items()
    }


def distance(pixels: np.ndarray, reference: np.ndarray) -> tuple[float, int]:
    """PSNR in dB and largest difference of two images of equal shape."""
    difference = np.abs(pixels.astype(np.int16) - reference)
    error = float(np.mean(difference.astype(np.float64) ** 2))
    return (10 * np.log10(255**2 / error) if error else _NO_DIFFERENCE), int(difference.max())


def _ours(encoded: bytes, box: Box) -> np.ndarray:
    return decode_crop(make_seekable(encoded).data, box, SIZE, "bicubic").permute(1, 2, 0).numpy()


def _pillow(encoded: bytes, box: Box, filter: Image.Resampling) -> np.ndarray:
    return _resized(np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")), box, filter)


def _resized(pixels: np.ndarray, box: Box, filter: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(_cut(pixels, box)).resize((SIZE, SIZE), filter))


def _cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    top, left, height, width = box
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def _area(encoded: bytes, box: Box) -> np.ndarray:
    # OpenCV's INTER_AREA averages where it makes both sides smaller and interpolates linearly where not.
    if min(box[2:]) >= SIZE:
        return _pillow(encoded, box, Image.Resampling.BOX)
    return _aliased(encoded, box)


def _aliased(encoded: bytes, box: Box) -> np.ndarray:
    pixels = torch.from_numpy(_cut(np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")), box))
    view = interpolate(pixels.permute(2, 0, 1)[None], (SIZE, SIZE), mode="bilinear", antialias=False)
    return view[0].permute(1, 2, 0).numpy()


def _fast_dct(encoded: bytes, box: Box) -> np.ndarray:
    pixels = simplejpeg.decode_jpeg(encoded, colorspace="RGB", fastdct=True, fastupsample=False)
    return _resized(pixels, box, Image.Resampling.BICUBIC)


def _quality_90(encoded: bytes, box: Box) -> np.ndarray:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(encoded)).convert("RGB").save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    return _pillow(buffer.getvalue(), box, Image.Resampling.BICUBIC)


_VIEWS: dict[str, View] = {
    "vitcomposer": _ours,
    "fast DCT (tf.data, FFCV)": _fast_dct,
    "triangular filter (DALI's default)": lambda encoded, box: _pillow(encoded, box, Image.Resampling.BILINEAR),
    "area filter (FFCV)": _area,
    "bilinear without antialias (tf.data)": _aliased,
    "encoded again at quality 90": _quality_90,
}


def main(photos: str, count: str) -> None:
    print(json.dumps(measure(Path(photos), int(count))))


if __name__ == "__main__":
    main(*sys.argv[1:])
