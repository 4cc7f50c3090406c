"""Unpacks compressed shards to the size that their index says, and no byte more: 67 kB of zstd can hold gigabytes."""

import bz2
import zlib
from collections.abc import Callable
from typing import Any, cast

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_GZIP = 31  # wbits of zlib


def unpack(compression: str, data: bytes, size: int) -> bytes:
    """What Streaming's ``decompress`` gives, if that has ``size`` bytes.

    Args:
        compression: Of an index, such as ``zstd:3``.

    Raises:
        ValueError: It has another size, is damaged, or of a compression that Streaming does not know.
    """
    known: dict[str, Callable[[bytes, int], bytes]] = {
        "br": _brotli,
        "bz2": lambda data, size: _to_the_end(bz2.BZ2Decompressor, data, size),
        "gz": lambda data, size: _to_the_end(lambda: zlib.decompressobj(_GZIP), data, size),
        "snappy": _snappy,
        "zstd": _zstd,
    }
    make = known.get(compression.partition(":")[0])
    if make is None:
        raise ValueError(f"its compression {compression!r} is not one of {', '.join(known)}")
    try:
        found = make(data, size)
    except _OtherSizeError:
        raise ValueError(f"it unpacks to another size than the {size} bytes of its index") from None
    except Exception as error:  # each library has its own
        raise ValueError(f"it cannot be unpacked: {type(error).__name__}: {error}") from error
    if len(found) != size:
        raise ValueError(f"it unpacks to {len(found)} bytes, its index says {size}")
    return found


class _OtherSizeError(Exception):
    pass


def _to_the_end(begin: Callable[[], Any], data: bytes, size: int) -> bytes:
    """Of one stream or several, one after another, as bz2 and gzip files may be."""
    found = bytearray()
    while data:
        stream = begin()
        found += stream.decompress(data, size - len(found) + 1)
        if len(found) > size or not stream.eof:
            raise _OtherSizeError
        data = stream.unused_data
    return bytes(found)


def _brotli(data: bytes, size: int) -> bytes:
    import brotli  # of Streaming, as the next two

    stream = brotli.Decompressor()
    found = bytearray(stream.process(data, output_buffer_limit=size + 1))
    while not stream.is_finished() and len(found) <= size:
        more = stream.process(b"", output_buffer_limit=size + 1)
        if not more:
            break
        found += more
    if len(found) > size or not stream.is_finished():
        raise _OtherSizeError
    return bytes(found)


def _snappy(data: bytes, size: int) -> bytes:
    import snappy

    stated, shift = 0, 0
    for byte in data[:5]:  # seven bits each, the lowest first
        stated |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    if stated != size:
        raise _OtherSizeError
    return cast(bytes, snappy.decompress(data))


def _zstd(data: bytes, size: int) -> bytes:
    import zstd

    if _zstd_size(data) != size:
        raise _OtherSizeError
    return bytes(zstd.decompress(data))


def _zstd_size(data: bytes) -> int:
    """What the header of the one frame says, which the library asks memory for (RFC 8878, section 3.1.1)."""
    described = data[4] if data.startswith(_ZSTD_MAGIC) and len(data) > 4 else 0
    single, dictionary_bytes = described >> 5 & 1, (0, 1, 2, 4)[described & 3]
    size_bytes = (single, 2, 4, 8)[described >> 6]
    place = 5 + (not single) + dictionary_bytes
    if not size_bytes or _zstd_end(data, place + size_bytes, checksum=described >> 2 & 1) != len(data):
        raise _OtherSizeError
    stated = int.from_bytes(data[place : place + size_bytes], "little")
    return stated + 256 if size_bytes == 2 else stated


def _zstd_end(data: bytes, place: int, *, checksum: int) -> int:
    """Where the frame ends whose blocks begin at ``place``: another one behind it would have a size of its own."""
    last = 0
    while not last:
        header = int.from_bytes(data[place : place + 3], "little")
        if place + 3 > len(data):
            raise _OtherSizeError
        last, kind, length = header & 1, header >> 1 & 3, header >> 3
        place += 3 + (1 if kind == 1 else length)  # 1: one byte, repeated
    return place + 4 * checksum
