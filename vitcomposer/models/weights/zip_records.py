"""Reads the records of a torch file: an uncompressed zip archive, read by one strict meaning of its directory.

The format is PKWARE's APPNOTE 6.3.10. What torch never writes is refused: compression, records that overlap or share a
name, a directory that says something else than the records' own headers, bytes after the end. So a byte that is read
belongs to one record, and what is read is never more than the file.
"""

import os
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

import xxhash

_LOCAL, _CENTRAL, _END, _END64, _LOCATOR64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
_LOCAL_BYTES, _CENTRAL_BYTES, _END_BYTES, _END64_BYTES, _LOCATOR64_BYTES = 30, 46, 22, 56, 20
_ALL32 = 0xFFFFFFFF  # "see the zip64 field"
_ALL_ONES = (*[0xFFFF] * 4, _ALL32, _ALL32)  # the same of each field of the end
_ENCRYPTED = 0x1
_PIECE = 1 << 20
_MOST_RECORDS = 1 << 15  # of a small file; each costs a few hundred bytes of memory

DIGEST = b"vitcomposer xxh3_128 "  # then 32 hexadecimal digits: the archive's comment
_COMMENT_BYTES = len(DIGEST) + 32


class DamagedError(ValueError):
    """A file is not what its writer left."""


class FileSlice:
    """``length`` bytes of an open file from ``start`` on; positions are counted from there."""

    def __init__(self, file: BinaryIO, start: int = 0, length: int | None = None) -> None:
        self._handle, self._start = file.fileno(), start
        rest = os.fstat(self._handle).st_size - start
        self.length = rest if length is None else length
        if start < 0 or self.length < 0 or rest < self.length:
            raise DamagedError("cut short")

    def fill(self, place: memoryview, position: int) -> None:
        """Read as many bytes as ``place`` has."""
        if position < 0 or position + len(place) > self.length:
            raise DamagedError("cut short")
        while len(place):
            count = os.preadv(self._handle, [place], self._start + position)
            if count == 0:  # it was longer a moment ago
                raise DamagedError("cut short")
            place, position = place[count:], position + count

    def read(self, position: int, length: int) -> bytes:
        if not 0 <= length <= self.length:
            raise DamagedError("cut short")
        found = bytearray(length)
        self.fill(memoryview(found), position)
        return bytes(found)

    def digest(self, end: int) -> xxhash.xxh3_128:
        """Of the bytes up to ``end``."""
        digest, piece = xxhash.xxh3_128(), bytearray(_PIECE)
        for position in range(0, end, _PIECE):
            part = memoryview(piece)[: min(_PIECE, end - position)]
            self.fill(part, position)
            digest.update(part)
        return digest


@dataclass(frozen=True)
class Record:
    position: int
    length: int
    crc: int


class ZipRecords:
    """The directory of an archive.

    Attributes:
        records: By name.
        digest: That of the whole file as its end states it, or None where it states none.

    Raises:
        DamagedError: It is not such an archive.
    """

    def __init__(self, file: FileSlice) -> None:
        self._file = file
        self.digest, self._archive_end = _find_end(file)
        count, size, start = self._end()
        if count > _MOST_RECORDS + file.length // 512:
            raise DamagedError(f"its {count} records are too many for {file.length} bytes")
        self.records: dict[str, Record] = {}
        spans = [self._entry(*each) for each in _entries(file.read(start, size), count)]
        end = 0
        for begin, after in sorted(spans):
            if begin < end:
                raise DamagedError("its records overlap")
            end = after
        if end > start:
            raise DamagedError("its records overlap with its directory")

    def verify_digest(self) -> None:
        """Compare the whole file with the digest at its end, where there is one."""
        if self.digest is not None and self.digest != whole_digest(self._file, self._archive_end):
            self.verify_records()  # which may name the place
            raise DamagedError("damaged, its digest is another")

    def read(self, name: str) -> bytes:
        """A record, compared with its checksum."""
        record = self.records[name]
        found = self._file.read(record.position, record.length)
        _check(name, record, found)
        return found

    def fill(self, name: str, place: memoryview, *, check: bool = True) -> None:
        record = self.records[name]
        self._file.fill(place, record.position)
        if check:
            _check(name, record, place)

    def verify_records(self) -> None:
        """Compare each record with its checksum without holding it."""
        piece = bytearray(_PIECE)
        for name, record in self.records.items():
            crc = 0
            for position in range(0, record.length, _PIECE):
                part = memoryview(piece)[: min(_PIECE, record.length - position)]
                self._file.fill(part, record.position + position)
                crc = zlib.crc32(part, crc)
            if crc != record.crc:
                raise DamagedError(f"damaged in {name}")

    def _end(self) -> tuple[int, int, int]:
        """How many records there are, the size of the directory and where it begins."""
        place = self._archive_end - _END_BYTES
        _, *narrow, _ = struct.unpack("<4s4H2LH", self._file.read(place, _END_BYTES))
        found = narrow
        if place >= _LOCATOR64_BYTES and self._file.read(place - _LOCATOR64_BYTES, 4) == _LOCATOR64:
            place, found = self._end64(place - _LOCATOR64_BYTES)
        disk, first_disk, here, count, size, start = found
        agree = all(n in (wide, all_ones) for n, wide, all_ones in zip(narrow, found, _ALL_ONES, strict=True))
        if disk or first_disk or here != count or start + size != place or not agree:
            raise DamagedError("its directory is not at its end")
        return count, size, start

    def _end64(self, locator: int) -> tuple[int, list[int]]:
        """Where the wide form of the end stands, and what it says."""
        _, disk, place, disks = struct.unpack("<4sLQL", self._file.read(locator, _LOCATOR64_BYTES))
        if disk or disks != 1 or place + _END64_BYTES != locator:
            raise DamagedError("its directory is not at its end")
        mark, size, _, _, *found = struct.unpack("<4sQ2H2L4Q", self._file.read(place, _END64_BYTES))
        if mark != _END64 or size != _END64_BYTES - 12:
            raise DamagedError("its directory is not at its end")
        return place, found

    def _entry(self, name: str, record: Record) -> tuple[int, int]:
        """Note a record down; its first byte, header included, and the one after it."""
        header = record.position
        mark, _, flags, method, *_, name_bytes, extra_bytes = struct.unpack(
            "<4s5H3L2H", self._file.read(header, _LOCAL_BYTES)
        )
        own = self._file.read(header + _LOCAL_BYTES, name_bytes)
        if mark != _LOCAL or method or flags & _ENCRYPTED or own != name.encode():
            raise DamagedError(f"the header of {name!r} says something else than the directory")
        if name in self.records:
            raise DamagedError(f"two of its records are called {name!r}")
        begin = header + _LOCAL_BYTES + name_bytes + extra_bytes
        if begin + record.length > self._archive_end:
            raise DamagedError("cut short")
        self.records[name] = Record(begin, record.length, record.crc)
        return header, begin + record.length


