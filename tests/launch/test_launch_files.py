"""The launch files: valid for their engines, started here as far as one machine can, and what a user gets wrong."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import validate

from tests.conftest import ROOT
from vitcomposer import cli

BIN = Path(sys.executable).parent
DEIT = str(ROOT / "yamls/deit_b.yaml")
RUN = ["data.remote=s3://bucket/imagenet", "data.local=/cache", "run.folder=/runs", "run.name=Deit_b.1"]
PODS = ["--image", "registry.example/vit:1", "--secret", "s3", "--volume", "runs:/runs"]
SIZE = ("--nodes", "4", "--gpus-per-node", "8")
REQUIRED = {"kubernetes": PODS, "jobset": PODS, "pytorchjob": PODS}
REQUIRED |= {"composer": ["--master-addr", "node0"], "torchrun": ["--master-addr", "node0"], "slurm": []}
REQUIRED |= {"skypilot": ["--accelerator", "H100", "--secret", "AWS_SECRET_ACCESS_KEY", "--volume", "runs:/runs"]}
AWKWARD = "run.loggers=[tensorboard]", "model.name='deit_base_patch16'", 'init.weights=a $(touch oh) `b` "c" $$ d'


def rendered(
    capsys: pytest.CaptureFixture[str],
    engine: str,
    *options: str,
    overrides: Iterable[str] = (),
    size: Sequence[str] = SIZE,
) -> str:
    assert cli.main(["launch", engine, DEIT, *RUN, *overrides, *size, *REQUIRED[engine], *options]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], engine: str, *more: str) -> str:
    """The one line that says what is wrong."""
    assert cli.main(["launch", engine, DEIT, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def documents(text: str) -> dict[str, Any]:
    return {page["kind"]: page for page in yaml.safe_load_all(text)}


def as_kubernetes_hands_it_over(text: str, variables: dict[str, str]) -> str:
    """Its documented expansion of command and env: $(NAME) where NAME is known, $$ is $."""
    return re.sub(r"\$(\$|\(([^)]*)\))", lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]), text)


# Shell commands


def test_composer_reads_the_place_of_a_node(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from composer.cli import launcher

    node = 3
    lines = rendered(capsys, "composer", overrides=AWKWARD).splitlines()
    assert lines[2 * node] == f"# on node {node}"
    words = shlex.split(lines[2 * node + 1])
    monkeypatch.setattr(sys, "argv", words)
    args = launcher._parse_args()
    assert (args.nproc, args.world_size, args.node_rank, args.base_rank) == (8, 32, node, 8 * node)
    assert (args.master_addr, args.master_port, args.training_script) == ("node0", 29500, "vitcomposer.train")
    assert args.module_mode and args.training_script_args == [DEIT, *RUN, *AWKWARD]


def test_one_node_needs_no_address(capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--gpus-per-node", "8"]
    for engine, start in (("composer", "composer -n 8"), ("torchrun", "torchrun --standalone --nproc-per-node 8")):
        assert rendered(capsys, engine, size=one) == f"{start} {shlex.join(['-m', 'vitcomposer.train', DEIT, *RUN])}\n"


def test_torchrun_reads_the_place_of_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    from torch.distributed.elastic.utils import macros
    from torch.distributed.run import parse_args

    words = shlex.split(rendered(capsys, "torchrun", overrides=AWKWARD).splitlines()[7])
    args = parse_args(words[1:])
    assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "4", 3)
    assert (args.master_addr, args.master_port, args.training_script) == ("node0", 29500, "vitcomposer.train")
    assert args.module
    # What it does to arguments when it starts a rank.
    seen = macros.substitute(args.training_script_args, local_rank="5")
    assert seen == [DEIT, *RUN, *AWKWARD]


@pytest.mark.slow
def test_torchrun_starts_two_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vitcomposer").mkdir()
    (tmp_path / "vitcomposer/__init__.py").touch()
    (tmp_path / "vitcomposer/train.py").write_text(
        "import json, os, sys\n"
        "place = [os.environ[name] for name in ('GROUP_RANK', 'WORLD_SIZE', 'MASTER_ADDR')]\n"
        "open(os.environ['RANK'], 'w').write(json.dumps([place, sys.argv[1:]]))\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["launch", "torchrun", DEIT, *RUN, *AWKWARD, "--nodes", "2", "--gpus-per-node", "1"]
    assert cli.main([*command, "--master-addr", "127.0.0.1", "--port", port]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen(["bash", "-c", line], cwd=tmp_path, env=environment) for line in lines]
    try:
        assert [node.wait(timeout=100) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == [[rank, "2", "127.0.0.1"], [DEIT, *RUN, *AWKWARD]]


# What runs on a node


COMPOSER = """\
#!{python}
import json, os, signal, sys, time
if os.environ.get("LEAVES"):
    sys.exit(int(os.environ["LEAVES"]))
