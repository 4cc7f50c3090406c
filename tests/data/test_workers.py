"""The number of loader workers that ``data.num_workers=auto`` stands for, by cores, ranks and room."""

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_train, tiny_photo_overrides
from vitcomposer import config
from vitcomposer.data import workers
from vitcomposer.data.mds import worker_room
from vitcomposer.data.workers import Place, choose_workers, number_of_workers, planned_workers
from vitcomposer.schema import Data
from vitcomposer.training import setup

DEIT = str(ROOT / "yamls/deit_ti.yaml")


def place(cores: int, *, first: int = 0, node: int = 0, quota: float | None = None, room: int = 1000) -> Place:
    return Place(node=node, cores=frozenset(range(first, first + cores)), quota=quota, room=room)


@pytest.mark.parametrize(
    ("cores", "ranks", "gpu", "count"),
    [
        (192, 8, True, 23),
        (16, 1, True, 15),
        (128, 1, True, 32),
        (2, 1, True, 1),
        (1, 1, True, 1),
        (8, 8, True, 1),
        (1, 1, False, 1),
        (2, 1, False, 1),
        (8, 1, False, 2),
        (16, 1, False, 4),
        (64, 1, False, 4),
        (64, 8, False, 2),
    ],
)
def test_each_rank_has_its_part_of_the_cores(cores: int, ranks: int, gpu: bool, count: int) -> None:
    assert choose_workers([place(cores)] * ranks, gpu=gpu).count == count
    assert planned_workers(cores, ranks, gpu=gpu) == count


def test_cores_of_its_own_are_not_divided() -> None:
    """As SLURM binds its tasks; a core that two ranks may use is half of each."""
    apart = [place(12, first=12 * rank) for rank in range(4)]
    assert choose_workers(apart, gpu=True).count == 11
    half = [place(12), place(12, first=6)]  # six alone, six with the other
    assert choose_workers(half, gpu=True).count == 8
    two_nodes = [place(16, node=0), place(16, node=1)]
    assert choose_workers(two_nodes, gpu=True).count == 15


def test_all_ranks_take_the_number_of_the_poorest() -> None:
    """Streaming counts on as many workers in each."""
    ranks = [place(16, node=0), place(8, node=1)]
    chosen = choose_workers(ranks, gpu=True)
    assert chosen == choose_workers(ranks[::-1], gpu=True)
    assert (chosen.count, chosen.reason) == (7, "8 CPU cores, all but one, from 1 to 32")


def test_a_quota_is_shared_and_memory_may_limit() -> None:
    assert choose_workers([place(64, quota=8.0)] * 2, gpu=True).count == 3
    few = choose_workers([place(16, room=3)], gpu=True)
    assert few.count == 3 and "16 CPU cores, and there is no room for more (docker run --shm-size" in few.reason
    none = choose_workers([place(16, room=0)], gpu=True)
    assert none.count == 1, "which the loader refuses, with what it lacks"


def test_room_is_what_the_loader_lets_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_room, "free_bytes", lambda: (1 << 20) + 65_000_000)
    monkeypatch.setattr(worker_room.resource, "getrlimit", lambda _: (1024, 4096))
    assert worker_room.workers_with_room(prefetch_factor=2, batch_bytes=10_000_000) == 3
    assert worker_room.workers_with_room(prefetch_factor=2, batch_bytes=0) == (4096 - 192) // 48
    monkeypatch.setattr(worker_room.resource, "getrlimit", lambda _: (64, 64))
    assert worker_room.workers_with_room(prefetch_factor=2, batch_bytes=10_000_000) == 0


V2 = {"a/cpu.max": "max 100000", "a/b/cpu.max": "400000 100000", "cpu.max": "600000 100000"}
V1 = {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}
V1_ABOVE = {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/a/b", V2, 4.0),
        ("0::/a", V2, 6.0),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("3:cpu,cpuacct:/a", V1, None),
        ("3:cpu,cpuacct:/a\n2:memory:/a", V1 | V1_ABOVE, 2.5),
        ("0::/gone", {}, None),
    ],
)
def test_quota_is_the_least_of_the_groups_around_a_process(
    groups: str, files: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {**files, "own": groups}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(workers, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(workers, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(workers, "_affinity", lambda: frozenset(range(64)))
    assert workers._quota() == quota
    assert workers.usable_cores() == (64 if quota is None else round(quota))


def test_a_number_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_affinity", lambda: frozenset(range(64)))
    monkeypatch.setattr(workers, "_quota", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert number_of_workers(Data(source="synthetic", num_workers=40), gpu=True) == 40
    assert number_of_workers(Data(source="synthetic"), gpu=True) == 15


def test_a_run_keeps_its_number_and_another_one_changes_nothing(
    photo_mds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve steps with two workers and twelve after a resume with one are those of a run without any, bit for bit."""

    def train(name: str, *more: str) -> list[float]:
        overrides = [text for text in tiny_photo_overrides(photo_mds, tmp_path, name) if "num_workers" not in text]
        assert run_train([DEIT, *overrides, "schedule.alpha_f=1", *more]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["loss/train/total"] for row in rows if "loss/train/total" in row]

    for cores, length in ((8, "1ep"), (4, "2ep")):
        monkeypatch.setattr(setup, "here", lambda cores=cores, **_: place(cores))
        losses = train("auto", f"max_duration={length}")
        count = cores // 4
        assert f"data.num_workers={count}: {cores} CPU cores, one for every four" in capsys.readouterr().err
        assert config.load(tmp_path / "auto/config.yaml").data.num_workers == count
    assert losses == train("none", "data.num_workers=0") and len(losses) == 24
