"""Encodes an image as it is to be stored: its bytes as they are, made seekable, made smaller, or as raw pixels.

Whatever is decoded here is RGB as torchvision's ``pil_loader`` has it, then turned upright by EXIF where that is asked
for. JPEG is written with 4:2:0 chroma at every quality: nearly all photographs come that way, and it is what decodes
fastest.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vitcomposer.data.jpeg import MAX_PIXELS, Reading
from vitcomposer.data.jpeg.markers import INDEX_MAGIC, Markers, parse_markers, without_index
from vitcomposer.data.jpeg.pixels import eight_bits, open_image, scaling
from vitcomposer.data.jpeg.raw import check_jpeg_size, raw_of
from vitcomposer.data.jpeg.upright import exif_orientation, turned, with_mark, without_mark

Exif = Literal["apply", "keep"]
_TURNED = "turned by EXIF"
_T = TypeVar("_T")


@dataclass(frozen=True)
class StoreOptions:
    """How images are stored; the defaults keep every byte, but for the split train.

    Args:
        seekable: Rewrite JPEGs losslessly so that they can be decoded in parts; None does so in the split train.
        short_side: Images whose shorter side is larger are resized to it and stored as JPEG.
        quality: Of these JPEGs.
        raw_fraction: Share of the images that are stored as raw pixels, in [0, 1].
        raw_below: Adds the column ``image_small``: raw pixels of the image with this shorter side, never enlarged.
        small_quality: Stores that column as JPEG of this quality instead.
        reencode: JPEG quality at which other formats, CMYK and the like are stored anew; None keeps them as they are.
        exif: "apply" has images turned by their EXIF orientation, exactly: JPEGs get a mark and are turned by whoever
            decodes them, others are stored as PNG. "keep" leaves it to viewers, as ImageNet's papers do. None is what
            the source says: "apply" for files of one's own, see ``Source.exif``.
        reading: How many pixels an image may have, and what is black and white in 16 and 32 bits and floats. With a
            range such images are stored as grey PNG of 8 bits.
        seed: Of the draw of raw images.

    Raises:
        ValueError: A number out of its range.
    """

    seekable: bool | None = None
    short_side: int | None = None
    quality: int = 95
    raw_fraction: float = 0.0
    raw_below: int | None = None
    reencode: int | None = None
    exif: Exif | None = None
    reading: Reading = Reading()
    seed: int = 0
    small_quality: int | None = None

    def __post_init__(self) -> None:
        for name in ("short_side", "raw_below"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"{_flag(name)} must be 1 pixel or more, got {value}. Leave it out to keep all pixels."
                )
        for name in ("quality", "reencode", "small_quality"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 100:
                raise ValueError(f"{_flag(name)} must be a JPEG quality from 1 to 100, got {value}. 95 is usual.")
        if self.small_quality is not None and self.raw_below is None:
            raise ValueError(
                f"--small-quality must be left out without a column image_small, got {self.small_quality}. "
                "Add --raw-below 160, or --for with a recipe that reads it."
            )
        if not 0 <= self.raw_fraction <= 1:
            raise ValueError(
                f"--raw-fraction must be in [0, 1], got {self.raw_fraction}. 0.5 stores every other one raw."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of bytes."""
        return ("image", "image_small") if self.raw_below else ("image",)

    def recorded(self) -> dict[str, Any]:
        """What decides the bytes of a data set, by the names of the command line."""
        names = ("seekable", "short_side", "raw_fraction", "raw_below", "reencode")
        record: dict[str, Any] = {_flag(name): getattr(self, name) for name in names}
        record["--quality"] = self.quality if self.short_side else None
        if self.small_quality is not None:
            record["--small-quality"] = self.small_quality
        if self.exif == "apply":
            record["--exif"] = self.exif
        if self.reading.value_range is not None:
            record["--range"] = list(self.reading.value_range)
        if self.reading.max_pixels != MAX_PIXELS:
            record["--max-pixels"] = self.reading.max_pixels
        return record


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Stored(NamedTuple):
    """One image as it is stored; ``outcome`` says in a few words what was done, to be counted."""

    columns: tuple[bytes, ...]  # as StoreOptions.columns names them
    outcome: str
    format: str  # these three of the image as it came
    width: int
    height: int


def store_image(data: bytes, options: StoreOptions, name: str = "") -> Stored:
    """Decide what is stored for an image, after Pillow has decoded it to its last pixel.

    Args:
        data: The encoded image.
        options: As given for the split; ``seekable`` None counts as off, ``exif`` None as "keep".
        name: Of the image; with the seed it decides whether the image is stored raw.

    Raises:
        ValueError: The reason why it cannot be decoded.

    It is read as ``vitcomposer.data.jpeg`` says; ``options.reading`` is what a conversion sets there.
    """
    data = without_mark(data)  # only what is decided here turns an image
    picture = _Picture(data, upright=options.exif == "apply")
    picture.decode()  # first, and for every way of storing: what training refuses, no split may hold
    if _share(options.seed, name) < options.raw_fraction:
        image, outcome = raw_sample(shrink(picture.decode(), options.short_side)), "raw"
    elif options.short_side and min(picture.size) > options.short_side:
        resized = _encode(shrink(picture.decode(), options.short_side), options.quality)
        image, outcome = _made_seekable(resized) if options.seekable else resized, "resized"
    elif picture.scaling and options.reading.value_range:
        image, outcome = _encode_png(picture.decode()), picture.scaling  # readers need not know the range
    else:
        image, outcome = _keep(data, picture, options)
    if image is data and picture.scaling:
        outcome = f"kept: {picture.scaling} when read"
    if picture.orientation != 1:
        outcome += f", {_TURNED}"
    small = (_small(picture.decode(), options),) if options.raw_below else ()
    return Stored((image, *small), outcome, picture.format, *picture.size)


