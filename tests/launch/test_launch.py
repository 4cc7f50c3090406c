"""Two ranks under Composer's launcher and under torchrun, on real photographs."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PHOTOS, ROOT, TRAIN_PER_CLASS, VAL_PER_CLASS, run_train, tiny_photo_overrides
from tests.training.test_train import losses

DEIT = str(ROOT / "yamls/deit_ti.yaml")
BIN = Path(sys.executable).parent


def launch(launcher: list[str], arguments: list[str]) -> None:
    done = subprocess.run([*launcher, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_two_ranks_see_disjoint_samples_that_cover_the_set(photo_mds: Path, tmp_path: Path) -> None:
    overrides = [*tiny_photo_overrides(photo_mds, tmp_path, "ids"), "augment.repeated_augmentation=1"]
    launch([str(BIN / "composer"), "-n", "2"], ["tests/two_ranks.py", str(tmp_path), DEIT, *overrides])
    for split, per_class in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        first, second = (json.loads((tmp_path / f"{rank}.json").read_text())[split] for rank in (0, 1))
        assert len(first) == len(set(first)) and len(second) == len(set(second))
        assert not set(first) & set(second)
        assert set(first) | set(second) == set(range(len(PHOTOS) * per_class))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_learn_the_photographs(photo_mds: Path, tmp_path: Path) -> None:
    """deit_ti at a size for CPU, with less augmentation: 20 epochs are 240 steps, not 375,000."""
    epochs = 20
    overrides = [
        *tiny_photo_overrides(photo_mds, tmp_path, "photos"),
        f"max_duration={epochs}ep",
        "schedule.t_warmup=2ep",
        "optimizer.lr=3e-2",
        "augment.repeated_augmentation=1",
        "augment.rand_augment=null",
        "augment.random_erasing=0",
        "model.depth=4",
        "mixing.prob=0",
        f"run.eval_interval={epochs}ep",
        f"run.save_interval={epochs}ep",
    ]
    launch([str(BIN / "composer"), "-n", "2"], ["train.py", DEIT, *overrides])
    run = tmp_path / "photos"
    curve = losses(run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["images_seen"] == epochs * len(PHOTOS) * TRAIN_PER_CLASS
    # Smoothed labels keep the loss well above 0 even for a perfect model.
    assert sum(curve[-12:]) < 0.7 * sum(curve[:12])
    assert summary["top1"] > 5 / len(PHOTOS), "held-out top-1 should be five times chance"


def test_torchrun_starts_it_and_two_ranks_end_with_the_losses_of_one(photo_mds: Path, tmp_path: Path) -> None:
    """Without mixing, which pairs the images of a device, and drop path, the ranks only change the rounding."""
    overrides = ["mixing.prob=0", "model.drop_path_rate=0", "augment.repeated_augmentation=1"]
    two = [*tiny_photo_overrides(photo_mds, tmp_path, "two"), *overrides]
    launch([str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"], ["train.py", DEIT, *two])
    assert run_train([DEIT, *tiny_photo_overrides(photo_mds, tmp_path, "one"), *overrides]) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_two_nodes_stream_from_a_remote_and_resume(photo_mds: Path, tmp_path: Path) -> None:
    """Two launchers as on two machines, one disk for the run; the second start goes on where the first ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = [
        *tiny_photo_overrides(photo_mds, tmp_path, "nodes"),
        f"data.remote={photo_mds}",
        f"data.local={tmp_path / 'cache'}",
    ]
    for duration in ("1ep", "2ep"):
        nodes = []
        for rank in ("0", "1"):
            place = ["--world_size", "2", "--node_rank", rank, "--base_rank", rank]
            place += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
            command = [str(BIN / "composer"), "-n", "1", *place, "train.py", DEIT, *overrides]
            with (tmp_path / f"node{rank}.log").open("w") as log:
                nodes.append(subprocess.Popen([*command, f"max_duration={duration}"], cwd=ROOT, stdout=log, stderr=log))
        try:
            assert [node.wait(timeout=120) for node in nodes] == [0, 0], (tmp_path / "node0.log").read_text()[-3000:]
        finally:
            for node in nodes:
                node.kill()
    summary = json.loads((tmp_path / "nodes" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == 24 and summary["finished"]
    assert len(losses(tmp_path / "nodes")) == 24


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "status"), [(["composer", "-n", "2"], 2), (["torchrun", "--standalone", "--nproc-per-node", "2"], 1)]
)
def test_a_wrong_key_is_reported_once(launcher: list[str], status: int, tmp_path: Path) -> None:
    """Whatever the launcher prints of its own: which rank has ended, and with what."""
    command = [str(BIN / launcher[0]), *launcher[1:], "-m", "vitcomposer.train", DEIT, "optimizer.rl=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == status
    assert len(re.findall(r"optimizer\.rl +is no key", done.stdout + done.stderr)) == 1
