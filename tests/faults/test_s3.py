"""Streaming from a real S3 server behind a network that fails: the same batches, or one error in time."""

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.conftest import ROOT, run_train
from tests.faults.conftest import Tell
from tests.faults.object_store import IMAGES, PER_SHARD, SECRET, Proxy, free_ports
from vitcomposer.data.mds.stream import ImageStream, StreamOptions
from vitcomposer.errors import ConfigError, ShardError
from vitcomposer.runs.remote import RunStore
from vitcomposer.stores.objects import open_store

pytestmark = pytest.mark.timeout(120)

BATCH = 8
SHARDS = r"\.mds$"

# Each fault happens to reads of shards alone, so that a test can tell what it does to them.
FAULTS: dict[str, list[dict[str, Any]]] = {
    "latency of 50 ms": [{"fault": "latency", "value": 0.05, "path": SHARDS}],
    "bandwidth of 200 kB/s": [{"fault": "bandwidth", "value": 2e5, "path": SHARDS}],
    "503 SlowDown, 3 of 10": [{"fault": "status", "value": 503, "probability": 0.3, "path": SHARDS}],
    "500, 3 times": [{"fault": "status", "value": 500, "times": 3, "path": SHARDS}],
    "connection reset, 3 times": [{"fault": "reset", "times": 3, "path": SHARDS}],
    "reset in the body, 3 times": [{"fault": "reset", "after": 0.5, "times": 3, "path": SHARDS}],
    "body cut, 3 times": [{"fault": "cut", "times": 3, "path": SHARDS}],
    "byte flipped, 3 times": [{"fault": "corrupt", "times": 3, "path": SHARDS}],
    "hung, 2 times": [{"fault": "hang", "value": 30, "times": 2, "path": SHARDS}],
    "hung in the body, 2 times": [{"fault": "hang", "value": 30, "after": 0.5, "times": 2, "path": SHARDS}],
}


def digests(samples: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(sample["sample_id"], hashlib.sha256(sample["image"]).hexdigest()) for sample in samples]


def open_loader(local: Path, workers: int, remote: str | None = None, **options: Any) -> DataLoader:
    settings = {"download_timeout": 1.0, "predownload": 2 * PER_SHARD, **options}
    stream = ImageStream(
        local=str(local),
        remote=remote,
        split="train",
        batch_size=BATCH,
        shuffle=True,
        seed=3,
        options=StreamOptions(**settings),
    )
    return DataLoader(stream, batch_size=BATCH, num_workers=workers, collate_fn=digests, timeout=60 if workers else 0)


def read(local: Path, workers: int, remote: str | None = None, **options: Any) -> list[list[tuple[int, str]]]:
    """The batches of an epoch."""
    return list(open_loader(local, workers, remote, **options))


MANY = [  # each of another shard, since pauses double with every try of one
    {"fault": "latency", "value": 0.01},
    {"fault": "hang", "value": 30, "times": 1, "path": "00000.mds"},
    {"fault": "cut", "times": 1, "path": "00001.mds"},
    {"fault": "reset", "times": 1, "path": "00002.mds"},
    {"fault": "reset", "after": 0.5, "times": 1, "path": "00003.mds"},
    {"fault": "corrupt", "times": 1, "path": "00004.mds"},
    {"fault": "status", "value": 503, "times": 2, "path": "00005.mds"},
    {"fault": "status", "value": 500, "times": 1, "path": "index.json"},
]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("workers", [pytest.param(0, marks=SLOW), 2])
def test_batches_are_the_same_through_every_fault(
    images: Path, bucket: str, proxy: Proxy, tmp_path: Path, workers: int, tell: Tell
) -> None:
    expected = read(images, workers)
    assert len({sample for batch in expected for sample, _ in batch}) == IMAGES
    proxy.rules(*MANY)
    began = time.monotonic()
    assert read(tmp_path / "cache", workers, f"{bucket}/images") == expected
    seconds = time.monotonic() - began
    happened = proxy.report()["faults"]
    assert happened == {"latency": happened["latency"], "hang": 1, "cut": 1, "reset": 2, "corrupt": 1, "status": 3}
    assert not list((tmp_path / "cache").rglob("*.part*"))
    seen = f"nothing: {sum(happened.values()) - happened['latency']} tries more, the same {len(expected)} batches"
    tell(f"hung, cut, reset, flipped, 503 and 500 answers of S3, {workers} workers", seen, seconds)


