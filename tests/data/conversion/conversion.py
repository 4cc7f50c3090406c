"""What the tests of conversion share: images, folders of them, and what came out."""

import gzip
import hashlib
import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, width: int = 40, height: int = 30, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_images(folder: Path, classes: dict[str, int], seed: int = 0, size: int = 40) -> None:
    for index, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number:03}.JPEG").write_bytes(jpeg(seed + 1000 * index + number, width=size))


def tree(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def items(out: Path, split: str) -> list[list]:
    return json.loads(gzip.decompress((out / ".convert" / split / "items.json.gz").read_bytes()))


def read_shards(out: Path, split: str) -> list[tuple[bytes, int]]:
    """What Streaming's own reader finds; without the shared memory that a StreamingDataset takes on the machine."""
    from streaming.base.format import reader_from_json

    shards = json.loads((out / split / "index.json").read_text())["shards"]
    readers = [reader_from_json(str(out), split, shard) for shard in shards]
    return [
        (sample["image"], int(sample["label"]))
        for reader in readers
        for sample in map(reader.get_item, range(len(reader)))
    ]


def stream(local: Path, split: str, remote: str | None = None) -> list[tuple[bytes, int]]:
    from streaming import StreamingDataset

    from vitcomposer.data.mds.shared_memory import one_start_at_a_time

    with one_start_at_a_time():
        data = StreamingDataset(
            local=str(local), remote=remote, split=split, shuffle=False, batch_size=1, validate_hash="xxh64"
        )
    samples = [data[i] for i in range(len(data))]
    return [(sample["image"], int(sample["label"])) for sample in samples]


def run_cli(*args: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vitcomposer", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, **options)
