"""The script for sbatch: under stand-ins for srun and scontrol, and on a real SLURM."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, tiny_photo_overrides
from tests.launch.test_launch_files import called, rendered, stub_launcher, wait_for, write_executable
from vitcomposer import cli

BIN = Path(sys.executable).parent


@pytest.fixture
def slurm_stubs(tmp_path: Path) -> Path:
    """srun as two tasks on this machine, which ends with the highest status, and scontrol as far as the script asks."""
    stubs = stub_launcher(tmp_path)
    write_executable(
        stubs / "srun",
        "#!/bin/bash\n"
        "while [[ $1 == --* ]]; do echo srun $1; shift; done\n"
        'SLURM_PROCID=0 "$@" & first=$!\n'
        'SLURM_PROCID=1 "$@" & second=$!\n'
        "trap 'kill -USR1 $first $second' USR1\n"
        "highest=0\n"
        "for task in $first $second; do\n"
        "  while :; do wait $task; status=$?; kill -0 $task 2>/dev/null || break; done\n"
        "  wait $task; status=$?\n"
        "  [ $status -gt $highest ] && highest=$status\n"
        "done\n"
        "exit $highest\n",
    )
    write_executable(
        stubs / "scontrol",
        '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && printf "%s\\n" left right || echo "scontrol $*"\n',
    )
    return stubs


def slurm(stubs: Path, folder: Path, script: str, **environment: str) -> subprocess.Popen:
    (folder / "job.sh").write_text(script)
    assert subprocess.run(["bash", "-n", "job.sh"], cwd=folder).returncode == 0
    job = {"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "[left,right]"}
    return subprocess.Popen(
        ["bash", "job.sh"], cwd=folder, env={**os.environ, **job, **environment}, stdout=subprocess.PIPE, text=True
    )


TWO = ["--nodes", "2", "--gpus-per-node", "4"]


def test_slurm_script_starts_a_launcher_on_every_node(
    slurm_stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = rendered(capsys, "slurm", "--env", "WORD=it's $HOME", "--cpus", "8", "--setup", "cd .", size=TWO)
    job = slurm(slurm_stubs, tmp_path, script, SECONDS_OF_RUN="0")
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and "requeue" not in output
    assert "srun --cpus-per-task=8\n" in output and "srun --kill-on-bad-exit=0\n" in output
    for node in (0, 1):
        assert wait_for(tmp_path / f"node{node}") == [called(node, 4, 8, "left", "20345"), "it's $HOME"]


def test_slurm_job_is_queued_again_after_a_signal(
    slurm_stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = slurm(slurm_stubs, tmp_path, rendered(capsys, "slurm", size=TWO))
    for node in (0, 1):
        wait_for(tmp_path / f"node{node}")
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGUSR1)  # srun, as SLURM does at --signal
    output, _ = job.communicate(timeout=30)
    assert job.returncode == 143 and "scontrol requeue 12345\n" in output


@pytest.mark.parametrize("status", [1, 2, 130])
def test_slurm_job_is_not_queued_again_after_an_error_or_ctrl_c(
    status: int, slurm_stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = slurm(slurm_stubs, tmp_path, rendered(capsys, "slurm", size=TWO), LEAVES=str(status))
    output, _ = job.communicate(timeout=30)
    assert job.returncode == status and "requeue" not in output


def test_slurm_script_asks_for_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    wishes = ["--time", "1-12:00:00", "--partition", "gpu", "--account", "vision", "--memory", "512", "--grace", "300"]
    script = rendered(capsys, "slurm", *wishes)
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.M))
    assert directives == {
        "job-name": "Deit_b.1",
        "nodes": "4",
        "ntasks-per-node": "1",
        "gres": "gpu:8",
        "mem": "512G",
        "partition": "gpu",
        "account": "vision",
        "time": "1-12:00:00",
        "output": "%x-%j.out",
        "open-mode": "append",
        "signal": "USR1@300",
        "requeue": "",
    }
    # sbatch reads directives up to the first command.
    assert script.rindex("#SBATCH") < script.index("MASTER_ADDR=")


CLUSTER = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
MpiDefault=none
GresTypes=gpu
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName=127.0.0.[1-2] NodeAddr=127.0.0.[1-2] NodeHostname={host} Port=[{first}-{second}] CPUs=2 Gres=gpu:1
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """SLURM with two nodes, 127.0.0.1 and 127.0.0.2, as processes of this test; a GPU is /dev/null."""
    if os.getuid() != 0 or not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch")):
        pytest.skip("needs root and: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge")
    # Sockets have short paths only.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    for name in ("munge", "state"):
        (folder / name).mkdir(mode=0o755)
    folder.chmod(0o755)
    port = 17000 + os.getpid() % 900
    host = socket.gethostname().split(".")[0]
    config = folder / "slurm.conf"
    config.write_text(CLUSTER.format(host=host, folder=folder, port=port, first=port + 1000, second=port + 1001))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    munge = {name: folder / "munge" / name for name in ("socket", "pid-file", "log-file", "seed-file")}
    daemons = [["munged", "-F", "--force", f"--key-file={key}", *(f"--{name}={path}" for name, path in munge.items())]]
    daemons += [["slurmctld", "-D", "-f", str(config)]]
    daemons += [["slurmd", "-D", "-f", str(config), "-N", node] for node in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setenv("SLURM_CONF", str(config))
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    running = []
    with (folder / "output").open("w") as output:
        for daemon in daemons:
            running.append(subprocess.Popen(daemon, stdout=output, stderr=output))
            time.sleep(1)
    try:
        until(lambda: said("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", 30)
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root"], timeout=30)
        until(lambda: not said("squeue", "-h").strip(), 60)
        for process in reversed(running):
            process.terminate()
            process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout


def until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_slurm_queues_a_stopped_run_again_and_it_goes_on(cluster: Path, photo_mds: Path, tmp_path: Path) -> None:
    steps = 400
    overrides = [*tiny_photo_overrides(photo_mds, tmp_path, "queued"), f"max_duration={steps}ba"]
    overrides += ["run.save_interval=1000ba", "run.eval_interval=1000ba"]
    script, output = tmp_path / "job.sbatch", tmp_path / "output"
    command = ["launch", "slurm", str(ROOT / "yamls/deit_ti.yaml"), *overrides, "--nodes", "2", "--gpus-per-node", "1"]
    assert cli.main([*command, "--env", "OMP_NUM_THREADS=1", "--grace", "60", "--out", str(script)]) == 0
    submit = ["sbatch", "--parsable", f"--output={output}", f"--chdir={ROOT}", str(script)]
    job = said(*submit).strip()
    metrics = tmp_path / "queued" / "metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 10, 300)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    until(lambda: "Restarts=1" in said("scontrol", "show", "job", job), 60)
    stopped = len(metrics.read_text().splitlines())
    assert 10 < stopped < steps and f"Stopped by SIGUSR1 after step {stopped}." in output.read_text()
    until(lambda: not said("squeue", "-h", "--states=PENDING,RUNNING,COMPLETING").strip(), 400)
    assert "JobState=COMPLETED" in said("scontrol", "show", "job", job), output.read_text()[-3000:]
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, steps + 1))
    assert f"step {stopped + 1}/{steps}" in output.read_text(), "the second start begins where the first ended"
    summary = json.loads((tmp_path / "queued" / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == steps and summary["world_size"] == 2