LASTING = {
    "403 for a shard": (
        {"fault": "status", "value": 403, "path": "00002.mds"},
        "answered 403 AccessDenied.* the right to",
    ),
    "a shard that is missing": ({"fault": "status", "value": 404, "path": "00002.mds"}, "answered 404 .*is there"),
    "a shard that is cut for ever": ({"fault": "cut", "path": "00002.mds"}, r"\(2 tries in \d+ s\): 40\d+ read, but"),
    "a store that hangs for ever": ({"fault": "hang", "value": 60, "path": SHARDS}, r"sent nothing for 1 s \(2 tries"),
}


@pytest.mark.parametrize(
    ("fault", "workers"),
    [
        ("403 for a shard", 0),
        ("a store that hangs for ever", 2),
        *(pytest.param(fault, 0, marks=SLOW) for fault in LASTING if "403" not in fault),
    ],
)
def test_lasting_fault_is_one_error_in_time(
    images: Path, bucket: str, proxy: Proxy, tmp_path: Path, fault: str, workers: int, tell: Tell
) -> None:
    rule, expected = LASTING[fault]
    proxy.rules(rule)
    began = time.monotonic()
    with pytest.raises(ShardError, match=expected) as caught:
        read(tmp_path / "cache", workers, f"{bucket}/images", download_retry=1)
    seconds = time.monotonic() - began
    text = str(caught.value).strip().splitlines()[-1]
    assert f"{bucket}/images/train/shard." in text and proxy.endpoint in text and "Traceback" not in text
    assert seconds < 15, "two tries of a second, a pause of one"
    tell(f"{fault}, {workers} workers", text, seconds)


@SLOW
def test_server_that_is_gone_is_one_error_in_time(
    images: Path, bucket: str, proxy: Proxy, tmp_path: Path, tell: Tell
) -> None:
    """First before the run, then in the middle of an epoch."""
    read(tmp_path / "cache", 0, f"{bucket}/images")
    (tmp_path / "cache/train/shard.00003.mds").unlink()
    proxy.stop()
    began = time.monotonic()
    with pytest.raises(ShardError, match="no connection to http://127.0.0.1.*2 tries.*Check the network") as gone:
        read(tmp_path / "cache", 0, f"{bucket}/images", download_retry=1)
    tell("the S3 server is gone in the middle of an epoch", str(gone.value), time.monotonic() - began)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"data.remote: s3://.*names.json cannot be read: no connection.*2 tries"):
        read(tmp_path / "other", 0, f"{bucket}/images", download_retry=1)
    assert time.monotonic() - began < 15


