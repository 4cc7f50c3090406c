"""Torn checkpoints, kills while one is saved or after the last: nothing is lost, and nothing changes."""

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback
from composer.utils import checkpoint
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from recipes import RECIPES
from tests.conftest import run_train
from tests.faults.conftest import Tell
from tests.faults.small_run import DEIT, STEPS, assert_same, rows, saved, tiny, unbroken
from vitcomposer import config
from vitcomposer.models.weights.load import read_checkpoint
from vitcomposer.runs.checkpoint_loading import _SharesReader, own_reader
from vitcomposer.runs.checkpoints import Found, _check_file, keep_newest, newest_whole, ranks_and_step, save_whole
from vitcomposer.runs.folder import checkpoint_to_load
from vitcomposer.runs.layout import LATEST
from vitcomposer.training.fit import fit

__all__ = ["unbroken"]

pytestmark = pytest.mark.timeout(120)


def copy_of(unbroken: Path, to: Path) -> Path:
    """The run as a kill left it right after the checkpoint of step 6."""
    shutil.copytree(unbroken, to / "run", symlinks=True)
    (to / "run/summary.json").unlink()
    (to / "run/checkpoints/ep3-ba8-rank0.pt").unlink()
    (to / "run/checkpoints" / LATEST).unlink()
    (to / "run/checkpoints" / LATEST).symlink_to("ep2-ba6-rank0.pt")
    return to / "run"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    """One bit in the middle, as a disk or a network loses it."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


TORN: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (cut, "cut short"),
    "empty": (empty, "empty"),
    "all zeros, as some disks leave it": (zero, "zeros"),
    "one bit flipped": (flip, "damaged"),
    "deleted, so that the link to it dangles": (Path.unlink, "missing"),
}


def load_from_memory(file: Any, *, load: Callable[..., Any] = torch.load, **options: Any) -> Any:
    """Torch's reader, which ranks use for what they send each other."""
    assert isinstance(file, io.BytesIO), "torch read a file"
    return load(file, **options)


def test_run_goes_on_from_the_checkpoint_before_a_torn_one(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tell: Tell
) -> None:
    run = copy_of(unbroken, tmp_path)
    cut(run / "checkpoints/ep2-ba6-rank0.pt")
    began = time.monotonic()
    monkeypatch.setattr(torch, "load", load_from_memory)
    assert run_train([DEIT, *tiny(tmp_path, "run")]) == 0
    seconds = time.monotonic() - began
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "goes on after" in text]
    why = "Refused ep2-ba6-rank0.pt: cut short."
    assert line == f"{run} goes on after step 3. {why}"
    assert rows(run) == rows(unbroken)
    monkeypatch.undo()
    assert_same(saved(run), saved(unbroken))
    tell("newest checkpoint cut short", line, seconds)