def stop(*_):
    sys.exit(143)
place = {{sys.argv[i]: sys.argv[i + 1] for i in range(1, 13, 2) if sys.argv[i].startswith("-")}}
rank = place["--node_rank"]
time.sleep(float(os.environ.get("DEAF", 0)))
signal.signal(signal.SIGUSR1, stop)
with open("node" + rank + ".new", "w") as file:
    json.dump([sys.argv[1:], os.environ.get("WORD")], file)
os.rename("node" + rank + ".new", "node" + rank)
time.sleep(float(os.environ.get("SECONDS_OF_RUN", 30)))
"""


def write_executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def stub_launcher(folder: Path) -> Path:
    """A folder to put before the path, with a ``composer`` that writes down how it was called."""
    binaries = folder / "bin"
    binaries.mkdir()
    write_executable(binaries / "composer", COMPOSER.format(python=sys.executable))
    return binaries


def called(node: int, gpus: int, world_size: int, master: str, port: str) -> list[str]:
    place = ["-n", gpus, "--world_size", world_size, "--node_rank", node, "--base_rank", node * gpus]
    arguments = ["--master_addr", master, "--master_port", port, "-m", "vitcomposer.train", DEIT, *RUN]
    return [str(word) for word in place + arguments]


def wait_for(path: Path, seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.05)
    return json.loads(path.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_stops_a_node_with_143(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script of a pod; the one of SLURM and SkyPilot differs in names only."""
    job = documents(rendered(capsys, "kubernetes", overrides=AWKWARD))["Job"]
    shell, option, script = job["spec"]["template"]["spec"]["containers"][0]["command"]
    script = as_kubernetes_hands_it_over(script, {"JOB_COMPLETION_INDEX": "2", "touch oh": "changed"})
    environment = {**os.environ, "PATH": f"{stub_launcher(tmp_path)}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "2"}
    node = subprocess.Popen([shell, option, script], cwd=tmp_path, env=environment)
    try:
        words, _ = wait_for(tmp_path / "node2")
        assert words == [*called(2, 8, 32, "deit-b-1-0.deit-b-1", "29500"), *AWKWARD]
        node.send_signal(number)
        assert node.wait(timeout=10) == 143
    finally:
        node.kill()
    assert not (tmp_path / "oh").exists()


def test_signal_is_repeated_until_the_ranks_listen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = yaml.safe_load(rendered(capsys, "skypilot"))["run"]
    sky = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "DEAF": "2"}
    environment = {**os.environ, "PATH": f"{stub_launcher(tmp_path)}:{os.environ['PATH']}", **sky}
    node = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment)
    try:
        time.sleep(0.5)
        node.send_signal(signal.SIGTERM)
        assert node.wait(timeout=15) == 143
    finally:
        node.kill()
    assert wait_for(tmp_path / "node1")[0] == called(1, 8, 32, "10.0.0.1", "29500")


# Kubernetes


def test_kubernetes_objects_are_what_its_api_takes(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--namespace", "vision", "--cpus", "96", "--memory", "512", "--env", "A=1"]
    pages = documents(rendered(capsys, "kubernetes", *more))
    for page, version in ((pages["Service"], "1.31"), (pages["Job"], "1.31"), (pages["Job"], "1.37")):
        validate(page, version, strict=True)
    # The parts of what operators define that Kubernetes defines.
    (job_set,) = documents(rendered(capsys, "jobset", *more)).values()
    (part,) = job_set["spec"]["replicatedJobs"]
    head = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": part["name"]}}
    validate({**head, **part["template"]}, "1.31", strict=True)
    (pytorch_job,) = documents(rendered(capsys, "pytorchjob", *more)).values()
    master = pytorch_job["spec"]["pytorchReplicaSpecs"]["Master"]
    head = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "master"}}
    validate({**head, **master["template"]}, "1.31", strict=True)


