"""Full and read-only disks: one line names the folder, what was saved before stays whole, and the run goes on later."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import PHOTOS, ROOT
from tests.faults.conftest import Tell
from tests.faults.test_numbers import faulty_run, last_line, overrides, seconds_since
from tests.faults.test_ranks import error_line, faulty_launch
from vitcomposer.runs.checkpoints import damage
from vitcomposer.runs.metrics import read_metrics

Disk = Callable[[str, str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """``disk(name, options)``: a file system of its own in memory; the test is skipped where none may be mounted."""
    mounted = []

    def mount(name: str, options: str) -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may not mount a file system")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def test_disk_full_in_a_checkpoint_keeps_the_older_and_goes_on_when_there_is_room(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    """A checkpoint of this network takes 15 MB."""
    place = disk("small", "size=40m")
    argv = overrides(place, "full", "run.keep_checkpoints=3")
    start = time.time()
    assert faulty_run("none", 99, tmp_path, argv) == 1
    seconds, seen = time.time() - start, last_line(capsys.readouterr().err)
    assert f"The checkpoint {place}/full/checkpoints/ep0-ba3-rank0.pt could not be saved" in seen
    assert "No space left on device" in seen and "Make room" in seen
    assert [damage(path) for path in sorted((place / "full/checkpoints").glob("ep*"))] == [None, None]
    remount(place, "size=200m")
    assert faulty_run("none", 99, tmp_path, argv) == 0
    assert [line["step"] for line in read_metrics(place / "full/metrics.jsonl")] == [1, 2, 3, 4]
    tell("The disk is full in a checkpoint", seen, seconds)


def test_disk_full_in_the_log_ends_the_run_and_leaves_whole_lines(
    tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    place = disk("small", "size=40m")
    argv = overrides(place, "log", "max_duration=40ba", "run.save_interval=2ba", "run.keep_checkpoints=1")
    argv += ["data.synthetic_samples=512"]
    assert faulty_run(f"fill:{place}/ballast", 2, tmp_path, [*argv, "run.save_interval=40ba"]) == 1
    seen = last_line(capsys.readouterr().err)
    assert f"{place}/log" in seen and "No space left on device" in seen and "Make room" in seen
    steps = [line["step"] for line in read_metrics(place / "log/metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
    (place / "ballast").unlink()
    tell("The disk is full in metrics.jsonl", seen, seconds_since(tmp_path))


def test_a_run_folder_that_is_deleted_ends_the_run_at_the_next_line_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    argv = overrides(tmp_path, "gone", "max_duration=400ba", "run.save_interval=400ba")
    assert faulty_run(f"delete:{tmp_path / 'gone'}", 2, tmp_path, argv) == 1
    seen = last_line(capsys.readouterr().err)
    assert seen.startswith(f"error: {tmp_path}/gone/metrics.jsonl was deleted or replaced")
    assert "at step 3." in seen and "starts anew" in seen
    tell("The run folder is deleted while the run writes to it", seen, seconds_since(tmp_path))


@pytest.mark.parametrize("key", ["run.folder", "data.local"])
def test_read_only_folder_is_refused_before_the_first_batch(
    key: str, photo_mds: Path, tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    place = disk("fixed", "size=1m")
    remount(place, "ro")
    start = time.time()
    data = ["data.source=mds", f"data.remote={photo_mds}", f"data.local={tmp_path / 'cache'}"]
    argv = [*overrides(tmp_path, "ro", f"model.num_classes={len(PHOTOS)}"), *data, f"{key}={place}"]
    assert faulty_run("none", 99, tmp_path, argv) == 2
    seen = last_line(capsys.readouterr().err)
    assert seen.startswith(f"error: {key} must be a folder that can be written, got '{place}': Read-only file system")
    tell(f"{key} is read-only", seen, time.time() - start)


def test_run_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell) -> None:
    (tmp_path / "runs").write_text("not a folder")
    start = time.time()
    assert faulty_run("none", 99, tmp_path, overrides(tmp_path / "runs", "file")) == 2
    seen = last_line(capsys.readouterr().err)
    assert "run.folder must be a folder that can be written" in seen and "Not a directory" in seen
    assert (tmp_path / "runs").read_text() == "not a folder"
    tell("run.folder is a file", seen, time.time() - start)


@pytest.mark.timeout(120)
def test_cache_disk_full_names_the_cache_and_goes_on_when_there_is_room(
    photo_mds: Path, tmp_path: Path, disk: Disk, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    place = disk("cache", "size=200k")
    argv = [*overrides(tmp_path, "run", f"model.num_classes={len(PHOTOS)}", "data.download_retry=1")]
    argv += ["data.source=mds", f"data.remote={photo_mds}", f"data.local={place}"]
    start = time.time()
    assert faulty_run("none", 99, tmp_path, argv) == 1
    seconds, seen = time.time() - start, last_line(capsys.readouterr().err)
    assert str(place) in seen and "No space left on device" in seen
    remount(place, "size=20m")
    assert faulty_run("none", 99, tmp_path, argv) == 0
    tell("The disk of the cache is full", seen, seconds)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("room", "words"),
    [("4k", "a place with 1 MiB of room"), ("64k", "a place with 1 MiB of room"), ("2m", "data.num_workers must be")],
)
def test_no_room_in_shared_memory_says_so_before_the_first_batch(
    room: str, words: str, photo_mds: Path, tmp_path: Path, tell: Tell
) -> None:
    when = tmp_path / "time"
    argv = overrides(tmp_path / "runs", "run", "data.num_workers=9", "model.image_size=224")
    argv += ["data.source=mds", f"data.local={photo_mds}", f"model.num_classes={len(PHOTOS)}"]
    train = [sys.executable, "tests/faults/faulty.py", "start", "0", "0", "nothing", str(when), *argv]
    script = f'mount -t tmpfs -o size={room} tmpfs /dev/shm || exit 77; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", *train]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    if done.returncode == 77 or "unshare: " in done.stderr:
        pytest.skip("this user may not mount a file system")
    assert done.returncode == 2, done.stderr[-3000:]
    seen = error_line(done.stderr)
    assert words in seen and "/dev/shm" in seen and "--shm-size" in seen
    tell(f"/dev/shm of {room}", seen, 0.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_disk_full_on_rank_0_ends_both_ranks_with_one_line(tmp_path: Path, disk: Disk, tell: Tell) -> None:
    place = disk("runs", "size=40m")
    fault = ["batch_start", "2", "0", f"fill:{place}/ballast"]
    status, text, seconds = faulty_launch("composer", fault, tmp_path, "max_duration=40ba", "run.save_interval=40ba")
    assert status == 1 and seconds < 60
    seen = error_line(text)
    assert "rank 0: " in seen and "No space left on device" in seen
    tell("The disk is full in metrics.jsonl of 2 ranks", seen, seconds)