def _small(image: Image.Image, options: StoreOptions) -> bytes:
    """The column ``image_small`` of an image."""
    smaller = shrink(image, options.raw_below)
    if options.small_quality is None:
        return raw_sample(smaller)
    encoded = _encode(smaller, options.small_quality)
    return _made_seekable(encoded) if options.seekable else encoded


def raw_sample(image: Image.Image) -> bytes:
    """Pixels as they are stored: a head of 16 bytes, then RGB."""
    return raw_of(np.asarray(image.convert("RGB")))


def shrink(image: Image.Image, short_side: int | None) -> Image.Image:
    """The image with this shorter side, bicubic with antialiasing; as it is where it is not larger.

    The longer side is rounded down, as torchvision's Resize does.
    """
    if short_side is None or min(image.size) <= short_side:
        return image
    width, height = (max(side * short_side // min(image.size), 1) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


class _Picture:
    """An encoded image that is decoded when it must be, once; ``size`` is that of the upright one.

    Pillow stops at a file that ends early (its LOAD_TRUNCATED_IMAGES is off). Of an animation only the first frame is
    decoded.
    """

    def __init__(self, data: bytes, *, upright: bool = False) -> None:
        if not data:
            raise ValueError("the file is empty")
        self._pixels: np.ndarray | None = None
        self._fault: str | None = None
        self._image = open_image(data)
        self.scaling = scaling(self._image)  # how more than 8 bits become 8
        self.orientation = exif_orientation(self._image) if upright else 1
        self.format, self.size = str(self._image.format), self._image.size
        if self.orientation > 4:  # lies on a side
            self.size = self.size[::-1]
        if data[:2] == b"\xff\xd8":
            check_jpeg_size(self._image.height, self._image.width, data)

    def check(self) -> None:
        """Decode to the last pixel.

        Raises:
            ValueError: The reason why that cannot be, the same each time: Pillow itself takes a broken image for
                loaded when it is asked again.
        """
        try:
            if self._fault is None:
                _explained(self._image.load)
        except ValueError as error:
            self._fault = str(error)
        if self._fault is not None:
            raise ValueError(self._fault)

    def decode(self) -> Image.Image:
        """RGB, or gray as it came: resized and encoded as such it gives the same pixels, in fewer bytes."""
        return Image.fromarray(turned(self.stored_pixels(), self.orientation))

    def stored_pixels(self) -> np.ndarray:
        """What ``decode`` gives before it is turned, uint8 (height, width, 3), or (height, width) of gray."""
        self.check()
        if self._pixels is None:
            self._pixels = np.asarray(_explained(lambda: eight_bits(self._image)))
        return self._pixels


def _explained(decode: Callable[[], _T]) -> _T:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks and palettes do not keep an image from being used
            return decode()
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Exception as error:  # decoders raise almost anything on damaged input: SyntaxError, struct.error, ...
        raise ValueError(str(error) or type(error).__name__) from error


def _keep(data: bytes, picture: _Picture, options: StoreOptions) -> tuple[bytes, str]:
    """The image with all its pixels: as it came, or seekable or re-encoded where options and image allow it."""
    is_jpeg = data[:2] == b"\xff\xd8"
    if is_jpeg:
        data = _without_wrong_index(data, picture)
        data = data if picture.orientation == 1 else with_mark(data, picture.orientation)
    elif picture.orientation != 1 and not options.reencode:
        return _encode_png(picture.decode()), f"PNG of {picture.format}"
    if not options.seekable and not options.reencode:
        return data, "kept"
    reason = picture.format
    if is_jpeg:
        from vitcomposer.data.jpeg.seekable import unsupported

        try:
            markers = parse_markers(data)
            reason = unsupported(markers)
            if not reason and options.seekable:
                return _rewrite(data, picture, markers)
        except ValueError:  # Pillow, and with it training, reads it all the same
            return data, "kept: damaged"
    if not reason:
        return data, "kept"
    if not options.reencode:
        return data, f"kept: {reason}"
    encoded = _encode(picture.decode(), options.reencode)
    return _made_seekable(encoded) if options.seekable else encoded, f"re-encoded: {reason}"


def _without_wrong_index(data: bytes, picture: _Picture) -> bytes:
    """The JPEG without an index that somebody else made and that leads the region decoder to other pixels."""
    from vitcomposer.data.jpeg.region import decodes_to

    if data[2:4] != b"\xff\xeb" or data[6:14] != INDEX_MAGIC or decodes_to(data, picture.stored_pixels()):
        return data
    return without_index(data)


def _rewrite(data: bytes, picture: _Picture, markers: Markers) -> tuple[bytes, str]:
    """The JPEG made seekable, as it came where one pixel would differ."""
    from vitcomposer.data.jpeg.seekable import make_seekable, verify

    made = make_seekable(data)
    outcome = "seekable from progressive" if markers.progressive else "seekable"
    outcome += ", EXIF rotation kept" if markers.orientation != picture.orientation else ""
    if made.how == "already" or (made.how != "unchanged" and verify(picture.stored_pixels(), made.data)):
        return made.data, outcome
    return data, f"kept: {made.reason or 'pixels would differ'}"


def _made_seekable(jpeg: bytes) -> bytes:
    from vitcomposer.data.jpeg.seekable import make_seekable, verify

    made = make_seekable(jpeg).data
    return made if verify(_Picture(jpeg).stored_pixels(), made) else jpeg


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    _explained(lambda: image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0"))
    return buffer.getvalue()


def _encode_png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _share(seed: int, name: str) -> float:
    """A number in [0, 1) drawn from seed and name, and from nothing else."""
    digest = hashlib.blake2b(os.fsencode(f"{seed}/raw/{name}"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