@pytest.mark.parametrize("fault", TORN)
def test_newest_whole_checkpoint_is_found(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    tear, why = TORN[fault]
    for number in (3, 6):
        save_whole(content(number), tmp_path / f"run/checkpoints/ep0-ba{number}-rank0.pt")
    began = time.monotonic()
    tear(tmp_path / "run/checkpoints/ep0-ba6-rank0.pt")
    assert checkpoint_to_load(tmp_path / "run") == str(tmp_path / "run/checkpoints/ep0-ba3-rank0.pt")
    seconds = time.monotonic() - began
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{tmp_path}/run goes on after step 3. Refused ep0-ba6-rank0.pt: {why}")
    tell(f"newest checkpoint {fault}", line, seconds)


def small(number: int) -> dict[str, Any]:
    """Four kilobytes of what a checkpoint of step ``number`` has to hold."""
    return of_step(number, {"w": torch.full((8,), float(number))})


def two_checkpoints(folder: Path) -> tuple[Path, Path]:
    paths = tuple(folder / f"ep0-ba{number}-rank0.pt" for number in (3, 6))
    for number, path in zip((3, 6), paths, strict=True):
        save_whole(small(number), path)
    return paths[0], paths[1]


def with_each_byte_flipped(path: Path, step: int = 1) -> Iterator[int]:
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for place in range(0, len(whole), step):
            os.pwrite(file.fileno(), bytes([whole[place] ^ 0xFF]), place)
            _check_file.cache_clear()  # the clock of the disk does not tell two writes within 4 ms apart
            yield place
            os.pwrite(file.fileno(), whole[place : place + 1], place)
    _check_file.cache_clear()


def test_every_flipped_byte_of_a_checkpoint_has_the_one_before_taken(tmp_path: Path) -> None:
    before, newest = two_checkpoints(tmp_path)
    for place in with_each_byte_flipped(newest):
        found = newest_whole(tmp_path)
        assert found.path == before and found.digest, place
        assert found.refused[0].startswith(f"{newest.name}: "), place
    assert newest_whole(tmp_path) == Found(newest, (), None, digest=True)


def test_every_flipped_byte_of_a_file_called_latest_has_the_one_before_taken(tmp_path: Path) -> None:
    before, newest = two_checkpoints(tmp_path)
    (tmp_path / LATEST).unlink()
    newest.rename(tmp_path / LATEST)
    for place in with_each_byte_flipped(tmp_path / LATEST, step=5):
        found = newest_whole(tmp_path)
        assert found.path == before and found.refused[0].startswith(f"{LATEST}: "), place


def test_every_flipped_byte_of_an_older_versions_checkpoint_is_refused_or_gives_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those have no digest: what lies between their records is compared with nothing, and means nothing."""
    before, newest = two_checkpoints(tmp_path / "checkpoints")
    torch.save(small(6), newest)
    refused = 0
    for place in with_each_byte_flipped(newest):
        found = newest_whole(tmp_path / "checkpoints")
        assert found.path in (before, newest), place
        refused += found.path == before
        if found.path == newest:
            assert_same(read_checkpoint(newest), small(6))
    assert refused > newest.stat().st_size // 2
    assert checkpoint_to_load(tmp_path) == str(newest)
    line = capsys.readouterr().out.strip()
    assert (
        line
        == f"{tmp_path} goes on after step 6. It carries no digest, as those of older versions: read by the "
        + ("checksums of its parts.")
    )


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("this ran",)


def test_checkpoint_that_would_run_code_has_the_one_before_taken(tmp_path: Path) -> None:
    before, newest = two_checkpoints(tmp_path)
    save_whole({**small(6), "extra": Runs()}, newest)
    found = newest_whole(tmp_path)
    assert found.path == before
    assert found.refused[0].startswith(f"{newest.name}: it needs ") and "mkdir, which is no weights" in found.refused[0]


@pytest.mark.parametrize(
    "other",
    [{"model": {}}, [], 3, {"state": {"metadata": {"world_size": "1"}, "timestamp": {"Timestamp": {"batch": 6}}}}],
)
def test_file_of_something_else_has_the_one_before_taken(other: Any, tmp_path: Path) -> None:
    before, newest = two_checkpoints(tmp_path)
    save_whole(other, newest)
    found = newest_whole(tmp_path)
    assert found.path == before and "not a checkpoint of a run" in found.refused[0]


def test_composer_never_reads_a_checkpoint_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was exchanged after the look at it does not run either."""
    save_whole({**small(6), "extra": Runs()}, tmp_path / "ep0-ba6-rank0.pt")
    monkeypatch.chdir(tmp_path)
    with own_reader(), pytest.raises(ValueError, match=r"it needs \w+\.mkdir"):
        checkpoint.safe_torch_load(tmp_path / "ep0-ba6-rank0.pt")
    assert not (tmp_path / "this ran").exists()


def test_shares_of_before_a_callback_had_a_state_are_read(tmp_path: Path) -> None:
    """torch refuses shares that lack a key which the run has; it still does for every other key."""
    distributed_checkpoint.save({"state": {"weight": torch.ones(3)}}, checkpoint_id=tmp_path, no_dist=True)
    state = {"weight": torch.zeros(3), "callbacks": {"Best": {"kept": "this run's"}}}
    reader = _SharesReader(tmp_path)
    distributed_checkpoint.load({"state": state}, storage_reader=reader, no_dist=True)
    assert torch.equal(state["weight"], torch.ones(3)) and state["callbacks"]["Best"]["kept"] == "null"
    with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: state.callbacks.Other"):
        distributed_checkpoint.load({"state": {"callbacks": {"Other": "x"}}}, storage_reader=reader, no_dist=True)


def test_run_without_a_whole_checkpoint_says_so_and_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    began = time.monotonic()
    for number in (3, 6):
        save_whole(content(number), tmp_path / f"checkpoints/ep0-ba{number}-rank0.pt")
        cut(tmp_path / f"checkpoints/ep0-ba{number}-rank0.pt")
    assert checkpoint_to_load(tmp_path) is None
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{tmp_path} starts from the beginning. Refused ep0-ba6") and line.count("Refused") == 2
    tell("every checkpoint cut short", line, time.monotonic() - began)


def test_link_leads_to_the_checkpoint_that_somebody_goes_back_to(tmp_path: Path) -> None:
    for number in (3, 6):
        save_whole(content(number), tmp_path / f"ep0-ba{number}-rank0.pt")
    (tmp_path / LATEST).unlink()
    (tmp_path / LATEST).symlink_to("ep0-ba3-rank0.pt")
    assert newest_whole(tmp_path).path == tmp_path / "ep0-ba3-rank0.pt"


def test_link_that_became_a_file_is_a_checkpoint_too(tmp_path: Path) -> None:
    """As copying to a disk without links makes of it."""
    save_whole(content(6), tmp_path / "ep0-ba6-rank0.pt")
    (tmp_path / LATEST).unlink()
    shutil.move(tmp_path / "ep0-ba6-rank0.pt", tmp_path / LATEST)
    assert newest_whole(tmp_path).path == tmp_path / LATEST
    save_whole(content(9), tmp_path / "ep0-ba9-rank0.pt")
    assert (tmp_path / LATEST).readlink() == Path("ep0-ba9-rank0.pt")


def content(number: int) -> dict[str, Any]:
    """Ten megabytes of what a checkpoint of step ``number`` has to hold."""
    return of_step(number, {f"weight{i}": torch.full((1 << 16,), float(number)) for i in range(40)})


def of_step(number: int, model: dict[str, torch.Tensor]) -> dict[str, Any]:
    clock = {"timestamp": {"Timestamp": {"batch": number}}, "metadata": {"world_size": 1}}
    return {"state": {"model": model, **clock}}


def save_for_ever(folder: Path, start: int) -> None:
    torch.set_num_threads(1)
    for number in range(start, start + 10_000):
        path = folder / f"ep0-ba{number}-rank0.pt"
        save_whole(content(number), path)
        keep_newest(folder, path, 2)


def test_kill_in_the_middle_of_a_save_leaves_the_checkpoints_whole(tmp_path: Path, tell: Tell) -> None:
    """Twelve times; a plain torch.save in the place of save_whole is torn by the first few."""
    rng, newest = random.Random(7), 0
    began = time.monotonic()
    for _ in range(12):
        saving = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(tmp_path, newest + 1))
        saving.start()
        try:
            wait_for_file(tmp_path / f"ep0-ba{newest + 2}-rank0.pt", saving.is_alive)
            time.sleep(rng.uniform(0, 0.05))
        finally:
            saving.kill()
            saving.join()
        found = newest_whole(tmp_path)
        assert found.path is not None
        assert all(each.endswith("missing") for each in found.refused), "the link may be there a moment before its file"
        ranks, number = ranks_and_step(found.path)
        assert ranks == 1 and number > newest and found.path.name == f"ep0-ba{number}-rank0.pt"
        newest = number
    tell(
        "kill -9 while a checkpoint is written, 12 times", f"all whole, the last of {newest}", time.monotonic() - began
    )


