"""Runs that are killed, torn checkpoints, signals, another number of ranks: nothing is lost, and nothing changes."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback

from recipes import RECIPES
from tests.conftest import ROOT, run_train, tiny_photo_overrides
from tests.faults import watched_run
from tests.faults.conftest import Tell
from tests.test_self_supervised import digits as digits
from tests.test_self_supervised import page
from tests.test_self_supervised import tiny as tiny_pretraining
from tests.test_train import losses
from vitcomposer import config
from vitcomposer.callbacks.record import read_metrics
from vitcomposer.checkpoint_folder import LATEST, keep_newest, newest_whole, ranks_and_step, save_whole
from vitcomposer.run_folder import checkpoint_to_load
from vitcomposer.trainer import fit

pytestmark = pytest.mark.timeout(120)

DEIT = str(ROOT / "yamls/deit_ti.yaml")
BIN = Path(sys.executable).parent
STEPS = 8
TIMES = ("seconds", "throughput/", "time/")  # of a line, what differs by the clock
CLOCKS = ("Throughput", "total_wct", "iteration_wct", "epoch_wct", "batch_wct", "repr", "run_name")  # of a checkpoint


def tiny(runs: Path, name: str) -> list[str]:
    """Eight steps, two an epoch, on images made from their number; a checkpoint every third, all of them kept.

    The second evaluation comes at the end, after the last checkpoint.
    """
    data = ["data.local=null", "data.source=synthetic", "data.synthetic_samples=32"]
    run = [f"max_duration={STEPS}ba", "run.save_interval=3ba", "run.keep_checkpoints=9", "run.eval_interval=3ep"]
    small = ["model.depth=1", "evaluation.global_batch_size=16", "run.progress_bar=false"]
    return [*tiny_photo_overrides(Path("unused"), runs, name), *data, *run, *small]


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock makes of them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def saved(run: Path) -> Any:
    return torch.load(run / "checkpoints" / LATEST, map_location="cpu", weights_only=False)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Every tensor and number of two checkpoints, bit for bit."""
    assert type(a) is type(b), place
    if isinstance(a, Mapping):
        assert a.keys() == b.keys(), place
        for key in a:
            if key not in CLOCKS:
                assert_same(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}/{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif hasattr(a, "tobytes"):
        assert a.tobytes() == b.tobytes(), place
    else:
        assert a == b, place


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("unbroken")
    assert run_train([DEIT, *tiny(runs, "run")]) == 0
    return runs / "run"


def copy_of(unbroken: Path, to: Path) -> Path:
    """The run as a kill left it right after the checkpoint of step 6."""
    shutil.copytree(unbroken, to / "run", symlinks=True)
    (to / "run/summary.json").unlink()
    (to / "run/checkpoints/ep3-ba8-rank0.pt").unlink()
    (to / "run/checkpoints" / LATEST).unlink()
    (to / "run/checkpoints" / LATEST).symlink_to("ep2-ba6-rank0.pt")
    return to / "run"


# Checkpoints


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
    "one bit flipped": (flip, "damaged in "),
    "deleted, so that the link to it dangles": (Path.unlink, "missing"),
}


def test_run_goes_on_from_the_checkpoint_before_a_torn_one(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    run = copy_of(unbroken, tmp_path)
    cut(run / "checkpoints/ep2-ba6-rank0.pt")
    began = time.monotonic()
    assert run_train([DEIT, *tiny(tmp_path, "run")]) == 0
    seconds = time.monotonic() - began
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "goes on after" in text]
    why = "Refused ep2-ba6-rank0.pt: cut short."
    assert line == f"{run} goes on after step 3. {why}"
    assert rows(run) == rows(unbroken)
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
    model = {f"weight{i}": torch.full((1 << 16,), float(number)) for i in range(40)}
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


# Signals


