"""Damaged inputs for benchmarks.faults.fuzz: every item follows from a seed and its number."""

import io
import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

MARKERS = (0xC0, 0xC1, 0xC2, 0xC4, 0xC9, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xEB, 0xEE, 0xFE, 0x00, 0xFF)
SIZES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 255, 4096, 16384, 32767, 65500, 65535)


@cache
def originals() -> dict[str, bytes]:
    """Sound images in every form that is read, small so that most damage hits something."""
    from vitcomposer.data.conversion.encode import raw_sample
    from vitcomposer.data.jpeg.seekable import make_seekable

    rng = np.random.default_rng(0)
    grid = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    photo = Image.fromarray(grid).resize((151, 110), Image.Resampling.BICUBIC)
    noise = rng.integers(-12, 12, (110, 151, 3))
    photo = Image.fromarray(np.clip(np.asarray(photo) + noise, 0, 255).astype(np.uint8))

    def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    plain = {
        "baseline 4:2:0": encode(photo, quality=85, subsampling="4:2:0"),
        "baseline 4:4:4": encode(photo, quality=92, subsampling="4:4:4"),
        "gray": encode(photo.convert("L"), quality=80),
        "progressive": encode(photo, quality=85, progressive=True),
        "optimized": encode(photo, quality=75, optimize=True, subsampling="4:2:2"),
        "restarts": encode(photo, quality=85, restart_marker_blocks=3),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        **plain,
        **{f"seekable {name}": make_seekable(data).data for name, data in plain.items()},
        "EXIF": encode(photo, quality=85, exif=exif),
        "CMYK": encode(photo.convert("CMYK"), quality=85),
        "PNG": encode(photo, "PNG"),
        "raw": raw_sample(photo),
    }


def _frame(data: bytes) -> int:
    """Where a JPEG's height stands, 0 where there is none."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        if data[at + 1] in (0xC0, 0xC1, 0xC2):
            return at + 5
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def _scan(data: bytes) -> int:
    return max(data.find(b"\xff\xda"), 4)


def _flip(data: bytearray, rng: random.Random, low: int, high: int, count: int) -> bytes:
    for _ in range(count):
        data[rng.randrange(low, max(high, low + 1))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _flip_anywhere(data: bytes, rng: random.Random) -> bytes:
    return _flip(bytearray(data), rng, 2, len(data), rng.choice((1, 1, 2, 4, 32)))


def _flip_header(data: bytes, rng: random.Random) -> bytes:
    return _flip(bytearray(data), rng, 2, _scan(data), rng.choice((1, 1, 2, 4)))


def _flip_scan(data: bytes, rng: random.Random) -> bytes:
    return _flip(bytearray(data), rng, _scan(data), len(data), rng.choice((1, 1, 2, 8)))


def _truncate(data: bytes, rng: random.Random) -> bytes:
    kept = data[: rng.randrange(len(data))]
    return kept + b"\xff\xd9" if rng.random() < 0.3 else kept


def _marker(data: bytes, rng: random.Random) -> bytes:
    """Another marker in place of one, or one where none was."""
    changed = bytearray(data)
    found = [i for i in range(2, len(data) - 1) if data[i] == 0xFF and data[i + 1] not in (0, 0xFF)]
    at = rng.choice(found) if found and rng.random() < 0.7 else rng.randrange(2, len(data) - 2)
    changed[at : at + 2] = bytes((0xFF, rng.choice(MARKERS)))
    return bytes(changed)


def _length(data: bytes, rng: random.Random) -> bytes:
    """Another length in a marker segment."""
    places, at = [], 2
    while at + 4 < len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        places.append(at + 2)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    changed = bytearray(data)
    at = rng.choice(places or [2])
    value = rng.choice((0, 1, 2, 3, 8, 65535, int.from_bytes(data[at : at + 2], "big") + rng.randint(-4, 4)))
    changed[at : at + 2] = (value & 0xFFFF).to_bytes(2, "big")
    return bytes(changed)


def _size(data: bytes, rng: random.Random) -> bytes:
    """Another height, width or sampling in the header."""
    changed, at = bytearray(data), _frame(data)
    if at:
        for place in rng.choice(((at,), (at + 2,), (at, at + 2))):
            changed[place : place + 2] = rng.choice(SIZES).to_bytes(2, "big")
        if rng.random() < 0.2 and at + 6 < len(changed):
            changed[at + 6] = rng.choice((0x11, 0x12, 0x21, 0x22, 0x41, 0x44, 0x00, 0x31))
    else:
        changed[4 + rng.randrange(12)] = rng.randrange(256)
    return bytes(changed)


def _index(data: bytes, rng: random.Random) -> bytes:
    """Other numbers in the index of a seekable file."""
    changed = bytearray(data)
    end = 4 + int.from_bytes(data[4:6], "big") if data[6:14] == b"vitseek1" else _scan(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(14, end - 2), end - 1)
        changed[at : at + 2] = rng.choice((0, 1, 255, 65535, rng.randrange(65536))).to_bytes(2, "little")
    return bytes(changed)


def _splice(data: bytes, rng: random.Random) -> bytes:
    """The beginning of a file and the end of another."""
    other = rng.choice(list(originals().values()))
    if rng.random() < 0.5:
        return data[: _scan(data)] + other[_scan(other) :]
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def _shift(data: bytes, rng: random.Random) -> bytes:
    """Bytes taken out, put in or repeated."""
    at, size = rng.randrange(2, len(data)), rng.choice((1, 2, 3, 16, 200))
    middle = (b"", rng.randbytes(size), data[at : at + size] * 2)[rng.randrange(3)]
    return data[:at] + middle + data[at + (size if not middle else 0) :]


def _random(data: bytes, rng: random.Random) -> bytes:
    body = rng.randbytes(rng.choice((0, 1, 3, 20, 500, 5000)))
    return rng.choice((b"", b"\xff\xd8", b"\x00RAW", data[: _scan(data)], data[: _scan(data) + 14])) + body


def _block(data: bytes, rng: random.Random) -> bytes:
    """A block of 512 random bytes behind the header, as a disk or a download may leave it."""
    at = rng.randrange(_scan(data), max(len(data) - 512, _scan(data) + 1))
    return data[:at] + rng.randbytes(512) + data[at + 512 :]


def _foreign_tail(data: bytes, rng: random.Random) -> bytes:
    """From some byte of the scan on those of another file, at the same place."""
    other = rng.choice(list(originals().values()))
    at = rng.randrange(_scan(data), len(data))
    return data[:at] + other[at:]


def _cut_behind_marker(data: bytes, rng: random.Random) -> bytes:
    """A scan that ends at a marker of any kind, and the file with it or a few bytes on."""
    at, marker = (
        rng.randrange(_scan(data), len(data)),
        rng.choice((0xD0, 0xD3, 0xD7, 0xDA, 0xE0, 0xE5, 0xF9, 0xFE, 0xC4)),
    )
    return data[:at] + bytes((0xFF, marker)) + rng.randbytes(rng.choice((0, 1, 2, 4, 12)))


def _cut_in_segment(data: bytes, rng: random.Random) -> bytes:
    """A scan that ends in an APP5 segment, and a file that ends in it or in what follows."""
    at, size = rng.randrange(_scan(data), len(data)), rng.choice((16, rng.randrange(2, 65536)))
    return data[:at] + b"\xff\xe5" + size.to_bytes(2, "big") + rng.randbytes(rng.randrange(2000))


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits flipped anywhere": _flip_anywhere,
    "bits flipped in the header": _flip_header,
    "bits flipped in the scan": _flip_scan,
    "truncated": _truncate,
    "marker changed": _marker,
    "segment length changed": _length,
    "image size changed": _size,
    "restart index changed": _index,
    "spliced": _splice,
    "bytes shifted": _shift,
    "random bytes": _random,
    "block overwritten": _block,
    "foreign tail": _foreign_tail,
    "cut behind a marker": _cut_behind_marker,
    "cut in a segment": _cut_in_segment,
}


def mutated_image(seed: int, number: int) -> tuple[str, bytes, bytes]:
    """The mutation's name, a damaged image and the sound one; seekable files come half of the time."""
    rng = random.Random(f"{seed}/{number}")
    names = list(originals())
    seekable = [name for name in names if name.startswith("seekable")]
    original = originals()[rng.choice(seekable if rng.random() < 0.5 else names)]
    name = list(MUTATIONS)[number % len(MUTATIONS)]
    data = MUTATIONS[name](original, rng)
    if rng.random() < 0.15:  # on top of it
        data = _flip_anywhere(data, rng) if len(data) > 3 else data
    return name, data, original


VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 2**31, 2**63, 2**70, 1.5, "", "x", "../x", [], {}, [1], {"a": 1})


def mutated_index(text: str, rng: random.Random) -> bytes:
    """An index.json with a value changed, taken away or doubled, or with other bytes."""
    if rng.random() < 0.3:
        data = bytearray(text.encode())
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)
    index = json.loads(text)
    parents: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            parents.append((node, key))
            collect(node[key])

    collect(index)
    shards = [(index, "version"), (index, "shards")]
    node, key = rng.choice(shards) if rng.random() < 0.1 else rng.choice(parents)
    action = rng.randrange(4)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node[key], int) and not isinstance(node[key], bool):
        node[key] += rng.choice((-1, 1, 7, -(10**6), 10**6, 10**12))
    elif action == 2 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(index).encode()


def mutated_shard(data: bytes, samples: int, rng: random.Random) -> bytes:
    """A shard of the same length or another: its table, its heads or its bytes."""
    changed = bytearray(data)
    table = 4 * (samples + 2)
    kind = rng.randrange(5)
    if kind == 0:
        return _flip(changed, rng, 0, table, rng.choice((1, 2, 4)))
    if kind == 1:
        at = 4 * rng.randrange(samples + 2)
        changed[at : at + 4] = rng.choice((0, 1, len(data), 2**31, 2**32 - 1, rng.randrange(2**32))).to_bytes(
            4, "little"
        )
        return bytes(changed)
    if kind == 2:
        begin = int.from_bytes(data[4 + 4 * rng.randrange(samples) :][:4], "little")
        changed[begin : begin + 4] = rng.choice((0, 1, len(data), 2**32 - 1)).to_bytes(4, "little")
        return bytes(changed)
    if kind == 3:
        return bytes(changed[: rng.randrange(len(data))])
    return _flip(changed, rng, 0, len(data), rng.choice((1, 8, 64)))
