"""What loader workers need of a machine is looked at before the first batch, and what ends one is told truly."""

import errno
import os
import resource
import types
import warnings
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from tests.conftest import Tell
from vitcomposer import config
from vitcomposer.data.mds import worker_room as start
from vitcomposer.errors import ConfigError
from vitcomposer.runs import failures

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1_000_000


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The limits of open files, which a test may set; what start.py asks for is kept in ``now``."""
    found = types.SimpleNamespace(now=(1024, 4096))
    monkeypatch.setattr(resource, "getrlimit", lambda _: found.now)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: setattr(found, "now", limits))
    return found


def test_workers_whose_batches_do_not_fit_are_refused_with_the_number_that_does(
    limits: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    monkeypatch.setattr(start, "free_bytes", lambda: (1 << 20) + 65 * MEGABYTE)
    start.check_worker_room("data.num_workers", 3, prefetch_factor=2, batch_bytes=10 * MEGABYTE)
    with pytest.raises(
        ConfigError, match=r"data.num_workers must be at most 3: /dev/shm has 66 MB free.*got 4.*shm-size"
    ) as error:
        start.check_worker_room("data.num_workers", 4, prefetch_factor=2, batch_bytes=10 * MEGABYTE)
    tell("/dev/shm holds the batches of three workers, four are wanted", f"error: {error.value}", 0.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="data.num_workers must be at most 1: .*of 2 ranks"):
        start.check_worker_room("data.num_workers", 3, prefetch_factor=2, batch_bytes=10 * MEGABYTE)


def test_no_room_for_streaming_itself_is_refused_without_workers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "free_bytes", lambda: 65_536)
    with pytest.raises(ConfigError, match="/dev/shm must be a place with 1 MiB of room, got '65,536 bytes'"):
        start.check_worker_room("data.num_workers", 0)


@pytest.mark.parametrize(("soft", "hard", "workers", "after"), [(64, 4096, 2, 288), (1024, 4096, 2, 1024)])
def test_the_limit_of_open_files_is_raised_as_far_as_needed(
    soft: int, hard: int, workers: int, after: int, limits: types.SimpleNamespace
) -> None:
    limits.now = (soft, hard)
    start.check_worker_room("data.num_workers", workers)
    assert limits.now == (after, hard)


def test_too_few_open_files_are_refused(limits: types.SimpleNamespace, tell: Tell) -> None:
    """The loader would wait for data.timeout: the descriptor that carries its batch could not be opened."""
    limits.now = (64, 64)
    with pytest.raises(
        ConfigError, match="The limit of open files must be at least 240 here, got 64. Raise it"
    ) as error:
        start.check_worker_room("data.num_workers", 1)
    tell("ulimit -n 64", f"error: {error.value}", 0.0)


def test_more_workers_than_cores_are_one_line_in_place_of_pytorchs(
    limits: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start._compare_with_cores.cache_clear()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for workers in (2, 3, 3):
        start.check_worker_room("data.num_workers", workers)
    line = "data.num_workers is 3, more than the cores of this machine (2): try data.num_workers=2."
    assert caplog.messages == [line]
    with warnings.catch_warnings(record=True) as seen:
        DataLoader([0], num_workers=3)
    assert seen == []


def bus_error() -> RuntimeError:
    return RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")


def test_a_bus_error_names_the_shard_that_was_cut_and_else_shared_memory(
    photo_mds: Path, tmp_path: Path, tell: Tell
) -> None:
    overrides = [f"data.local={tmp_path}", "run.name=x"]
    cfg = config.load(ROOT / "yamls/deit_ti.yaml", overrides)
    for path in (photo_mds / "train").iterdir():
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / path.name).write_bytes(path.read_bytes())
    said = failures.explain(bus_error(), cfg)
    assert said and "/dev/shm" in said["text"]
    shard = next((tmp_path / "train").glob("*.mds"))
    size = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.truncate(size // 2)
    said = failures.explain(bus_error(), cfg)
    assert said and said["status"] == failures.FAILED
    assert f"{shard} has {size // 2:,} bytes, its index says {size:,}" in said["text"]
    assert "/dev/shm" not in said["text"]
    tell("a shard is cut while a worker reads it", f"error: {said['text']}", 0.0)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader timed out after 600.0 seconds"), "No batch came for data.timeout, 600 s"),
        (OSError(errno.EMFILE, "Too many open files"), "the limit of open files is too low"),
    ],
)
def test_an_error_of_the_loader_says_what_to_do(error: Exception, words: str) -> None:
    said = failures.explain(error, config.load(ROOT / "yamls/deit_ti.yaml"))
    assert said and words in said["text"] and said["status"] == failures.FAILED


def test_too_many_open_files_is_seen_behind_what_came_after_it() -> None:
    try:
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError:
            _ = None.missing  # pyright: ignore[reportOptionalMemberAccess]
    except AttributeError as error:
        said = failures.explain(error, config.load(ROOT / "yamls/deit_ti.yaml"))
    assert said and "limit of open files" in said["text"]