def knock(pid: int) -> None:
    """Both signals, hundreds of times a second, for as long as the run is there."""
    end = time.monotonic() + 60
    while os.getppid() == pid and time.monotonic() < end:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
        time.sleep(0.005)
    os._exit(0)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class KnockFrom(Callback):
    """Has the signals come from a step on; begun by the callback, since there is a handler by then."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.process: Any = None

    def batch_start(self, state: Any, logger: Any) -> None:
        if state.timestamp.batch.value == self.step and self.process is None:
            self.process = multiprocessing.get_context("fork").Process(target=knock, args=(os.getpid(),), daemon=True)
            self.process.start()


def test_signals_that_do_not_stop_tear_no_checkpoint(handlers: None, unbroken: Path, tmp_path: Path) -> None:
    argv = [DEIT, *tiny(tmp_path, "run")]
    cfg = config.load(argv[0], argv[1:])
    trainer, knocks = RECIPES[cfg.recipe].build(cfg), KnockFrom(4)
    trainer.state.callbacks.append(knocks)
    try:
        status = fit(trainer, cfg)
        time.sleep(0.1)  # they still come: nothing but 143 may be the end of it
    finally:
        knocks.process.kill()
        knocks.process.join()
    assert status == 143
    assert names(tmp_path / "run")[1].startswith("ep2-ba5") and newest_whole(tmp_path / "run/checkpoints").refused == ()
    assert run_train(argv) == 0
    assert losses(tmp_path / "run") == losses(unbroken)
    assert_same(saved(tmp_path / "run"), saved(unbroken))


@pytest.mark.slow
def test_signal_while_a_run_starts_up_is_no_stop_with_a_checkpoint(tmp_path: Path, tell: Tell) -> None:
    """143 would have schedulers start a run again for ever that its launcher ended because another rank failed."""
    command = [sys.executable, "train.py", DEIT, *tiny(tmp_path, "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **pipes)
    output = run.stdout
    assert output is not None
    try:
        next(line for line in output if "images a step" in line)  # Composer is there, the first step is not
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=30) == -signal.SIGTERM
    finally:
        run.kill()
        output.close()
    tell("SIGTERM before the first step", "ends by the signal: nothing was saved", time.monotonic() - began)


# Another number of ranks


class ReadyRanks:
    """Starts runs of two ranks in a second, see ready_ranks.py; what it started and left ends with it."""

    def __init__(self, temporary: Path) -> None:
        self.temporary, self.groups = temporary, []
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "tests.faults.ready_ranks"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=variables, **pipes)
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "it ended"
        return json.loads(line)

    def call(self, **what: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return self.answer()

    def start(self, arguments: list[str], log: Path, notes: Path | None = None) -> "ReadyRun":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = self.call(start=arguments, ranks=2, port=port, log=str(log), notes=notes and str(notes))
        self.groups.append(group)
        return ReadyRun(self, group)

    def close(self) -> None:
        for group in self.groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True)
class ReadyRun:
    ranks: ReadyRanks
    group: int

    def poll(self) -> int | None:
        return self.ranks.call(poll=self.group)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        finish(self)


class ComposerRun:
    """``composer -n 2 train.py`` in a session of its own."""

    def __init__(self, arguments: list[str], log: Path, temporary: Path) -> None:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        command = [str(BIN / "composer"), "-n", "2", "train.py", *arguments]
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=file, stderr=file, start_new_session=True
            )
        self.poll = self.process.poll

    def kill(self) -> None:
        """The launcher, the ranks and their workers, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def finish(run: ReadyRun | ComposerRun, seconds: float = 600.0) -> int:
    end = time.monotonic() + seconds
    while (status := run.poll()) is None:
        assert time.monotonic() < end, "it does not end"
        time.sleep(0.02)
    return status


@pytest.fixture(scope="module")
def ready() -> Iterator[ReadyRanks]:
    # In a folder with a short name, for sockets lie in it.
    with tempfile.TemporaryDirectory(prefix="kill", ignore_cleanup_errors=True) as temporary:
        ranks = ReadyRanks(Path(temporary))
        yield ranks
        ranks.close()


def samples(notes: Path) -> dict[int, list[int]]:
    """Of each step, of all ranks together."""
    found: dict[int, list[int]] = {}
    for path in notes.glob("*.jsonl"):
        for note in map(json.loads, path.read_text().splitlines()):
            found[note["step"]] = sorted([*found.get(note["step"], []), *note["ids"]])
    return found


