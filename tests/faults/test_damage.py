"""Damage to the small files beside sound checkpoints: it is said, set aside, and costs no run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Tell, run_train
from tests.faults.small_run import DEIT, STEPS, assert_same, rows, saved, tiny, unbroken
from tests.faults.test_checkpoints import copy_of
from vitcomposer import config
from vitcomposer.runs.folder import already_finished, unlock_run_folder
from vitcomposer.runs.identity import read_identity
from vitcomposer.runs.metrics import split_metrics

__all__ = ["unbroken"]

SMALL = ("config.yaml", "identity.json", "summary.json", "environment.json", "metrics.jsonl", "report.html")


def flip(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :]


PATTERNS: dict[str, Callable[[bytes], bytes]] = {
    "one byte above 0x80": flip,
    "cut": lambda content: content[: len(content) // 2],
    "cut at the end of a line": lambda content: content[: content.rfind(b"\n", 0, len(content) * 2 // 3) + 1],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "of another type": lambda content: b'[1, {"step": "x"}]\n',
    "null": lambda content: b"null\n",
    "nested without end": lambda content: b"[" * 100_000,
}


def damage(run: Path, name: str, pattern: str) -> None:
    if (run / name).is_file():
        (run / name).write_bytes(PATTERNS[pattern]((run / name).read_bytes()))


@pytest.mark.parametrize("pattern", [*PATTERNS, "deleted"])
@pytest.mark.parametrize("name", SMALL)
def test_damaged_file_keeps_no_run_from_being_known(
    name: str, pattern: str, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run, symlinks=True)
    (run / name).unlink() if pattern == "deleted" else damage(run, name, pattern)
    cfg = config.load(DEIT, tiny(tmp_path, "run"))
    try:
        assert already_finished(cfg) == (name != "summary.json")
    finally:
        unlock_run_folder(cfg)
    said = capsys.readouterr().out
    if name in ("config.yaml", "identity.json", "summary.json") and pattern != "deleted":
        assert f"{run / name} is not as the run wrote it and is set aside as {name}.bad." in said
        assert (run / f"{name}.bad").exists() and not (run / name).exists()
    else:
        assert not said


@pytest.mark.parametrize("name", ["config.yaml", "identity.json"])
def test_other_configuration_is_refused_beside_a_damaged_file_too(
    name: str, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(unbroken, tmp_path / "run", symlinks=True)
    damage(tmp_path / "run", name, "cut")
    assert run_train([DEIT, *tiny(tmp_path, "run"), "optimizer.weight_decay=0.1"]) == 2
    assert "optimizer.weight_decay must be 0.05 to go on with the run" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["one byte above 0x80", "cut at the end of a line", "nested without end"])
def test_run_goes_on_beside_damage_of_all_small_files(
    pattern: str, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tell: Tell
) -> None:
    run = copy_of(unbroken, tmp_path)
    shutil.copy(unbroken / "summary.json", run)
    (run / ".remote.json").write_text("{}")
    for name in (*SMALL, ".remote.json"):
        damage(run, name, pattern)
    good, bad = split_metrics((run / "metrics.jsonl").read_bytes())
    kept = [line["step"] for line in good]
    assert run_train([DEIT, *tiny(tmp_path, "run")]) == 0
    said = capsys.readouterr().out
    assert_same(saved(run), saved(unbroken))
    others = [row for row in rows(run) if row["step"] != 6]  # at which it is evaluated again
    assert others == [row for row in rows(unbroken) if row["step"] > 6 or row["step"] in kept and row["step"] < 6]
    assert (f"{run}/metrics.jsonl: {len(bad)} of its lines cannot be read" in said) == bool(bad)
    assert bool(bad) == (run / "metrics.jsonl.bad").is_file()
    a, b = (json.loads((each / "summary.json").read_text()) for each in (run, unbroken))
    assert a["finished"] and all(a[key] == b[key] for key in ("top1", "loss", "steps"))
    assert (run / "config.yaml").read_text() == (unbroken / "config.yaml").read_text().replace(
        str(unbroken.parent), str(tmp_path)
    )
    assert read_identity(run) is not None and (run / "report.html").read_text().endswith("</html>\n")
    tell(f"damage to all small files of a run, {pattern}", "set aside and said; the bits of an unbroken run", 0.0)


WRONG = [
    b'{"step": 4, "epoch": 2, "lr": "\xff"}',
    b'{"step": "4", "epoch": 2}',
    b'{"step": 4.5}',
    b'{"step": true}',
    b'{"step": -1}',
    b'{"step": null}',
    b'{"epoch": 2}',
    b'{"step": 4, "epoch": "two"}',
    b'{"step": 4, "lr": [1]}',
    b'{"step": 4, "lr": {}}',
    b'{"step": 4, "lr": true}',
    b'{"step": 4, "lr": NaN}',
    b'{"step": 4, "lr": Infinity}',
    b'{"step": 4, "lr": 1e999}',
    b'{"step": 4, "lr": 1' + b"0" * 400 + b"}",
    b"4",
    b"[" * 100_000,
    b'{"step": 4',
    b"\x80",
    b"\0\0\0",
]


def test_wrong_lines_are_told_from_right_ones_wherever_they_stand() -> None:
    right = [{"step": 0}, {"step": 1, "epoch": 0.5, "lr": None, "seconds": 3}, {"step": 1}]
    lines: list[bytes] = []
    for index, wrong in enumerate(WRONG):
        lines += [wrong, *(json.dumps(right[index]).encode() for _ in range(index < len(right)))]
    assert split_metrics(b"".join(line + b"\n" for line in lines)) == (right, WRONG)
    assert split_metrics(b'{"step": 1}\n{"step": 2, "lr"') == ([{"step": 1}], []), "of a kill, not of a fault"
    assert split_metrics(b'{"step": 1}\n{"step": 2}') == ([{"step": 1}, {"step": 2}], [])
    assert split_metrics(b"") == ([], [])


def test_bad_lines_are_moved_out_of_the_way_once(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(unbroken, tmp_path)
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    broken = [lines[0][:9] + b"\x80" + lines[0][9:], *lines[1:3], WRONG[3], *lines[3:]]
    (run / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in broken))
    assert run_train([DEIT, *tiny(tmp_path, "run")]) == 0
    assert f"{run}/metrics.jsonl: 2 of its lines cannot be read and are set aside" in capsys.readouterr().out
    assert (run / "metrics.jsonl.bad").read_bytes() == broken[0] + b"\n" + WRONG[3] + b"\n"
    assert rows(run) == rows(unbroken)[1:] and rows(run)[-1]["step"] == STEPS
    assert_same(saved(run), saved(unbroken))


def test_what_a_kill_left_half_written_goes(unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run, symlinks=True)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    for name in (".report.partial.html", "summary.json.partial", "checkpoints/ep9-ba9-rank0.pt.partial", "a.part"):
        (run / name).write_bytes(b"half of it")
    (run / "checkpoints/ep8-ba9-rank0.pt.partial").mkdir()  # of shares
    assert run_train([DEIT, *tiny(tmp_path, "run")]) == 0
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


@pytest.mark.parametrize("names", [b"[", b'{"a": 1}', b"[1, 2]", b"\xff"])
def test_damaged_class_names_are_written_anew(names: bytes, tmp_path: Path, capsys: Any) -> None:
    from tests.callbacks.test_record import record_in
    from vitcomposer.data.mds.stream import ImageStream

    class Stream:
        folder = tmp_path / "data"

    Stream.folder.mkdir()
    (Stream.folder / "class_names.json").write_text('["cat", "dog"]\n')
    dataset = ImageStream.__new__(ImageStream)
    dataset.__dict__["stream"] = Stream
    record, _ = record_in(tmp_path)
    state: Any = type("State", (), {"dataloader": type("Loader", (), {"dataset": dataset})})
    (tmp_path / "class_names.json").write_bytes(names)
    record._write_class_names(state)
    assert "class_names.json cannot be read and is set aside as class_names.json.bad" in capsys.readouterr().out
    assert json.loads((tmp_path / "class_names.json").read_text()) == ["cat", "dog"]
    (tmp_path / "class_names.json").write_text('["Katze", "Hund"]')
    record._write_class_names(state)
    assert json.loads((tmp_path / "class_names.json").read_text()) == ["Katze", "Hund"], "what is there stays"
