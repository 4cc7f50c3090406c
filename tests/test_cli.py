"""The command line: what it prints, what it returns, and that a mistake is one line."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vitcomposer.cli import main


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "out"
    assert main(["convert", "digits", str(out), "--shard-size", "64kb", "--workers", "1"]) == 0
    return out


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    for file in (path for path in digits.rglob("*") if path.is_file()):
        target = tmp_path / "copy" / file.relative_to(digits)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return tmp_path / "copy"


def change_first_shard(root: Path, **changes: object) -> None:
    index = json.loads((root / "train/index.json").read_text())
    index["shards"][0] |= changes
    (root / "train/index.json").write_text(json.dumps(index))


def test_convert_prints_a_summary_and_a_second_call_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "digits", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0
    first, facts, following = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"1,797 of 1,797 images, [\d,]+ images/s", first)
    assert re.fullmatch(r"train 1,438  val 359 \(20 % of each class\)   10 classes: 0 1 2 3 \.\.\. 9   0.\d MB", facts)
    assert following == f"Next: vitcomposer inspect {tmp_path / 'out'}"
    assert main([*command, "--details"]) == 0
    printed = capsys.readouterr().out
    assert "1,438 (1,438 PNG)" in printed and "over 10 classes" in printed
    assert main(command) == 0
    assert "already done" in capsys.readouterr().out


def test_convert_prints_what_was_stored_and_inspect_finds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import read_photo

    for name, count in (("train", 5), ("val", 2)):
        (tmp_path / "images" / name / "a").mkdir(parents=True)
        for number in range(count):
            read_photo("china").resize((500, 375)).save(tmp_path / "images" / name / f"a/{number}.jpg", quality=95)
    read_photo("china").save(tmp_path / "images/train/a/x.png")
    out, command = str(tmp_path / "out"), ["convert", "folder", str(tmp_path / "images")]
    assert main([*command, out, "--workers", "1", "--details"]) == 0
    printed = capsys.readouterr().out
    assert "stored     seekable: 5 of 6, kept: PNG: 1 of 6 (+" in printed
    assert "stored     kept: 2 of 2 (+0.0 % bytes in all)" in printed
    assert main(["inspect", out]) == 0
    printed = capsys.readouterr().out
    assert "1 other, 5 seekable, of 6 samples read" in printed and "2 other, of 2 samples read" in printed
    options = ["--no-seekable", "--short-side", "100", "--quality", "80", "--raw-fraction", "0.5", "--raw-below", "32"]
    assert main([*command, f"{out}2", "--workers", "1", *options, "--reencode", "75", "--details"]) == 0
    assert "resized: " in capsys.readouterr().out
    assert main(["inspect", f"{out}2", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "image: bytes, image_small: bytes, label: int" in printed and " raw, of 6 samples read" in printed
    assert main([*command, f"{out}3", "--workers", "1", "--seekable", "--raw-fraction", "1", "--details"]) == 0
    assert "raw: 6 of 6 (+" in capsys.readouterr().out
    assert main(["inspect", f"{out}3"]) == 0
    assert "image: raw 500x375 RGB, 562,516 bytes" in capsys.readouterr().out


def test_convert_folder_names_ignored_and_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/notes.txt").write_text("x")
    (tmp_path / "images/a/x.jpg").write_bytes(b"x")
    (tmp_path / "images/a/y.jpg").write_bytes(b"y")
    assert main(["convert", "folder", str(tmp_path / "images"), str(tmp_path / "out"), "--workers", "1"]) == 2
    printed = capsys.readouterr()
    assert "files that are no images by their names, left out (1): 1 .txt." in printed.out
    assert "of images that cannot be decoded, 1 of 1 in the split train" in printed.err and "a/x.jpg" in printed.err


def test_convert_list_takes_the_classes_of_the_other_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vitcomposer.data.conversion.sources import DigitsSource

    source = DigitsSource()
    for item in source.splits["train"][:20]:
        (tmp_path / item.name).parent.mkdir(exist_ok=True)
        (tmp_path / item.name).write_bytes(source.read(item))
    names = [item.name for item in source.splits["train"][:20]]
    (tmp_path / "train.csv").write_text("path,label\n" + "".join(f"{n},{'abc'[i % 3]}\n" for i, n in enumerate(names)))
    (tmp_path / "val.csv").write_text(f"{names[0]},c\n")
    (tmp_path / "test.csv").write_text(f"{names[0]},d\n")
    out = str(tmp_path / "out")
    for split in ("train", "val"):
        command = ["convert", "list", str(tmp_path / f"{split}.csv"), out, "--split", split, "--workers", "1"]
        assert main(command) == 0
    assert json.loads((tmp_path / "out/val/class_names.json").read_text()) == ["a", "b", "c"]
    capsys.readouterr()
    assert main(["convert", "list", str(tmp_path / "test.csv"), out, "--split", "test"]) == 2
    assert "test.csv:1: the label must be one of the 3 classes, got 'd'" in capsys.readouterr().err
    assert main(["inspect", out, "--verify"]) == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["folder", "nowhere"], "nowhere must be a folder"),
        (["folder", ".", "--val-fraction", "1.5"], "--val-fraction must be in [0, 1), got 1.5"),
        (["digits", "--shard-size", "big"], "--shard-size must be a size below 4gb such as 64mb, got 'big'"),
        (["list", "nowhere.csv", "--split", "train"], "nowhere.csv cannot be read"),
        (["digits", "--short-side", "0"], "--short-side must be 1 pixel or more, got 0"),
        (["digits", "--raw-fraction", "2"], "--raw-fraction must be in [0, 1], got 2.0"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(
    command: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = 1 if command[0] == "digits" else 2
    assert main(["convert", *command[:names], str(tmp_path / "out"), *command[names:]]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_traceback_is_shown_on_request(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder"):
        main(["--traceback", "convert", "folder", str(tmp_path / "nowhere"), str(tmp_path / "out")])


def test_traceback_is_shown_after_the_command_too(tmp_path: Path) -> None:
    command = ["convert", "folder", str(tmp_path / "nowhere"), str(tmp_path / "out")]
    for at in range(len(command) + 1):
        with pytest.raises(ValueError, match="must be a folder"):
            main([*command[:at], "--traceback", *command[at:]])


KEY, OTHER = "max_duration=100ep", "optimizer.lr=1e-3"


@pytest.mark.parametrize(
    ("module", "argv", "expected"),
    [
        ("plan.plan", ["plan", "Y", KEY, OTHER, "--gpu", "h100"], {"yaml": "Y", "gpu": "h100"}),
        ("plan.plan", ["plan", "Y", "--gpu", "h100", KEY, OTHER], {"yaml": "Y", "gpu": "h100"}),
        ("plan.plan", ["plan", KEY, "Y", "--gpu", "h100", OTHER], {"yaml": "Y", "gpu": "h100"}),
        ("plan.plan", ["plan", "--gpu", "h100", KEY, "Y", "--gpus", "8", OTHER], {"yaml": "Y", "gpus": 8}),
        ("plan.bench", ["bench", "Y", "--seconds", "1", KEY, OTHER], {"yaml": "Y", "seconds": 1.0}),
        (
            "clusters.cache_teacher",
            ["cache-teacher", "Y", KEY, "--crop-sets", "2", OTHER],
            {"yaml": "Y", "crop_sets": 2},
        ),
        ("use.evaluate", ["eval", "R", "--data", "a", "b", KEY, OTHER], {"source": "R", "data": ["a", "b"]}),
        ("use.evaluate", ["eval", "R", "--data", "a", "--bf16", KEY, OTHER], {"source": "R", "bf16": True}),
        ("use.export", ["export", "R", "--out", "o", "--format", "onnx", KEY, OTHER], {"format": ["onnx"]}),
        ("use.export", ["export", "R", "--force", KEY, "--out", "o", OTHER], {"force": True, "source": "R"}),
        ("use.predict", ["predict", "R", "a.jpg", KEY, "b.jpg", OTHER, "--top-k", "3"], {"inputs": ["a.jpg", "b.jpg"]}),
        ("use.predict", ["predict", "R", "--bf16", KEY, "a.jpg", OTHER], {"inputs": ["a.jpg"], "bf16": True}),
        (
            "look.attention",
            ["attention", "R", "a.jpg", "--out", "o", "--layers", "1", "2", KEY, OTHER],
            {"layers": [1, 2]},
        ),
        ("use.soup", ["soup", "a", "b", KEY, "--out", "o", OTHER], {"checkpoints": ["a", "b"]}),
        (
            "clusters.launch",
            ["launch", "slurm", "Y", "--gpus-per-node", "8", KEY, "--env", "A=b", OTHER],
            {"env": ["A=b"], "yaml": "Y"},
        ),
    ],
)
def test_keys_stand_anywhere_on_every_command(
    module: str, argv: list[str], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(f"vitcomposer.commands.{module}._run", lambda args: seen.append(args) or 0)
    assert main(argv) == 0
    assert seen[0].overrides == [KEY, OTHER]
    assert {name: getattr(seen[0], name) for name in expected} == expected


def test_file_with_an_equals_sign_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.jpg").touch()
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr("vitcomposer.commands.use.predict._run", lambda args: seen.append(args) or 0)
    assert main(["predict", "R", "a=b.jpg", "dir/c=d.jpg", KEY]) == 0
    assert seen[0].inputs == ["a=b.jpg", "dir/c=d.jpg"] and seen[0].overrides == [KEY]


def test_unknown_option_is_refused_beside_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "Y", KEY, "--gpu", "h100", "--nope", OTHER])
    assert ended.value.code == 2
    assert "unrecognized arguments: --nope" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "forwarded"),
    [
        (["max_duration=100ep"], ["max_duration=100ep"]),
        (["optimizer.lr=1e-3", "NGPU=8", "data.local=/x"], ["optimizer.lr=1e-3", "data.local=/x"]),
        (["augment.crop_scale=[0.5, 1.0]"], ["augment.crop_scale=[0.5, 1.0]"]),
        (["algorithms={}", "run.name=it's $5"], ["algorithms={}", "run.name=it's $5"]),
        (["ARGS=seed=1 max_duration=2ep", "seed=2"], ["seed=1", "max_duration=2ep", "seed=2"]),
    ],
)
def test_keys_reach_the_yaml_through_make(given: list[str], forwarded: list[str], tmp_path: Path) -> None:
    ours = tmp_path / "vitcomposer"
    ours.write_text("#!/bin/sh\nshift 4\nprintf '%s\\n' \"$@\"\n")
    ours.chmod(0o755)
    (tmp_path / "installed").touch()
    command = ["make", "-s", "deit_s", f"VENV={tmp_path}", f"BIN={tmp_path}", "-o", "setup", *given]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "ARGS"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60, env=env)
    assert sorted(ran.stdout.splitlines()) == sorted(forwarded), ran.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_has_what_it_wants_is_no_error(unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    command = [sys.executable, "-m", "vitcomposer", "list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(timeout=60), said) == (0, "")


def test_module_runs_as_a_program(digits: Path) -> None:
    command = [sys.executable, "-m", "vitcomposer", "inspect", str(digits)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0 and "1,438" in result.stdout


def test_inspect_shows_every_split(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(digits), "--verify"]) == 0
    printed = capsys.readouterr().out
    for text in ("train", "val", "1,438", "359", "xxh64", "image: bytes, label: int", "10: 0, 1, 2, 3, 4, ..."):
        assert text in printed
    assert "median 145" in printed and "PNG 8x8 L" in printed and "right hash" in printed
    assert main(["inspect", str(digits), "--split", "val"]) == 0
    assert "1,438" not in capsys.readouterr().out
    assert main(["inspect", str(digits / "val")]) == 0
    assert "359" in capsys.readouterr().out


def test_inspect_names_a_truncated_and_a_missing_shard(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = copy / "train/shard.00001.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    (copy / "val/shard.00000.mds").unlink()
    assert main(["inspect", str(copy)]) == 1
    printed = capsys.readouterr().err
    assert f"bad: train/shard.00001.mds must have {len(whole)} bytes, it has {len(whole) - 10}" in printed
    assert "bad: val/shard.00000.mds is missing" in printed


def test_inspect_finds_a_flipped_bit_only_with_verify(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = copy / "train/shard.00002.mds"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main(["inspect", str(copy)]) == 0
    assert main(["inspect", str(copy), "--verify"]) == 1
    assert "bad: train/shard.00002.mds has another xxh64" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../other/shard.mds", "/etc/passwd", "a\\..\\b.mds", "C:x.mds"])
def test_inspect_refuses_shards_outside_the_split(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change_first_shard(copy, raw_data={"basename": name, "bytes": 1 << 20, "hashes": {}})
    assert main(["inspect", str(copy)]) == 2
    assert "shard names must stay in the split's folder" in capsys.readouterr().err


def test_inspect_refuses_pickles_and_broken_indexes(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_first_shard(copy, column_encodings=["pkl", "int"])
    assert main(["inspect", str(copy)]) == 2
    assert "column 'image' is stored as pkl" in capsys.readouterr().err
    for text in ("{", "[]", '{"shards": [{}]}', '{"shards": 3}'):
        (copy / "train/index.json").write_text(text)
        assert main(["inspect", str(copy)]) == 2
        assert "must be an MDS index" in capsys.readouterr().err


def test_inspect_of_a_folder_without_data_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "There must be an index.json" in capsys.readouterr().err


def test_inspect_reads_what_streaming_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from streaming import MDSWriter

    columns = {"x": "pil", "y": "int", "caption": "str"}
    from PIL import Image

    for name, options in (("plain", {}), ("zipped", {"compression": "zstd:3", "hashes": ["sha1", "xxh64"]})):
        with MDSWriter(columns=columns, out=str(tmp_path / "theirs" / name), **options) as writer:
            writer.write({"x": Image.new("RGB", (6, 4)), "y": 3, "caption": "six by four"})
    assert main(["inspect", str(tmp_path / "theirs")]) == 0
    printed = capsys.readouterr().out
    assert "caption: str, x: pil, y: int" in printed and "no encoded image" in printed
    assert "shards are compressed (zstd:3)" in printed and "sha1, xxh64" in printed
    assert main(["inspect", str(tmp_path / "theirs" / "zipped"), "--verify"]) == 0
