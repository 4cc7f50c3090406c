"""What benchmarks.faults.fuzz does to one damaged image, index or shard."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.mutations import mutated_image, mutated_index, mutated_shard

SAMPLES, CLASSES = 40, 7  # of the data set whose index and shards are damaged

DECODED, REFUSED = "decoded", "refused"


def image_item(seed: int, number: int) -> dict[str, Any]:
    """Decode a damaged image on every path; which of them gave pixels, and whether they agree."""
    name, data, original = mutated_image(seed, number)
    rng = random.Random(f"{seed}/{number}/box")
    outcomes, notes = {}, []
    whole = None
    for path, run in image_paths(data, rng).items():
        outcomes[path], result = attempt(run)
        if outcomes[path] not in (DECODED, REFUSED):
            notes.append(f"{path}: {outcomes[path]}")
        whole = result if path == "whole image" else whole
    return {"mutation": name, "outcomes": outcomes, "notes": notes, **compare(data, whole, original, rng)}


def image_paths(data: bytes, rng: random.Random) -> dict[str, Callable[[], Any]]:
    """Every way of ours to look at an image, by what it is called in the report."""
    import torch

    from vitcomposer.data.augment.crop import decode_views
    from vitcomposer.data.boxes import random_resized_box
    from vitcomposer.data.collate import EvalCollate
    from vitcomposer.data.conversion.encode import StoreOptions, store_image
    from vitcomposer.data.conversion.inspect import _decoding_fault
    from vitcomposer.data.jpeg.decode import decode_crop, decode_crop_into, decode_rgb, read_size
    from vitcomposer.data.jpeg.markers import parse_scans
    from vitcomposer.data.jpeg.region import decode_seekable
    from vitcomposer.data.jpeg.seekable import make_seekable

    def box() -> tuple[int, int, int, int]:
        return random_resized_box(rng, *read_size(data), (0.05, 1.0), (0.75, 4 / 3))

    def empty() -> torch.Tensor:
        return torch.empty((32, 32, 3), dtype=torch.uint8).permute(2, 0, 1)

    def any_box() -> tuple[int, int, int, int]:
        low, high = rng.choice(((0, 160), (-10, 70000))), (1, 160)
        return rng.randint(*low), rng.randint(*low), rng.randint(*high), rng.randint(*high)

    evaluate = EvalCollate(image_size=32, crop_ratio=0.875, interpolation="bicubic", num_classes=1)
    return {
        "header": lambda: read_size(data),
        "whole image": lambda: decode_rgb(data),
        "crop": lambda: decode_crop(data, box(), 32),
        "crop at DCT scale": lambda: decode_crop_into(data, box(), empty(), "bilinear", "dct"),
        "crops of one decode": lambda: decode_views(
            data, [box() for _ in range(4)], [empty() for _ in range(4)], "bilinear"
        ),
        "restart segments": lambda: [refusal(decode_seekable(data, any_box())) for _ in range(2)],
        "centre crop": lambda: evaluate([{"image": data, "label": 0, "sample_id": 0}]),
        "markers": lambda: parse_scans(data),
        "conversion to seekable": lambda: make_seekable(data),
        "conversion": lambda: store_image(data, StoreOptions(seekable=True, raw_below=24, short_side=40), "x"),
        "conversion as it is": lambda: store_image(data, StoreOptions(seekable=False)),
        "inspect": lambda: _decoding_fault({"image": ("bytes", data)}),
    }


def refusal(pixels: Any) -> Any:
    if pixels is None:
        raise ValueError("refused")
    return pixels


def attempt(run: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return DECODED, run()
    except ValueError as error:
        return (REFUSED if str(error) else "an error without words"), None
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200], None


def compare(data: bytes, whole: Any, original: bytes, rng: random.Random) -> dict[str, Any]:
    """Ours against Pillow's and torchvision's pixels, and a box of ours against the whole image of ours."""
    import io

    import numpy as np
    import torch
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg

    from vitcomposer.data.jpeg.decode import decode_region, decode_rgb
    from vitcomposer.data.jpeg.pixels import image_formats

    found: dict[str, Any] = {"pillow": "not asked", "torchvision": "not asked", "box": "not asked"}
    if data[:4] == b"\x00RAW":
        return found
    try:
        with Image.open(io.BytesIO(data), formats=image_formats()) as image:
            reference = np.array(image.convert("RGB")) if image.width * image.height < 1 << 24 else None
    except Exception:  # Pillow raises almost anything on damaged data, and each is a refusal
        reference = None
        found["pillow"] = "both refuse" if whole is None else "we alone decode"
    else:
        found["pillow"] = "Pillow alone decodes" if whole is None else "not asked"
        if whole is not None and reference is not None:
            found["pillow"] = "equal" if np.array_equal(whole, reference) else "different"
    if whole is None:
        return found
    if data[:2] == b"\xff\xd8":
        try:
            other = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            apart = np.abs(other.permute(1, 2, 0).numpy().astype(int) - whole)
            found["torchvision"] = "equal" if apart.max() <= 3 else "different"
        except RuntimeError:
            found["torchvision"] = "we alone decode"
    height, width = whole.shape[:2]
    top, left = rng.randrange(height), rng.randrange(width)
    area = top, left, rng.randint(1, height - top), rng.randint(1, width - left)
    outcome, pixels = attempt(lambda: decode_region(data, area))
    if outcome == DECODED:
        same = np.array_equal(pixels, whole[top : top + area[2], left : left + area[3]])
        found["box"] = "equal" if same else "different"
        if not same:  # where libjpeg lost its place at the damage, of which a segment further on knows nothing
            sound = decode_rgb(original)[top : top + area[2], left : left + area[3]]
            found["box"] = "that of the sound file" if np.array_equal(pixels, sound) else "different"
    else:
        found["box"] = outcome
    return found


def data_item(seed: int, number: int, root: Path) -> dict[str, Any]:
    """Read a data set with a damaged index or shard; a label that is not its image's is what must not come out."""
    from vitcomposer.data.conversion.inspect import inspect_data
    from vitcomposer.data.mds.stream import ImageStream, StreamOptions
    from vitcomposer.errors import ConfigError, ShardError

    rng = random.Random(f"{seed}/{number}/data")
    kind = ("index.json", "shard with its hash", "shard without a hash")[number % 3]
    split = root / "damaged" / "train"
    shutil.rmtree(split.parent, ignore_errors=True)
    shutil.copytree(root / "sound", split.parent)
    truth = json.loads((root / "labels.json").read_text())
    if kind == "index.json":
        (split / "index.json").write_bytes(mutated_index((split / "index.json").read_text(), rng))
    else:
        shards = json.loads((split / "index.json").read_text())["shards"]
        entry = rng.choice(shards)
        path = split / entry["raw_data"]["basename"]
        path.write_bytes(mutated_shard(path.read_bytes(), entry["samples"], rng))
    wrong, samples, notes = 0, 0, []

    def read() -> None:
        nonlocal wrong, samples
        options = StreamOptions(validate_hash=None if "without" in kind else "xxh64", max_bad_fraction=1.0)
        stream = ImageStream(
            local=str(split.parent), split="train", batch_size=4, shuffle=bool(number & 1), seed=0, options=options
        )
        for sample in stream:
            samples += 1
            known = truth.get(bytes(sample["image"]).hex()[-80:])
            wrong += known is not None and sample["label"] not in (known, -100)

    try:
        read()
        outcome = DECODED
    except (ConfigError, ShardError) as error:
        outcome = REFUSED if "train" in str(error) else f"an error that names no file: {error}"[:200]
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"[:200]
    inspected, _ = attempt(lambda: inspect_data(split.parent, verify=True, decode=number % 4 == 0))
    for path, each in (("reader", outcome), ("inspect", inspected)):
        if each not in (DECODED, REFUSED):
            notes.append(f"{path}: {each}")
    if wrong and "without" not in kind:
        notes.append(f"{wrong} of {samples} labels are wrong")
    return {"mutation": kind, "outcomes": {"reader": outcome, "inspect": inspected}, "notes": notes, "wrong": wrong}


def write_data(root: Path) -> None:
    """A small data set, and which label belongs to which image."""
    import io

    import numpy as np
    from PIL import Image
    from streaming import MDSWriter

    truth = {}
    columns = {"image": "bytes", "label": "int"}
    folder = str(root / "sound" / "train")
    with MDSWriter(out=folder, columns=columns, hashes=["xxh64"], size_limit=9000) as writer:
        for number in range(SAMPLES):
            file = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "JPEG")
            writer.write({"image": file.getvalue(), "label": number % CLASSES})
            truth[file.getvalue().hex()[-80:]] = number % CLASSES
    (root / "labels.json").write_text(json.dumps(truth))