def test_passwords_of_addresses_are_in_no_error(
    images: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(ConfigError, match=r"http://\*\*\*@127") as streamed:
        read(tmp_path / "cache", 0, f"{bucket}/images", download_retry=0)
    with pytest.raises(ValueError, match=r"http://\*\*\*@127") as converted:
        open_store(f"{bucket}/x").check()
    with pytest.raises(ConfigError, match=r"http://\*\*\*@127") as mirrored:
        RunStore(f"{bucket}/runs", tmp_path / "run", keep=1).check()
    assert not any(SECRET in str(caught.value) for caught in (streamed, converted, mirrored))
    for key in ("data.remote", "run.remote"):
        for address in (f"s3://me:{SECRET}@bucket/x", f"s3://bucket/x?X-Amz-Signature={SECRET}"):
            assert run_train([str(ROOT / "yamls/deit_ti.yaml"), "data.source=synthetic", f"{key}={address}"]) == 2


def test_conversion_survives_bodies_that_break_off(images: Path, bucket: str, proxy: Proxy, tell: Tell) -> None:
    store = open_store(f"{bucket}/images")
    expected = (images / "train/shard.00000.mds").read_bytes()
    proxy.rules({"fault": "cut", "times": 2}, {"fault": "status", "value": 503, "times": 1})
    began = time.monotonic()
    assert store.read("train/shard.00000.mds") == expected
    store.write("train/copy", expected)
    assert store.read("train/copy", 10, 20) == expected[10:20]
    assert proxy.report()["faults"] == {"cut": 2, "status": 1}
    tell("bodies cut and a 503 while a data set is converted or inspected", "nothing", time.monotonic() - began)


@SLOW
@pytest.mark.timeout(1200)
def test_speed_through_every_fault(images: Path, bucket: str, proxy: Proxy, tmp_path: Path, tell: Tell) -> None:
    """Each fault between two epochs without one; a table where VITCOMPOSER_S3 asks for it."""
    rows = []
    for number, (fault, rules) in enumerate(FAULTS.items()):
        for workers in (0, 2):
            expected = read(images, workers)
            seconds, happened = [], 0
            for turn, applied in enumerate(([], rules, [])):
                proxy.rules(*applied)
                cache = tmp_path / f"cache{number}-{workers}-{turn}"
                loader = open_loader(cache, workers, f"{bucket}/images", download_timeout=2.0)
                began = time.monotonic()
                assert list(loader) == expected, f"{fault}, {workers} workers"
                seconds.append(time.monotonic() - began)
                happened = max(happened, sum(proxy.report()["faults"].values()))
                shutil.rmtree(cache)
            assert happened, fault
            speed, clean = IMAGES / seconds[1], 2 * IMAGES / (seconds[0] + seconds[2])
            rows.append(f"| {fault} | {workers} | {happened} | {speed:.0f} | {clean:.0f} | the same {len(expected)} |")
            more = seconds[1] - (seconds[0] + seconds[2]) / 2
            tell(f"{fault}, {workers} workers", f"nothing: {speed:.0f} images/s, {clean:.0f} without it", max(more, 0))
    write_table("faults", rows)


@SLOW
@pytest.mark.timeout(300)
def test_prefetch_hides_latency(images: Path, bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    rows, waits = [], {}
    for delay in (0.0, 0.05, 0.1):
        for predownload in (BATCH, 2 * PER_SHARD, 8 * PER_SHARD):
            proxy.rules({"fault": "latency", "value": delay, "path": SHARDS})
            cache = tmp_path / f"{delay}-{predownload}"
            waits[delay, predownload] = waited(cache, f"{bucket}/images", predownload, step=0.1)
            shutil.rmtree(cache)
            rows.append(f"| {1000 * delay:.0f} ms | {predownload} | {waits[delay, predownload]:.0f} ms |")
    assert waits[0.1, 2 * PER_SHARD] < 0.5 * waits[0.1, BATCH]
    write_table("prefetch", rows)


def waited(cache: Path, remote: str, predownload: int, step: float) -> float:
    """Milliseconds that an epoch waits for its batches after the first, with ``step`` seconds of training on each."""
    loader = iter(open_loader(cache, 0, remote, predownload=predownload, shuffle_block_size=PER_SHARD))
    next(loader)
    total = 0.0
    while True:
        time.sleep(step)
        began = time.monotonic()
        if next(loader, None) is None:
            return 1000 * total
        total += time.monotonic() - began


TABLES = {
    "faults": [
        "# Streaming from S3 through faults",
        "",
        f"Written by `VITCOMPOSER_S3=benchmarks/results/s3_faults.md pytest tests/faults/test_s3.py -m slow`: {IMAGES} "
        f"images in {IMAGES // PER_SHARD} shards of 80 kB, read once, cold, from a SeaweedFS server on the loopback "
        "interface behind a proxy that makes the faults, on two busy CPU cores: numbers scatter by a factor of two. "
        "Starting the workers and their clients is in every time, so these are no speeds of a run; what "
        "a fault adds is the pause before the next try (1, 2, 4, ... s) and `data.download_timeout` "
        "(here 2 s, 60 s by default) for what hangs.",
        "",
        "| fault of reads of shards | workers | times | images/s | without it | batches |",
        "|---|---|---|---|---|---|",
    ],
    "prefetch": [
        "",
        "## Prefetch",
        "",
        "What an epoch of 30 batches waits for data after the first one, where a step takes 100 ms, a shard holds two "
        "batches and every request is answered later: `data.predownload` is the number of samples whose shards are "
        "fetched ahead; 8 is one batch.",
        "",
        "| latency | data.predownload | waited |",
        "|---|---|---|",
    ],
}


def write_table(name: str, rows: list[str]) -> None:
    path = os.environ.get("VITCOMPOSER_S3")
    if path is not None:
        with open(path, "w" if name == "faults" else "a", encoding="utf-8") as file:
            file.write("\n".join([*TABLES[name], *rows, ""]))
