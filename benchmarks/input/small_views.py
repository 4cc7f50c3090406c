"""How far views cut from the column ``image_small`` are from those of the whole image, on a folder of photographs.

    python -m benchmarks.input.small_views FOLDER --source TEXT

FOLDER holds JPEG files at any depth. For views of 96 and 128 pixels ``convert --for`` stores a shorter side of 160 and
214; photographs that are not larger are left out. Each photograph gives four crops, drawn in the small image as a run
draws them; the reference is Pillow's bicubic resize of the same region of the whole image, between pixels where its
edges lie there. Rows below the first two are shortcuts of other loaders, for scale. Writes ``small_views.md`` and
``.json`` into the folder --out.
"""

import argparse
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import RESULTS
from benchmarks.input.quality import distance
from vitcomposer.data.boxes import Box, random_resized_box
from vitcomposer.data.conversion.encode import StoreOptions, store_image
from vitcomposer.data.jpeg.decode import decode_crop, decode_rgb, read_size
from vitcomposer.data.mds.small_column import needed_side

VIEWS = (96, 128)
CROPS = 4  # of each photograph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", required=True, help="name of the set and where it comes from")
    parser.add_argument("--photos", type=int, default=400, help="at most so many (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    files = sorted(args.folder.rglob("*.jpg"))
    photos = [file.read_bytes() for file in files[:: -(-len(files) // args.photos)]]
    report = {"source": args.source, "views": {str(view): measure(photos, view) for view in VIEWS}}
    (args.out / "small_views.json").write_text(json.dumps(report, indent=1) + "\n")
    text = _markdown(report)
    (args.out / "small_views.md").write_text(text)
    print(text)


def measure(photos: list[bytes], view: int) -> dict[str, Any]:
    """Distances of each kind of view from that of the whole image, and how many crops are enlarged."""
    side = needed_side(view)
    larger = [photo for photo in photos if min(read_size(photo)) > side]
    found: dict[str, list[tuple[float, float, int]]] = {}
    enlarged = {"image": 0, "image_small": 0}
    for number, photo in enumerate(larger):
        raw, jpeg = (store_image(photo, StoreOptions(raw_below=side, small_quality=q)).columns[1] for q in (None, 90))
        images = {name: Image.fromarray(decode_rgb(e)) for name, e in (("whole", photo), ("again", _again(photo)))}
        for seed in range(number * CROPS, (number + 1) * CROPS):
            box = _draw(seed, raw)
            enlarged["image_small"] += box[2] * box[3] < view**2
            enlarged["image"] += np.prod(_draw(seed, photo)[2:]) < view**2
            region = _scaled(box, read_size(raw), read_size(photo))
            whole = _cut(images["whole"], region, view, Image.Resampling.BICUBIC)
            views = {
                "image_small": _decoded(raw, box, view),
                "image_small, JPEG of quality 90": _decoded(jpeg, box, view),
                "image, bilinear filter": _cut(images["whole"], region, view, Image.Resampling.BILINEAR),
                "image, encoded again at quality 90": _cut(images["again"], region, view, Image.Resampling.BICUBIC),
            }
            for name, pixels in views.items():
                found.setdefault(name, []).append((float(np.abs(pixels - whole).mean()), *distance(pixels, whole)))
    crops = len(larger) * CROPS
    return {
        "side": side,
        "photos": len(larger),
        "mean_shorter_side": float(np.mean([min(read_size(photo)) for photo in larger])),
        "crops": crops,
        "enlarged": {name: count / crops for name, count in enlarged.items()},
        "rows": {name: _summary(rows) for name, rows in found.items()},
    }


def _again(photo: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(decode_rgb(photo)).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    return buffer.getvalue()


def _draw(seed: int, encoded: bytes) -> Box:
    return random_resized_box(random.Random(seed), *read_size(encoded), (0.08, 1.0), (3 / 4, 4 / 3))


def _scaled(box: Box, small: tuple[int, int], whole: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge in the whole image of a box in the small one."""
    rows, columns = (large / little for large, little in zip(whole, small, strict=True))
    top, left, height, width = box
    return left * columns, top * rows, min((left + width) * columns, whole[1]), min((top + height) * rows, whole[0])


def _cut(image: Image.Image, region: tuple[float, ...], view: int, filter: Image.Resampling) -> np.ndarray:
    return np.asarray(image.resize((view, view), filter, box=region), np.int16)  # (view, view, 3)


def _decoded(encoded: bytes, box: Box, view: int) -> np.ndarray:
    return decode_crop(encoded, box, view).permute(1, 2, 0).numpy().astype(np.int16)  # (view, view, 3)


def _summary(rows: list[tuple[float, float, int]]) -> dict[str, float]:
    differences, ratios, largest = (np.array(column) for column in zip(*rows, strict=True))
    return {
        "mean_absolute_difference": float(differences.mean()),
        "psnr_mean": float(ratios.mean()),
        "psnr_p5": float(np.percentile(ratios, 5)),
        "largest_difference": int(largest.max()),
    }


def _markdown(report: dict) -> str:
    lines = [
        "# Small views from the column image_small, against those of the whole image",
        "",
        f"Photographs: {report['source']}. RandomResizedCrop of 0.08 to 1 of the area, bicubic, {CROPS} crops of",
        "each, against Pillow's resize of the same region of the whole image. A run draws other positions in the",
        "smaller image than in the whole one, from the same distribution.",
        "Made by `python -m benchmarks.input.small_views`.",
    ]
    for view, found in report["views"].items():
        whole, small = (100 * found["enlarged"][name] for name in ("image", "image_small"))
        lines += [
            "",
            f"## Views of {view} px, shorter side {found['side']}",
            "",
            f"{found['photos']} photographs with a mean shorter side of {found['mean_shorter_side']:.0f}, "
            f"{found['crops']:,} crops. Enlarged, as having fewer pixels than the view: {small:.1f} % of those of "
            f"image_small, {whole:.1f} % of those of the whole image.",
            "",
            "| | mean absolute difference, of 255 | PSNR mean / 5th percentile, dB | largest |",
            "|---|---|---|---|",
        ]
        for name, row in found["rows"].items():
            psnr = f"{row['psnr_mean']:.1f} / {row['psnr_p5']:.1f}"
            lines.append(f"| {name} | {row['mean_absolute_difference']:.2f} | {psnr} | {row['largest_difference']} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