def test_kubernetes_job_restarts_what_was_stopped_and_ends_on_a_wrong_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pages = documents(rendered(capsys, "kubernetes", "--namespace", "vision", "--grace", "300"))
    service, job = pages["Service"], pages["Job"]["spec"]
    assert {page["metadata"]["namespace"] for page in pages.values()} == {"vision"}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": pages["Job"]["metadata"]["name"]}
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == 4
    actions = [
        (rule["action"], rule["onExitCodes"]["values"] if "onExitCodes" in rule else rule["onPodConditions"][0]["type"])
        for rule in job["podFailurePolicy"]["rules"]
    ]
    assert actions == [("FailJob", [2]), ("Ignore", [130, 143]), ("Ignore", "DisruptionTarget")]
    assert job["backoffLimitPerIndex"] == 3 and job["maxFailedIndexes"] == 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "what a podFailurePolicy asks for"
    assert pod["subdomain"] == service["metadata"]["name"] and pod["terminationGracePeriodSeconds"] == 300
    (container,) = pod["containers"]
    names = {rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert names == {container["name"]}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
    places = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: places[mount["name"]] for mount in container["volumeMounts"]}
    assert mounted["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert mounted["/runs"]["persistentVolumeClaim"] == {"claimName": "runs"}


def test_environment_reaches_the_pod_as_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    job = documents(rendered(capsys, "kubernetes", "--env", "WORD=a $(HOME) $$ b"))["Job"]
    (variable,) = job["spec"]["template"]["spec"]["containers"][0]["env"]
    assert as_kubernetes_hands_it_over(variable["value"], {"HOME": "/root"}) == "a $(HOME) $$ b"


def test_jobset_has_the_fields_of_v1alpha2(capsys: pytest.CaptureFixture[str]) -> None:
    (page,) = documents(rendered(capsys, "jobset", "--retries", "5")).values()
    assert page["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and page["kind"] == "JobSet"
    spec = page["spec"]
    assert set(spec) == {"network", "failurePolicy", "replicatedJobs"}
    assert spec["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": "deit-b-1"}
    (rule,) = spec["failurePolicy"]["rules"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (part,) = spec["replicatedJobs"]
    assert set(part) == {"name", "replicas", "template"} and part["replicas"] == 1
    job = part["template"]["spec"]
    assert job["backoffLimit"] == 0 and job["completions"] == 4 and job["completionMode"] == "Indexed"
    assert "--master_addr deit-b-1-nodes-0-0.deit-b-1 " in job["template"]["spec"]["containers"][0]["command"][2]


@pytest.mark.parametrize("nodes", [1, 4])
def test_pytorchjob_has_the_fields_of_v1(nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(capsys, "pytorchjob", size=["--nodes", str(nodes), "--gpus-per-node", "8"])
    (page,) = documents(text).values()
    assert page["apiVersion"] == "kubeflow.org/v1" and page["kind"] == "PyTorchJob"
    assert set(page["spec"]) == {"runPolicy", "pytorchReplicaSpecs"}
    replicas = page["spec"]["pytorchReplicaSpecs"]
    counts = {kind: replica["replicas"] for kind, replica in replicas.items()}
    assert counts == ({"Master": 1} if nodes == 1 else {"Master": 1, "Worker": nodes - 1})
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"} and replica["restartPolicy"] == "ExitCode"
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator takes no other name"
        assert '--node_rank "$RANK"' in container["command"][2]


def test_skypilot_task_has_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    task = yaml.safe_load(rendered(capsys, "skypilot", "--cpus", "96", "--image", "vit:1", "--setup", "pip install ."))
    run = task.pop("run")
    assert task == {
        "name": "deit-b-1",
        "num_nodes": 4,
        "resources": {
            "accelerators": "H100:8",
            "use_spot": True,
            "cpus": "96+",
            "image_id": "docker:vit:1",
            "job_recovery": {"max_restarts_on_errors": 3, "recover_on_exit_codes": [130, 143]},
        },
        "workdir": ".",
        "volumes": {"/runs": "runs"},
        "secrets": {"AWS_SECRET_ACCESS_KEY": None},
        "setup": "pip install .",
    }
    assert subprocess.run(["bash", "-n"], input=run, text=True).returncode == 0


# What a user gets wrong


@pytest.mark.parametrize(
    ("engine", "given", "named"),
    [
        ("slurm", ["--gpus-per-node", "7"], "global_train_batch_size must be divisible by the 7 ranks"),
        ("slurm", ["model.image_size=30", *SIZE], "model.image_size must be divisible by model.patch_size=16, got 30"),
        ("slurm", ["model.name=deit_smal_patch16", *SIZE], "Did you mean 'deit_small_patch16'"),
        ("slurm", ["evaluation.global_batch_size=12", *SIZE], "evaluation.global_batch_size must be divisible by"),
        ("slurm", ["--gpus-per-node", "0"], "--gpus-per-node must be 1 or more, got 0"),
        ("slurm", [*SIZE, "--time", "tomorrow"], "--time must be minutes"),
        ("slurm", [*SIZE, "--partition", "a\n#SBATCH --uid=0"], "--partition must be"),
        ("slurm", ["run.name=my run", *SIZE], "run.name must be"),
        ("slurm", ["init.weights=a\nb", *SIZE], "without line breaks"),
        ("slurm", [*SIZE, "--env", "HF_TOKEN=abc"], "--env must be free of credentials, got 'HF_TOKEN'"),
        ("slurm", [*SIZE, "--env", "WANDB_KEY=abc"], "--env must be free of credentials, got 'WANDB_KEY'"),
        ("slurm", [*SIZE, "--env", "DB=postgres://u:abc@h"], "--env must be free of credentials, got 'DB'"),
        ("slurm", [*SIZE, "--env", "SLURM_JWT=abc"], "--env must be free of credentials, got 'SLURM_JWT'"),
        ("slurm", [*SIZE, "--setup", "export TOKEN=abc"], "--setup must be without credentials"),
        ("slurm", [*SIZE, "--env", "1"], "--env must be NAME=VALUE"),
        ("slurm", ["data.remote=sftp://me:secret@host/data", *SIZE], "data.remote must be without credentials"),
        ("composer", [*SIZE], "--master-addr must be set for 4 nodes"),
        ("torchrun", [*SIZE, "--master-addr", "n0", "--port", "80"], "--port must be from 1024"),
        ("kubernetes", [*SIZE, "--image", "a"], "run.folder must be on a --volume"),
        ("kubernetes", ["run.folder=/run", *SIZE, *PODS], "run.folder must be on a --volume"),
        ("kubernetes", ["run.name=1", *SIZE, *PODS], "run.name must be at most 40"),
        ("jobset", ["run.folder=/runs", *SIZE, *PODS, "--volume", "Runs:/b"], "--volume must be NAME:/PATH"),
        ("jobset", ["run.folder=/runs", *SIZE, *PODS, "--volume", "b:/runs"], "--volume must be one for each path"),
        ("pytorchjob", [*SIZE, *PODS, "--namespace", "A"], "--namespace must be small letters"),
        ("pytorchjob", [*SIZE, *PODS, "--secret", "KEY=1"], "--secret must be the name of a Secret"),
        ("skypilot", [*SIZE, "--accelerator", "H100"], "run.folder must be on a --volume"),
        ("skypilot", [*SIZE, "--accelerator", "H100:8"], "--accelerator must be"),
        ("slurm", ["model.nam=deit_base_patch16", *SIZE], "model.nam"),
    ],
)
def test_error_names_the_option(engine: str, given: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, engine, "data.local=/data", *given)
    assert named in error and "secret@" not in error and "abc" not in error


@pytest.mark.parametrize("more", [["--partition", "gpu"], ["--secret", "s3"]])
def test_option_of_another_engine_is_named(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["launch", "composer", DEIT, *SIZE, *more])
    assert left.value.code == 2 and " ".join(more) in capsys.readouterr().err


def test_file_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "job.sbatch"
    text = rendered(capsys, "slurm")
    assert rendered(capsys, "slurm", "--out", str(out)) == f"wrote {out}: sbatch {out}\n"
    assert out.read_text() == text
    out.write_text("mine")
    assert "--out must be a file that does not exist yet" in refused(capsys, "slurm", *RUN, *SIZE, "--out", str(out))
    assert out.read_text() == "mine"
    rendered(capsys, "slurm", "--out", str(out), "--force")
    assert out.read_text() == text
    missing = str(tmp_path / "no" / "job")
    assert "--out must be in a folder that exists" in refused(capsys, "slurm", *RUN, *SIZE, "--out", missing)