def whole_digest(file: FileSlice, archive_end: int) -> str:
    """xxh3_128 of an archive as it was before the digest became its comment: with a comment of no length."""
    digest = file.digest(archive_end - 2)
    digest.update(bytes(2))
    return digest.hexdigest()


def with_digest(digest: str) -> bytes:
    """What takes the place of an archive's last two bytes, the length of its comment: the length and the comment."""
    comment = DIGEST + digest.encode()
    return struct.pack("<H", len(comment)) + comment


def _check(name: str, record: Record, content: bytes | memoryview) -> None:
    if zlib.crc32(content) != record.crc:
        raise DamagedError(f"damaged in {name}")


def _find_end(file: FileSlice) -> tuple[str | None, int]:
    """The digest that the file ends with, and where the archive ends without it."""
    for comment_bytes in (0, _COMMENT_BYTES):
        end = file.length - comment_bytes
        if end < _END_BYTES:
            break
        tail = file.read(end - _END_BYTES, _END_BYTES + comment_bytes)
        (length,) = struct.unpack("<H", tail[_END_BYTES - 2 : _END_BYTES])
        if tail.startswith(_END) and length == comment_bytes:
            comment = tail[_END_BYTES:]
            if comment and not comment.startswith(DIGEST):
                break
            return (comment.removeprefix(DIGEST).decode("latin1") or None), end
    raise DamagedError("cut short")


def _entries(directory: bytes, count: int) -> list[tuple[str, Record]]:
    """Name and place of the header of each record."""
    found, place = [], 0
    for _ in range(count):
        if len(directory) - place < _CENTRAL_BYTES:
            raise DamagedError("its directory is cut short")
        fields = struct.unpack_from("<4s6H3L5H2L", directory, place)
        mark, _, _, flags, method, _, _, crc, packed, length = fields[:10]
        name_bytes, extra_bytes, comment_bytes, disk, _, _, header = fields[10:]
        name = directory[place + _CENTRAL_BYTES : place + _CENTRAL_BYTES + name_bytes]
        place += _CENTRAL_BYTES + name_bytes
        extra = directory[place : place + extra_bytes]
        place += extra_bytes + comment_bytes
        if mark != _CENTRAL or place > len(directory) or disk or comment_bytes:
            raise DamagedError("its directory is damaged")
        if method or flags & _ENCRYPTED:
            raise DamagedError(
                f"{name.decode(errors='replace')!r} is compressed or encrypted, which torch.save never does (of a "
                "program of torch.jit save its state_dict() with torch.save)"
            )
        length, packed, header = _wide(extra, length, packed, header)
        if length != packed:
            raise DamagedError("its directory is damaged")
        found.append((_text(name), Record(header, length, crc)))
    if place != len(directory):
        raise DamagedError("its directory is damaged")
    return found


def _wide(extra: bytes, *narrow: int) -> list[int]:
    """Sizes and places beyond 4 GB stand in the zip64 field."""
    if _ALL32 not in narrow:
        return list(narrow)
    place = 0
    while place + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, place)
        wide = extra[place + 4 : place + 4 + size]
        if kind == 1:
            values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
            try:
                return [next(values) if value == _ALL32 else value for value in narrow]
            except StopIteration:
                break
        place += 4 + size
    raise DamagedError("its directory is damaged")


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise DamagedError("its directory is damaged") from None
