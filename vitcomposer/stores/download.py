"""Downloads files from an object store: each try is counted and reported, each error says what to do."""

import logging
import os
import random
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from streaming.base.storage import CloudDownloader

from vitcomposer.stores.addresses import masked, s3_endpoint

log = logging.getLogger(__name__)

_PIECE = 1 << 20
_LONGEST_PAUSE = 30.0  # seconds
_SAID_AFTER = 5.0  # seconds without a file that nobody should have to wonder about
_RETRIED = (408, 429)  # of the answers below 500, which otherwise stay the same
_RETRIED_CODES = ("RequestTimeout", "SlowDown")
_dice = random.Random()  # pauses must not move the generators that a run draws from


class DownloadError(RuntimeError):
    """A file that could not be had; the message says where from, why and after how many tries.

    Attributes:
        remedy: What to do about it, a sentence.
        missing: Whether the store answered that there is no such file.
        was_answered: Whether that, or another answer which any further try would get, came; else all tries were made.
    """

    def __init__(self, message: str, remedy: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.remedy, self.missing = remedy, missing
        self.was_answered = False


class OneTryS3:
    """Reads S3 in place of Streaming's downloader and its nested retries: one request for a file, one failure a fault.

    boto3 tries a request three times and a body five, each up to its time-out of a minute, before anybody hears of it.
    """

    def __init__(self) -> None:
        self.most: int | None = None  # bytes of the next file
        self._client: Any = None
        # The variable that Streaming reads, with the names of buckets between commas.
        self._payers = [name.strip() for name in os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")]

    def download(self, remote: str, local: str, timeout: float) -> None:
        """Copy an object to a file whose folder is there."""
        from botocore.exceptions import NoCredentialsError

        try:
            self._copy(self._client or self._connect(timeout), remote, local, timeout)
        except NoCredentialsError:  # a public bucket needs none
            self._copy(self._connect(timeout, unsigned=True), remote, local, timeout)

    def _connect(self, timeout: float, unsigned: bool = False) -> Any:
        import boto3.session
        from botocore import UNSIGNED
        from botocore.config import Config

        config = Config(
            connect_timeout=min(timeout, 20.0),
            read_timeout=timeout,  # between two pieces, so that a slow network is none
            retries={"total_max_attempts": 1, "mode": "standard"},
            signature_version=UNSIGNED if unsigned else None,
            tcp_keepalive=True,
        )
        endpoint = os.environ.get("S3_ENDPOINT_URL") or None
        self._client = boto3.session.Session().client("s3", config=config, endpoint_url=endpoint)
        return self._client

    def clean_up(self) -> None:
        """Let go of the connection: forked workers would share it."""
        self._client = None

    def _copy(self, client: Any, remote: str, local: str, timeout: float) -> None:
        place = urlsplit(remote)
        payer = {"RequestPayer": "requester"} if place.netloc in self._payers else {}
        answer = client.get_object(Bucket=place.netloc, Key=place.path.lstrip("/"), **payer)
        began, done, size = time.monotonic(), 0, answer["ContentLength"]
        _check_size(size, self.most)
        said = began
        with open(local, "wb") as file:
            for piece in answer["Body"].iter_chunks(_PIECE):
                file.write(piece)
                done += len(piece)
                if (now := time.monotonic()) - said > timeout:
                    said, rate = now, done / (now - began)
                    log.warning("%s comes slowly: %d of %d bytes, %d a second.", masked(remote), done, size, rate)
        if done != size:
            raise ConnectionError(f"{done} of {size} bytes came")


def open_downloader(remote: str | None) -> CloudDownloader | OneTryS3:
    """Streaming's downloader of a location, or ours for S3.

    Raises:
        ValueError, ImportError: No store has such an address, or its package is not installed.
    """
    return OneTryS3() if remote is not None and remote.startswith("s3://") else CloudDownloader.get(remote)


def download(  # noqa: PLR0913 (all but three are named at the call)
    downloader: CloudDownloader | OneTryS3,
    source: str,
    target: str | Path,
    *,
    retries: int,
    timeout: float,
    most: int | None = None,
) -> None:
    """Bring a file to ``target``, which appears whole or not at all.

    Args:
        retries: Tries after the first, with growing pauses between them; none where the answer would be the same.
        timeout: Seconds without a byte after which a try on S3 is given up; other stores have their own.
        most: Bytes that it may have; of stores other than S3 and disks this is looked at afterwards.

    Raises:
        DownloadError: It cannot be had.
    """
    part = f"{target}.{uuid.uuid4().hex}.part"
    began = time.monotonic()
    try:
        for tries in range(1, retries + 2):
            try:
                if "://" not in source and os.path.exists(source):
                    _check_size(os.path.getsize(source) if os.path.isfile(source) else None, most)
                if isinstance(downloader, OneTryS3):
                    downloader.most = most
                downloader.download(source, part, timeout)
                _check_size(os.path.getsize(part), most)
                os.replace(part, target)
                return
            except DownloadError:
                raise
            except Exception as error:  # every object store has its own
                if not isinstance(downloader, OneTryS3):  # boto3 replaces what is broken, in less time than all of it
                    downloader.clean_up()
                Path(part).unlink(missing_ok=True)  # Streaming takes what is there for the file
                seconds = time.monotonic() - began
                failure = _explain(error, source, timeout, tries, seconds)
                failure.was_answered = not _is_passing(error)
                if tries > retries or failure.was_answered:
                    raise failure from error
                pause = min(2.0 ** (tries - 1), _LONGEST_PAUSE) * _dice.uniform(0.75, 1.25)
                level = logging.WARNING if tries > 1 or seconds > _SAID_AFTER else logging.INFO
                log.log(level, "%s: %s. Another try follows in %.1f s.", masked(source), failure, pause)
                time.sleep(pause)
    finally:
        for left in (part, f"{part}.tmp"):
            Path(left).unlink(missing_ok=True)


def _check_size(size: int | None, most: int | None) -> None:
    if size is None or (most is not None and size > most):
        what = "it is no file" if size is None else f"it has {size} bytes, at most {most} are expected"
        raise DownloadError(what, "Check what lies there.")


def remove_parts(folder: Path, older_than: float = 3600.0) -> None:
    """Delete what killed runs have left half written in a cache; younger parts, in seconds, may be another run's."""
    for part in folder.glob("*.part"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > older_than:
                part.unlink()


def longest_wait(retries: int, timeout: float) -> float:
    """Seconds that :func:`download` takes at most while nothing comes."""
    return (retries + 1) * timeout + sum(1.25 * min(2.0**tries, _LONGEST_PAUSE) for tries in range(retries))


def _answer(error: BaseException) -> tuple[int, str, str] | None:
    """Status, code and message of what a server answered."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:  # boto3
        said = response["Error"]
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status, str(said.get("Code", "")), str(said.get("Message", ""))
    # The names of Azure, Google and OCI, and of Hugging Face, which uses requests.
    found = [getattr(error, name, None) for name in ("status_code", "code", "status")]
    found.append(getattr(response, "status_code", None))
    status = next((int(one) for one in found if isinstance(one, int) and 400 <= one < 600), None)
    return None if status is None else (status, type(error).__name__, str(error).partition("\n")[0])


def _is_passing(error: Exception) -> bool:
    """Whether another try may go better."""
    from botocore.exceptions import NoCredentialsError, ParamValidationError, PartialCredentialsError

    answer = _answer(error)
    if answer is not None:
        return answer[0] >= 500 or answer[0] in _RETRIED or answer[1] in _RETRIED_CODES
    without_keys = (NoCredentialsError, PartialCredentialsError, ParamValidationError, ValueError, ImportError)
    return not isinstance(error, (FileNotFoundError, PermissionError, *without_keys))


def _remedy(status: int, *, missing: bool) -> str:
    if missing:
        return "Check that the object is there, and the address."
    if status in (401, 403):
        return "Give this machine the right to read it (docs/object_stores.md: what each store reads)."
    return "Check the server; data.download_retry sets how often to try."


def _explain(error: Exception, source: str, timeout: float, tries: int, seconds: float) -> DownloadError:
    where = s3_endpoint() if source.startswith("s3://") else source.partition("://")[0]
    often = "" if tries == 1 else f" ({tries} tries in {seconds:.0f} s)"
    answer = _answer(error)
    if answer is not None:
        status, code, message = answer
        missing = status == 404 or code in ("NoSuchKey", "NoSuchBucket", "404")
        said = f"{where} answered {status} {code}{often}: {message}".rstrip(". ")
        return DownloadError(masked(said), _remedy(status, missing=missing), missing=missing)
    kind, text = type(error).__name__, masked(str(error)).rstrip(". ")
    network = "Check the network, the server and S3_ENDPOINT_URL; data.download_retry sets how often to try."
    if kind in ("ReadTimeoutError", "ConnectTimeoutError"):
        return DownloadError(f"{where} sent nothing for {timeout:g} s{often}", network)
    if kind == "EndpointConnectionError":
        return DownloadError(f"no connection to {where}{often}", network)
    remedy = (
        "Check that the object is there, whole and readable from this machine; data.download_retry and "
        "data.download_timeout set how long to try."
    )
    place = f" from {where}" if "://" in source else ""
    return DownloadError(f"{kind}{place}{often}: {text}", remedy, missing=isinstance(error, FileNotFoundError))
