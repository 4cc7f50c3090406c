"""Makes small pictures of images of the validation split, to be put into a page."""

import base64
import hashlib
import struct
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vitcomposer.data.conversion.inspect import columns_of_row, read_shard_index
from vitcomposer.data.jpeg.pixels import eight_bits, open_image
from vitcomposer.data.jpeg.raw import raw_pixels, raw_sample, read_raw_size
from vitcomposer.data.jpeg.upright import read_mark, turned
from vitcomposer.data.mds.index import IMAGE_COLUMNS, IMAGE_ENCODINGS, INDEX
from vitcomposer.report.story import Story

SIDE = 112  # pixels
_QUALITY = 75
_MOST_BYTES = 1 << 26  # of a sample


def find_photos(story: Story, sample_ids: Iterable[int]) -> tuple[dict[int, str], str]:
    """Squares from the middle of images as data addresses, by ``sample_id``, and why some are not there.

    The shards are looked for where the run read them, and taken only if their index is the one that the run began with.
    """
    wanted = sorted(set(sample_ids))
    if not wanted:
        return {}, ""
    recorded = story.images.get("val")
    if not isinstance(recorded, dict) or recorded.get("source") != "mds" or not recorded.get("index"):
        return {}, "There are no pictures: the images are synthetic, or the run did not note which they were."
    folder = Path(str(story.settings.get("data.local")), str(story.settings.get("data.val_split")))
    try:
        content = (folder / INDEX).read_bytes()
    except OSError:
        return {}, f"There are no pictures: the images of the run are not in {folder} on this machine."
    if hashlib.sha256(content).hexdigest() != recorded["index"]:
        return {}, f"There are no pictures: {folder} holds other images than those of the run."
    try:
        shards = read_shard_index(content, str(folder / INDEX))
    except ValueError as error:
        return {}, f"There are no pictures: {error}"
    found: dict[int, str] = {}
    for sample_id in wanted:
        try:
            found[sample_id] = small_picture(_encoded(folder, shards, sample_id))
        except MemoryError:
            raise  # the machine's fault, not the image's
        except Exception:  # whatever an image is, it ends no pictures of others
            continue
    missing = len(wanted) - len(found)
    return found, f"{missing} pictures are not there: their shards are not on this machine." if missing else ""


def _encoded(folder: Path, shards: list[dict[str, Any]], sample_id: int) -> bytes:
    """The image of a sample, as it is stored."""
    first = 0
    for shard in shards:
        if sample_id < first + shard["samples"]:
            with (folder / shard["raw_data"]["basename"]).open("rb") as file:
                return _image_of(_row(file, sample_id - first), shard)
        first += shard["samples"]
    raise ValueError(f"there is no sample {sample_id}")


def _row(file: BinaryIO, row: int) -> bytes:
    file.seek(4 * (row + 1))
    begin, end = struct.unpack("<2I", file.read(8))
    if not 0 <= end - begin <= _MOST_BYTES:
        raise ValueError(f"a sample must have at most {_MOST_BYTES} bytes, its shard says {end - begin}")
    file.seek(begin)
    return file.read(end - begin)


def _image_of(row: bytes, shard: dict[str, Any]) -> bytes:
    for name, (encoding, value) in columns_of_row(row, shard).items():
        if name in IMAGE_COLUMNS and encoding in IMAGE_ENCODINGS:
            return raw_sample(memoryview(value)) if encoding == "pil" else value
    raise ValueError("there is no column with an image")


def small_picture(encoded: bytes) -> str:
    """An encoded image, upright as the network sees it, as the data address of a square from its middle."""
    if read_raw_size(encoded) is not None:
        image = Image.fromarray(raw_pixels(encoded))
    else:
        image = open_image(encoded)
        image.draft("RGB", (2 * SIDE, 2 * SIDE))  # a JPEG of 12 million pixels in a tenth of the time
        image = Image.fromarray(turned(np.asarray(eight_bits(image).convert("RGB")), read_mark(encoded)))
    # Handwritten digits of 8 x 8 pixels keep their edges.
    method = Image.Resampling.NEAREST if min(image.size) <= SIDE // 3 else Image.Resampling.BICUBIC
    buffer = BytesIO()
    ImageOps.fit(image, (SIDE, SIDE), method).save(buffer, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
