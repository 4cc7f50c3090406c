"""``vitcomposer doctor``: what it finds on this machine and on others, in less than two seconds, without torch."""

import os
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from vitcomposer.cli import main
from vitcomposer.commands.start import doctor
from vitcomposer.data.mds import worker_room
from vitcomposer.runs import machine

GPU = machine.Gpu("NVIDIA H200", 143771 << 20, "580.65.06", 9.0)


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which all is well, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "gpus", lambda: [GPU, GPU])
    monkeypatch.setattr(machine, "cuda_of_torch", lambda: "12.6")
    monkeypatch.setattr(machine, "unmet_requirements", lambda distribution: [])
    monkeypatch.setattr(worker_room, "free_bytes", lambda: 10**10)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 18)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**11))
    return tmp_path


def test_a_machine_that_is_ready(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["good"] * 8
    assert "2 x NVIDIA H200, 140 GiB, driver 580.65.06, bf16 yes" in lines[1]
    assert lines[-1].startswith("Nothing to do. Next: vitcomposer ")


def failing_driver() -> list[machine.Gpu]:
    raise RuntimeError("NVIDIA-SMI has failed")


CHANGES = {
    "a driver that fails": (machine, "gpus", failing_driver, "the driver fails: NVIDIA-SMI has failed"),
    "torch for CPUs": (machine, "cuda_of_torch", lambda: None, "the torch that is installed is for CPUs"),
    "an old driver": (machine, "cuda_of_torch", lambda: "13.0", "do    GPU"),
    "a missing package": (machine, "unmet_requirements", lambda _: ["torch>=2.7 (2.6.0 is installed)"], "torch>=2.7"),
    "little shared memory": (worker_room, "free_bytes", lambda: 64 << 20, "16 loader workers need about 1,234 MB"),
    "few files": (resource, "getrlimit", lambda _: (256, 256), "ulimit -n 576"),
    "a full disk": (shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**9), "make room"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_to_be_done_is_said_and_counted(
    name: str, ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, attribute, value, said = CHANGES[name]
    monkeypatch.setattr(module, attribute, value)
    if name == "an old driver":
        monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("NVIDIA A100", 40 << 30, "550.54", 8.0)])
        said = "torch is for CUDA 13.0, which needs driver 580 or newer"
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert said in out and out.count("\ndo ") + out.startswith("do ") == 1
    assert "\n1 thing to do. Next: " in out


def test_a_hidden_gpu_and_half_a_file_of_weights(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (ready / "weights").mkdir()
    (ready / "weights/convit_tiny.pth").write_bytes(b"cut")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "CUDA_VISIBLE_DEVICES hides it" in out
    assert "rm weights/convit_tiny.pth; vitcomposer weights convit_tiny" in out
    assert "2 things to do" in out


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'NVIDIA GeForce RTX 2080, Ti, 11264, 550.54.14, 7.5'\necho 'A, [N/A], 1.2, [N/A]'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    first, second = machine.gpus()
    assert first == machine.Gpu("NVIDIA GeForce RTX 2080, Ti", 11264 << 20, "550.54.14", 7.5) and not first.has_bf16
    assert second == machine.Gpu("A", 0, "1.2", 0.0)
    assert machine.driver_of_gpus() == "550.54.14"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n")
    with pytest.raises(RuntimeError, match="Failed to initialize NVML"):
        machine.gpus()
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpus() == [] and machine.driver_of_gpus() is None


def test_requirements_and_extras_are_those_of_the_project() -> None:
    assert machine.unmet_requirements("vitcomposer") == []
    found = machine.extras("vitcomposer")
    assert {"onnx", "tensorboard", "wandb", "mlflow"} <= found.keys() and found["tensorboard"]


def test_the_cuda_of_torch_is_read_without_importing_it() -> None:
    import torch

    assert machine.cuda_of_torch() == torch.version.cuda


def test_on_this_machine_it_answers_without_torch(tmp_path: Path) -> None:
    """What takes seconds is not imported; the time itself depends on what else runs."""
    code = (
        "import argparse, sys; from vitcomposer.commands.start import doctor;"
        "status = doctor._run(argparse.Namespace(measure=False));"
        "heavy = {'torch', 'composer', 'numba', 'streaming', 'timm'} & sys.modules.keys();"
        "print('heavy:', sorted(heavy)); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    assert "heavy: []" in done.stdout and " to do. Next: " in done.stdout


@pytest.mark.slow
def test_measure_adds_decode_rate_and_step(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--measure"]) == 0
    out = capsys.readouterr().out
    assert "photos/s and core" in out and "DeiT-S, 4 images of 224 px" in out
