"""Twenty kills, and another number of ranks: the same bits, and the same images in every step."""

import json
import math
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import run_train, tiny_photo_overrides
from tests.faults import watched_run
from tests.faults.conftest import Tell
from tests.faults.small_run import DEIT, assert_same, names, rows, saved, tiny
from tests.faults.started_runs import ComposerRun, ReadyRanks, finish, ready
from tests.self_supervised.test_self_supervised import digits as digits
from tests.self_supervised.test_self_supervised import page
from tests.self_supervised.test_self_supervised import tiny as tiny_pretraining
from tests.training.test_train import losses
from vitcomposer.runs.metrics import read_metrics

__all__ = ["digits", "ready"]

pytestmark = pytest.mark.timeout(120)


# Another number of ranks


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


def test_evaluation_measures_the_same_on_one_two_and_three_ranks(ready: ReadyRanks, tmp_path: Path) -> None:
    """37 images in steps of 12: on two and three ranks the last batch is padding alone on all of them but the first."""
    options = ["data.synthetic_samples=37", "max_duration=1ep", "global_train_batch_size=12", "optimizer.lr=0.02"]
    options += ["evaluation.global_batch_size=12", "algorithms.EMA={smoothing: 0.5, update_interval: 1ba}"]
    assert run_train([DEIT, *tiny(tmp_path, "1"), *options]) == 0
    runs = {"1": json.loads((tmp_path / "1/summary.json").read_text())}
    for ranks in (2, 3):
        run = tmp_path / str(ranks)
        shutil.copytree(tmp_path / "1", run)
        (run / "summary.json").unlink()  # as a kill during the evaluation leaves it, which is then made up for
        (run / "metrics.jsonl").unlink()
        log = tmp_path / f"{ranks}.log"
        assert finish(ready.start([DEIT, *tiny(tmp_path, str(ranks)), *options], log, ranks=ranks)) == 0, (
            log.read_text()
        )
        runs[str(ranks)] = json.loads((run / "summary.json").read_text())
        line = read_metrics(run / "metrics.jsonl")[-1]
        measured = {name: value for name, value in line.items() if name.startswith("metrics/")}
        alone = read_metrics(tmp_path / "1/metrics.jsonl")[-1]
        assert len(measured) == 8 and measured == pytest.approx({name: alone[name] for name in measured}, abs=1e-6)
    for name in ("top1", "top5", "loss", "top1_ema", "top5_ema"):
        assert [run[name] for run in runs.values()] == pytest.approx([runs["1"][name]] * 3, abs=1e-6), name
    assert [run["world_size"] for run in runs.values()] == [1, 2, 3] and runs["1"]["loss"] != pytest.approx(math.log(8))


