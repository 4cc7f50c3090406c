"""``vitcomposer train``: where the run takes place, what is said first, and the precision that ``auto`` stands for."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from vitcomposer import cli, config, train
from vitcomposer.commands.start import launcher
from vitcomposer.commands.start import train as command
from vitcomposer.errors import ConfigError
from vitcomposer.runs import devices, typed
from vitcomposer.runs.opening import opening, say_opening

SYNTHETIC = ["data.source=synthetic", "data.local=null", "data.synthetic_samples=2048"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(command, "visible_gpus", lambda: 0)


class Replaced(Exception):
    """The process has become another program."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Command and environment of the program that this process becomes."""
    found = []

    def execve(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert program == sys.executable
        found.append((arguments[1:], environment))
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    return found


def test_one_process_trains_in_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(train, "main", lambda argv, report_errors: seen.append((argv, report_errors)) or 0)
    assert cli.main(["train", "deit_s", "seed=1", "--traceback"]) == 0
    monkeypatch.setattr(command, "visible_gpus", lambda: 1)
    assert cli.main(["train", "max_duration=1ep", "deit_s", "-n", "1"]) == 0
    monkeypatch.setattr(command, "visible_gpus", lambda: 8)
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["train", "deit_s"]) == 0, "a launcher has started it for one of them"
    assert seen == [(["deit_s", "seed=1"], False), (["deit_s", "max_duration=1ep"], True), (["deit_s"], True)]