def save_with_a_small_disk(folder: Path) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        save_whole(content(2), folder / "ep0-ba2-rank0.pt")
    except (OSError, RuntimeError):
        os._exit(7)
    os._exit(0)


def test_disk_that_takes_half_a_checkpoint_costs_none(tmp_path: Path) -> None:
    save_whole(content(1), tmp_path / "ep0-ba1-rank0.pt")
    saving = multiprocessing.get_context("fork").Process(target=save_with_a_small_disk, args=(tmp_path,))
    saving.start()
    saving.join(30)
    saving.kill()
    assert saving.exitcode == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ep0-ba1-rank0.pt", LATEST]
    assert newest_whole(tmp_path).path == tmp_path / "ep0-ba1-rank0.pt"


def test_old_checkpoints_go_once_the_new_one_is_whole(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save_whole(content(number), tmp_path / f"ep0-ba{number}-rank0.pt")
    cut(tmp_path / "ep0-ba2-rank0.pt")
    (tmp_path / "ep0-ba9-rank0.pt").write_bytes(b"of a start that went on from step 9, and torn")
    (tmp_path / "ep0-ba9-rank0.pt.partial").write_bytes(b"left by a kill")
    keep_newest(tmp_path, tmp_path / "ep0-ba3-rank0.pt", keep=2)
    left = {path.name for path in tmp_path.glob("ep*")}
    assert left == {f"ep0-ba{number}-rank0.pt" for number in (1, 2, 3, 9)}, "a torn one does not count as kept"
    keep_newest(tmp_path, tmp_path / "ep0-ba3-rank0.pt", keep=1)
    assert not (tmp_path / "ep0-ba1-rank0.pt").exists()


def wait_for_file(path: Path, alive: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert alive() and time.monotonic() < end, f"no {path}"
        time.sleep(0.002)


# Killed around its end


class Killed(Exception):
    pass


class KillAt(Callback):
    """Leaves in the middle of an event as a kill does: no other callback gets to clean up."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step

    def run_event(self, event: Any, state: Any, logger: Any) -> None:
        if event.value == self.event and state.timestamp.batch.value >= self.step:
            raise Killed


def train_until_killed(argv: list[str], kill: Callback) -> None:
    cfg = config.load(argv[0], argv[1:])
    trainer = RECIPES[cfg.recipe].build(cfg)
    trainer.state.callbacks.append(kill)
    with pytest.raises(Killed):
        fit(trainer, cfg)


@pytest.mark.parametrize("event", ["eval_batch_start", "fit_end"])
def test_run_killed_after_its_last_checkpoint_makes_up_for_the_evaluation(
    event: str, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    """Composer refuses to go on there: no training would occur."""
    argv, run = [DEIT, *tiny(tmp_path, "run")], tmp_path / "run"
    train_until_killed(argv, KillAt(event, STEPS))
    summary = run / "summary.json"
    assert not summary.exists() or not json.loads(summary.read_text())["finished"]
    began = time.monotonic()
    assert run_train(argv) == 0
    seconds = time.monotonic() - began
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "goes on after" in text]
    assert line == f"{run} goes on after step {STEPS}."
    assert rows(run) == rows(unbroken)
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, unbroken))
    for name in ("top1", "top1_ema", "loss", "steps", "epochs", "finished", "images_seen"):
        assert ours[name] == theirs[name], name
    assert run_train(argv) == 0 and "already done" in capsys.readouterr().out
    tell(f"kill after the last checkpoint ({event})", line, seconds)