def test_ctrl_c_saves_the_step_of_two_ranks_and_the_run_goes_on_from_it(
    ready: ReadyRanks, tmp_path: Path, tell: Tell
) -> None:
    """It comes to ranks and loader workers at once, as from a terminal."""
    argv = [DEIT, *tiny(tmp_path, "run"), "data.num_workers=1", "run.save_interval=900ba", "run.eval_interval=900ba"]
    log, metrics = tmp_path / "log", tmp_path / "run/metrics.jsonl"
    run = ready.start([*argv, "max_duration=900ba"], log)
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 4):
        assert run.poll() is None, log.read_text()
        time.sleep(0.02)
    began = time.monotonic()
    os.killpg(run.group, signal.SIGINT)
    assert finish(run) == 130, log.read_text()
    text = log.read_text()
    (seen,) = [line for line in text.splitlines() if line.startswith("saved step ")]
    step = int(seen.split()[2])
    assert re.match(rf"saved step {step} \(epoch {step / 2:g}\)\. Go on: ", seen)
    assert "Traceback" not in text and "error:" not in text and "worker" not in text
    assert [name for name in names(tmp_path / "run") if name.startswith("ep")] == [f"ep{step // 2}-ba{step}-rank0.pt"]
    assert len(metrics.read_text().splitlines()) == step
    tell("Ctrl-C (two ranks)", seen.partition(" Go on: ")[0] + " Go on: ...", time.monotonic() - began)
    assert run_train([*argv, "data.num_workers=0", f"max_duration={step + 1}ba"]) == 0
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, step + 2))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_swav_goes_on_with_another_number_of_ranks_and_its_queue(
    ready: ReadyRanks, digits: Path, tmp_path: Path
) -> None:
    """One rank, two, and one again, past the freeze of the prototypes and into hard codes: rounding apart, one run."""
    last = [f"loss.freeze_prototypes_epochs={4 / 89}", f"loss.hard_assignment_epochs={12 / 89}", "schedule.alpha_f=1"]

    def run(name: str, steps: int) -> list[str]:
        return [page("swav"), *tiny_pretraining("swav", digits, tmp_path, name), *last, f"max_duration={steps}ba"]

    log = tmp_path / "log"
    assert run_train(run("changed", 6)) == 0
    assert finish(ready.start(run("changed", 14), log)) == 0, log.read_text()
    assert run_train(run("changed", 20)) == 0
    assert run_train(run("whole", 20)) == 0
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    models = [saved(tmp_path / name)["state"]["model"] for name in ("changed", "whole")]
    queues = [next(model[key] for key in model if key.endswith("queue")) for model in models]
    assert queues[0].abs().sum() > 0 and torch.allclose(*queues, atol=1e-3)


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
    recipe: Callable[..., list[str]],
    source: Path,
    folder: Path,
    ready: ReadyRanks,
    often: int,
    tell: Tell,
    *,
    ranks: int = 2,
) -> None:
    """Kills of the whole process group at moments drawn from the recipe's name, then a comparison of every bit.

    Each start has another number of loader workers, from 0 to 4.
    """
    rng, run, log = random.Random(recipe.__name__), folder / "killed", folder / "log"
    options = ["run.save_interval=2ba", "run.log_interval=1ba", "run.progress_bar=false"]
    whole = ready.start([*recipe(source, folder, "whole"), *options], log, ranks=ranks)
    assert finish(whole) == 0, log.read_text()[-4000:]
    arguments = [*recipe(source, folder, "killed"), *options]
    moments: Counter[str] = Counter()
    lost, recovered = [], []
    for number in range(often):
        before, began = saved_step(run), time.monotonic()
        by_command = number % 5 == 1 and ranks == 2
        this = [*arguments, f"data.num_workers={(2, 0, 4, 1, 3)[number % 5]}"]
        again = ComposerRun(this, log, ready.temporary) if by_command else ready.start(this, log, ranks=ranks)
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
    last = ComposerRun(arguments, log, ready.temporary) if ranks == 2 else ready.start(arguments, log, ranks=1)
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
    tell(
        f"kill -9 of {ranks} rank{'s' * (ranks > 1)}, {often} times, {recipe.__name__}",
        said,
        sum(recovered) / len(recovered),
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("recipe", [supervised, swav])
def test_twenty_kills_of_two_ranks_change_no_bit(
    recipe: Callable[..., list[str]], ready: ReadyRanks, photo_mds: Path, digits: Path, tmp_path: Path, tell: Tell
) -> None:
    kill_and_start_again(recipe, photo_mds if recipe is supervised else digits, tmp_path, ready, 20, tell)
    assert_nothing_left(ready, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_of_one_rank_change_no_bit(ready: ReadyRanks, photo_mds: Path, tmp_path: Path, tell: Tell) -> None:
    kill_and_start_again(supervised, photo_mds, tmp_path, ready, 10, tell, ranks=1)
    assert_nothing_left(ready, tmp_path)


def assert_nothing_left(ready: ReadyRanks, folder: Path) -> None:
    # Folders that Python makes for its processes stay behind a kill, and no lock or memory of ours.
    assert [name for name in os.listdir(ready.temporary) if "lock" in name] == []
    assert [path for path in Path("/dev/shm").glob("*_locals") if str(folder).encode() in path.read_bytes()] == []
