"""Brings one large file from an http server or a folder: goes on where it stopped, checks size and hash."""

import errno
import hashlib
import os
import shutil
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from vitcomposer.errors import ConfigError
from vitcomposer.folder_lock import only_writer
from vitcomposer.stores.addresses import masked
from vitcomposer.whole_files import PARTIAL

TRIES = 4  # without a byte in between
_PAUSE = 1.0  # seconds before the second try, twice as many before each further one
_TIMEOUT = 60.0  # seconds without a byte
_PIECE = 1 << 20
_MOST = 20  # times the least size: checkpoints with an optimizer have 8
_PASSING = (408, 429)  # of the answers below 500, which otherwise stay the same
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)

Report = Callable[[int, int | None], None]  # bytes that are there, of how many if that is known


class FetchError(ValueError):
    """A file that could not be had, or is not what it should be; names the address and the cause."""


def fetch(source: str, target: Path, *, least: int, fits: Callable[[str], bool], report: Report) -> str:
    """Bring a file to ``target``, which appears whole and checked or not at all; a second call goes on with the first.

    Args:
        source: ``http(s)://`` address or path of a file.
        least: Bytes that it has at least.
        fits: Whether a sha256, in hexadecimal digits, is right.
        report: Told how far it is.

    Returns:
        The sha256.

    Raises:
        FetchError: It cannot be had, or is another file.
        ConfigError: Another process is bringing it, or there is no room.
        OSError: The folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}{PARTIAL}")
    lock = target.with_name(f".{target.name}.lock")
    with only_writer(lock, str(target), "give another folder"):
        if "://" in source:
            _download(source, part, least, report)
        else:
            _copy(Path(source), part, report)
        digest = _checked(part, masked(source), least, fits)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
        _tag_of(part).unlink(missing_ok=True)
    return digest


def sha256_of(path: Path) -> str:
    """In hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(part: Path, source: str, least: int, fits: Callable[[str], bool]) -> str:
    """The hash of what came; what is wrong is removed, since going on with it would not mend it."""
    size, digest = part.stat().st_size, sha256_of(part)
    if size >= least and fits(digest):
        return digest
    _forget(part)
    if size < least:
        raise FetchError(f"{source} has {size:,} bytes, at least {least:,} are right: it is another file.")
    raise FetchError(f"{source} has sha256 {digest[:16]}..., which is not the published one: it is another file.")


def _copy(source: Path, part: Path, report: Report) -> None:
    if not source.is_file():
        raise FetchError(f"there is no file {source}.")
    shutil.copyfile(source, part)
    size = part.stat().st_size
    report(size, size)


def _download(url: str, part: Path, least: int, report: Report) -> None:
    tries, had = 0, _size(part)
    while True:
        try:
            return _read_on(url, part, least, report)
        except HTTPError as error:
            if error.code == 416:  # what is there is not the beginning of this file
                _forget(part)
            elif error.code < 500 and error.code not in _PASSING:
                raise FetchError(f"{masked(url)} answered {error.code} {error.reason}.") from error
            cause: Exception = error
        except (OSError, HTTPException) as error:
            _raise_lasting(error, url)
            cause = error
        tries = tries + 1 if _size(part) <= had else 1
        had = _size(part)
        said = masked(str(getattr(cause, "reason", None) or cause or type(cause).__name__))
        if tries >= TRIES:
            raise FetchError(f"{masked(url)} could not be had in {tries} tries: {said}.") from cause
        pause = _PAUSE * 2 ** (tries - 1)
        print(f"{said}: going on at {had / 1e6:,.1f} MB in {pause:g} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def _raise_lasting(error: Exception, url: str) -> None:
    """Raise what another try would find again."""
    reason = getattr(error, "reason", error)
    if getattr(error, "errno", None) in _OF_THE_DISK:
        raise error
    no_address = isinstance(error, InvalidURL) or (isinstance(error, URLError) and isinstance(reason, str))
    if no_address or isinstance(reason, ssl.SSLCertVerificationError):
        raise FetchError(f"{masked(url)} could not be had: {reason}.") from error


def _read_on(url: str, part: Path, least: int, report: Report) -> None:
    """Ask for what is missing and append it; all of it where the server has another file by now, or gives no parts."""
    have, tag = _size(part), _read_tag(part)
    request = Request(url, headers={"User-Agent": "vitcomposer", "Accept-Encoding": "identity"})
    if have and tag:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag)
    with urlopen(request, timeout=_TIMEOUT) as answer:
        if url.startswith("https:") and not answer.url.startswith("https:"):
            raise FetchError(f"{masked(url)} leads to {masked(answer.url)}, which is not encrypted.")
        begin = have if answer.status == 206 and _starts_at(answer, have) else 0
        length = answer.headers.get("Content-Length")
        total = begin + int(length) if length and length.isdecimal() else None
        _check_room(part, url, total, begin, most=_MOST * least)
        if not begin:
            part.unlink(missing_ok=True)  # before its new tag is there: they belong together
        _tag_of(part).write_text(_tag(answer))
        done = begin
        with part.open("ab" if begin else "wb") as file:
            while piece := answer.read(_PIECE):
                file.write(piece)
                done += len(piece)
                report(done, total)
                if done > _MOST * least:
                    raise FetchError(f"{masked(url)} does not end: {done:,} bytes came.")
    if total is not None and done != total:
        raise ConnectionError(f"the connection broke after {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")


def _check_room(part: Path, url: str, total: int | None, have: int, most: int) -> None:
    if total is None:
        return
    if total > most:
        raise FetchError(f"{masked(url)} has {total:,} bytes, at most {most:,} are expected: it is another file.")
    free = shutil.disk_usage(part.parent).free
    if total - have > free:
        missing = (total - have) / 1e6
        rule = f"{missing:,.0f} MB of room for what is missing"
        raise ConfigError(
            f"{part.parent} must have {rule}, it has {free / 1e6:,.0f}. Make room, or give another folder."
        )


def _starts_at(answer: HTTPResponse, have: int) -> bool:
    return (answer.headers.get("Content-Range") or "").startswith(f"bytes {have}-")


def _tag(answer: HTTPResponse) -> str:
    """What tells this state of the file from others for ``If-Range``; empty where the server says nothing usable."""
    tag = answer.headers.get("ETag") or ""
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified") or ""


def _tag_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _read_tag(part: Path) -> str:
    with suppress(OSError, ValueError):
        text = _tag_of(part).read_text()
        return text if text.isprintable() else ""
    return ""


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag_of(part).unlink(missing_ok=True)