@pytest.mark.parametrize(("flag", "output"), [("-q", "quiet"), ("--quiet", "quiet"), ("--json", "json")])
def test_what_is_printed_is_a_key_of_the_yaml(flag: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(train, "main", lambda argv, report_errors: seen.extend(argv) or 0)
    assert cli.main(["train", "deit_s", flag, "seed=1"]) == 0
    assert seen == ["deit_s", "seed=1", f"run.output={output}"]


@pytest.mark.parametrize(("output", "words"), [("quiet", 0), ("json", 1), ("text", 2)])
def test_start_is_told_in_that_form(output: str, words: int, capfd: pytest.CaptureFixture[str]) -> None:
    say_opening(config.load("deit_s", [*SYNTHETIC, f"run.output={output}"]))
    out, err = capfd.readouterr()
    assert len((out + err).splitlines()) == words
    if output == "json":
        assert json.loads(out) == {
            "event": "start",
            "run": "runs/deit_s",
            "model": "deit_small_patch16",
            "images": 2048,
            "global_train_batch_size": 1024,
            "max_duration": "300ep",
        }


@pytest.mark.parametrize(("gpus", "words", "processes"), [(8, [], 8), (8, ["--gpus", "4"], 4), (0, ["-n", "2"], 2)])
def test_several_processes_are_those_of_composers_launcher(
    gpus: int,
    words: list[str],
    processes: int,
    launched: list[tuple[list[str], dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(sys, "argv", ["vitcomposer", "train", "deit_s", *words, *SYNTHETIC])
    with pytest.raises(Replaced):
        cli.main(["train", "deit_s", *words, *SYNTHETIC])
    ((arguments, environment),) = launched
    ranks = ["-n", str(processes), "-m", "vitcomposer.train", "deit_s", *SYNTHETIC]
    assert arguments == ["-m", launcher.__name__, *ranks]
    assert capsys.readouterr().err == f"deit_s: starting {processes} processes ...\n"
    monkeypatch.setenv(typed.TYPED_COMMAND, environment[typed.TYPED_COMMAND])
    assert shlex.split(typed.typed_command()) == ["vitcomposer", "train", "deit_s", *words, *SYNTHETIC]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["deit_s", "optimzer.lr=1", *SYNTHETIC], "optimzer.lr is no key of this recipe. Did you mean optimizer.lr?"),
        (["deit_s", *SYNTHETIC, "-n", "3"], "global_train_batch_size must be divisible by the 3 ranks, got 1024"),
        (["deits", "-n", "2"], "There is no yaml at deits. Did you mean 'deit_s'?"),
        (["deit_s", "-n", "0"], "--gpus must be 1 or more, got 0"),
        (["deit_s", "-n", "16"], "--gpus must be at most 8, the GPUs that are visible, got 16"),
    ],
)
def test_mistake_is_told_before_anything_starts(
    words: list[str],
    message: str,
    launched: list[tuple[list[str], dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "visible_gpus", lambda: 8)
    assert cli.main(["train", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and launched == []


def test_gpus_are_counted_without_torch_unless_there_are_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(command, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert command.visible_gpus() == 0
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    assert command.visible_gpus() == 1
    (tmp_path / "nvidia1").touch()
    assert command.visible_gpus() == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert command.visible_gpus() == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert command.visible_gpus() == 0


def test_command_of_the_console_script_is_named_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(typed.TYPED_COMMAND, raising=False)
    monkeypatch.setattr(typed, "_is_found", lambda name, path: name == "vitcomposer")
    monkeypatch.setattr(sys, "orig_argv", ["/x/bin/python", "/x/bin/vitcomposer", "train", "demo", "run.name=a b"])
    assert typed.typed_command() == "vitcomposer train demo 'run.name=a b'"


@pytest.mark.parametrize(
    ("name", "overrides", "line"),
    [
        (
            "deit_s",
            [*SYNTHETIC, "run.name=a b"],
            "a b: deit_small_patch16, 1,000 classes, 2,048 images, 300 epochs, 1,024 a step",
        ),
        ("demo", ["max_duration=1ba", "schedule.t_warmup=0ba", "data.local=x"], "demo: vit_tiny_patch16, 10 classes, "),
        ("probe_knn", SYNTHETIC, "probe_knn: vit_small_patch16, 2,048 images"),
    ],
)
def test_first_line_says_what_is_trained(name: str, overrides: list[str], line: str) -> None:
    found = opening(config.load(name, overrides))
    assert found.startswith(line) and ("1ba" not in "".join(overrides) or found.endswith("1 step, 32 a step"))


@pytest.mark.parametrize(
    ("gpu", "has_bf16", "precision"), [(True, True, "amp_bf16"), (True, False, "fp32"), (False, True, "fp32")]
)
def test_auto_is_bfloat16_where_a_gpu_computes_with_it(
    gpu: bool, has_bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    cfg = config.load("deit_s")
    assert cfg.precision == "auto" and devices.with_precision(cfg).precision == precision
    assert devices.with_precision(config.load("deit_s", ["precision=amp_fp16"])).precision == "amp_fp16"


def test_auto_that_becomes_float32_is_checked_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = config.load("deit_s", ["algorithms.LowPrecisionLayerNorm={}"])
    with pytest.raises(ConfigError, match="^precision must be mixed with algorithms.LowPrecisionLayerNorm"):
        devices.with_precision(cfg)


def test_every_yaml_leaves_the_precision_to_the_device() -> None:
    from vitcomposer.shipped import YAMLS

    found = {page.stem: config.load(page).precision for page in YAMLS.glob("*.yaml")}
    assert len(found) > 30 and set(found.values()) == {"auto"}


SCRIPT = """
import os, signal, sys, time
rank, how = int(os.environ["RANK"]), sys.argv[1]
print("word of the first" if rank == 0 else "word of another")
if how == "another says it" and rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "another says it":
    print("[rank1]:[W1130 TCPStore.cpp:106] sendBytes failed", file=sys.stderr)
    print("frame #0: c10::Error", file=sys.stderr)
    sys.exit("error: rank 0 ended without a word")
if how == "none says it":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "ctrl-c":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130 if rank == 0 else 0))
    print("ready", rank, file=sys.stderr)
    time.sleep(60 if rank == 0 else 0)
    if rank == 1:
        time.sleep(1)
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
"""


@pytest.mark.parametrize(
    ("how", "status", "out", "err"),
    [
        pytest.param("good", 0, ["word of the first"], [], marks=pytest.mark.slow),
        (
            "another says it",
            247,
            ["word of the first"],
            ["rank 1 (exit code 1):", "word of another", "error: rank 0 ended without a word"],
        ),
        pytest.param(
            "none says it",
            247,
            ["word of the first"],
            [
                "error: A process was ended by SIGKILL, perhaps for want of memory (see dmesg). "
                "Start the same command again: it goes on from the last checkpoint."
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param("ctrl-c", 130, ["word of the first"], ["ready 0"], marks=pytest.mark.slow),
    ],
)
def test_launcher_says_only_what_its_processes_do_not(
    how: str, status: int, out: list[str], err: list[str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", launcher.__name__, "-n", "2", str(tmp_path / "script.py"), how]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert (done.stdout.splitlines(), done.stderr.splitlines()) == (out, err)