def test_run_goes_on_with_another_number_of_ranks_and_the_same_samples(
    ready: ReadyRanks, photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    """One rank, two, and one again; both changes lie inside an epoch."""
    small = ["model.depth=1", "run.eval_interval=9ep", "run.progress_bar=false"]
    overrides = [*tiny_photo_overrides(photo_mds, tmp_path, "run"), *small]
    notes, log = tmp_path / "notes", tmp_path / "log"
    notes.mkdir()
    assert watched_run.main([str(notes), DEIT, *overrides, "max_duration=5ba"]) == 0
    two = ready.start([DEIT, *overrides, "max_duration=17ba"], log, notes)
    assert finish(two) == 0, log.read_text()
    capsys.readouterr()
    began = time.monotonic()
    assert watched_run.main([str(notes), DEIT, *overrides]) == 0
    seconds = time.monotonic() - began
    said = [text for text in log.read_text().splitlines() if "goes on after" in text]
    said += [text for text in capsys.readouterr().out.splitlines() if "goes on after" in text]
    for line, step, before, now in zip(said, (5, 17), (1, 2), (2, 1), strict=True):
        assert f"goes on after step {step}. Saved by {before}" in line
        assert f"goes on with {now}: the same images in every step" in line
        tell(f"saved by {before} ranks, started with {now}", line, seconds)
    whole = tmp_path / "notes of whole"
    whole.mkdir()
    assert watched_run.main([str(whole), DEIT, *tiny_photo_overrides(photo_mds, tmp_path, "whole"), *small]) == 0
    assert samples(notes) == samples(whole) and len(samples(notes)) == 24


# Twenty kills


def supervised(photos: Path, folder: Path, name: str) -> list[str]:
    """RandAugment, mixing and an average, images streamed into a cache, two workers for each rank."""
    photo_run = tiny_photo_overrides(folder / f"cache_{name}", folder, name)
    data = [f"data.remote={photos}", "data.num_workers=2", "data.validate_hash=xxh64"]
    more = ["model.depth=1", "max_duration=8ep", "algorithms.EMA={smoothing: 0.9, update_interval: 1ba}"]
    return [DEIT, *photo_run, *data, *more]


def swav(digits: Path, folder: Path, name: str) -> list[str]:
    """A queue, prototypes that are frozen at first, batch norm over both ranks, a worker each."""
    last = [f"loss.freeze_prototypes_epochs={10 / 89}", f"loss.hard_assignment_epochs={20 / 89}", "data.num_workers=1"]
    return [page("swav"), *tiny_pretraining("swav", digits, folder, name), *last, "max_duration=96ba"]


def saved_step(run: Path) -> int:
    steps = [int(path.name.split("-ba")[1].split("-")[0]) for path in (run / "checkpoints").glob("ep*.pt")]
    return max(steps, default=0)


def logged_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0


def kill_and_start_again(
    recipe: Callable[..., list[str]], source: Path, folder: Path, ready: ReadyRanks, often: int, tell: Tell
) -> None:
    """Kills of the whole process group at moments drawn from the recipe's name, then a comparison of every bit."""
    rng, run, log = random.Random(recipe.__name__), folder / "killed", folder / "log"
    options = ["run.save_interval=2ba", "run.log_interval=1ba", "run.progress_bar=false"]
    whole = ready.start([*recipe(source, folder, "whole"), *options], log)
    assert finish(whole) == 0, log.read_text()[-4000:]
    arguments = [*recipe(source, folder, "killed"), *options]
    moments: Counter[str] = Counter()
    lost, recovered = [], []
    for number in range(often):
        before, began = saved_step(run), time.monotonic()
        by_command = number % 5 == 1
        again = ComposerRun(arguments, log, ready.temporary) if by_command else ready.start(arguments, log)
        starting = by_command or number % 5 == 3
        try:
            end = began + rng.uniform(0, 20 if by_command else 3) if starting else math.inf
            while saved_step(run) == before and time.monotonic() < end:
                assert again.poll() is None, log.read_text()[-4000:]
                time.sleep(0.01)
            if not starting:
                recovered.append(time.monotonic() - began)
                time.sleep(rng.uniform(0, 0.4))
            assert again.poll() is None, "the run was over too soon"
        finally:
            again.kill()
        saving = any((run / "checkpoints").glob("*.partial"))
        moments["starting" if starting else "saving" if saving else "training or evaluating"] += 1
        lost.append(logged_step(run) - saved_step(run))
    last = ComposerRun(arguments, log, ready.temporary) if often > 5 else ready.start(arguments, log)
    try:
        assert finish(last) == 0, log.read_text()[-4000:]
    finally:
        last.kill()
    assert rows(run) == rows(folder / "whole")
    assert_same(saved(run), saved(folder / "whole"))
    assert names(run) == names(folder / "whole")
    assert max(lost) <= 2, "no more than the save interval"
    said = f"the same bits as without; at most {max(lost)} steps done again; {dict(moments)}"
    print(said, f"{saved_step(run)} steps", f"recovered in {sum(recovered) / len(recovered):.1f} s")
    tell(f"kill -9 of 2 ranks, {often} times, {recipe.__name__}", said, sum(recovered) / len(recovered))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("recipe", [supervised, swav])
def test_twenty_kills_of_two_ranks_change_no_bit(
    recipe: Callable[..., list[str]], ready: ReadyRanks, photo_mds: Path, digits: Path, tmp_path: Path, tell: Tell
) -> None:
    kill_and_start_again(recipe, photo_mds if recipe is supervised else digits, tmp_path, ready, 20, tell)
    # Folders that Python makes for its processes stay behind a kill, and no lock or memory of ours.
    assert [name for name in os.listdir(ready.temporary) if "lock" in name] == []
    assert [path for path in Path("/dev/shm").glob("*_locals") if str(tmp_path).encode() in path.read_bytes()] == []
