"""Writes what starts one run on several machines: a command for each node, a SLURM script, a SkyPilot task."""

import shlex
from dataclasses import dataclass

PORT = 29500  # of the first node, where the ranks meet
# Statuses of a training process: nothing will mend it; it goes on when started again, after a signal or after Ctrl-C.
CONFIGURATION_ERROR, STOPPED, INTERRUPTED = 2, 143, 130
_TRAIN = ("-m", "vitcomposer.train")  # in a checkout, and where a wheel is installed, which has no train.py


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One run and the machines that it asks for, as checked by ``vitcomposer launch``.

    Attributes:
        arguments: Of ``vitcomposer.train``: the yaml and its overrides.
        environment: Variables that every rank gets; no credentials.
        memory: GiB of a node; null: what the engine gives.
        grace: Seconds from a signal to the end of a node, in which the ranks save a checkpoint.
        retries: How often a run that failed by itself is started again; being stopped doesn't count.
    """

    name: str
    arguments: tuple[str, ...]
    nodes: int
    gpus: int  # of a node, and its ranks
    environment: tuple[tuple[str, str], ...] = ()
    cpus: int | None = None
    memory: int | None = None
    grace: int = 120
    retries: int = 3

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.gpus


def composer_command(launch: Launch, *, rank: str, base_rank: str, master: str, port: str) -> str:
    """``composer`` on one node; the places are words of a shell, quoted already."""
    place = f"--world_size {launch.ranks} --node_rank {rank} --base_rank {base_rank}"
    return f"composer -n {launch.gpus} {place} --master_addr {master} --master_port {port} {_train(launch)}"


def composer_lines(launch: Launch, master: str | None, port: int) -> str:
    """A line for every node."""
    if master is None:
        return f"composer -n {launch.gpus} {_train(launch)}\n"
    place = {"master": shlex.quote(master), "port": str(port)}
    commands = [
        composer_command(launch, rank=str(node), base_rank=str(node * launch.gpus), **place)
        for node in range(launch.nodes)
    ]
    return _lines(commands)


def torchrun_lines(launch: Launch, master: str | None, port: int) -> str:
    """A line for every node."""
    # It reads ${local_rank} and the like in the arguments, and $$ as $.
    train = shlex.join([*_TRAIN, *(text.replace("$", "$$") for text in launch.arguments)])
    if master is None:
        return f"torchrun --standalone --nproc-per-node {launch.gpus} {train}\n"
    size = f"--nnodes {launch.nodes} --nproc-per-node {launch.gpus}"
    first = f"--master-addr {shlex.quote(master)} --master-port {port}"
    return _lines([f"torchrun {size} --node-rank {node} {first} {train}" for node in range(launch.nodes)])


def _lines(commands: list[str]) -> str:
    return "".join(f"# on node {node}\n{command}\n" for node, command in enumerate(commands))


def _train(launch: Launch) -> str:
    return shlex.join([*_TRAIN, *launch.arguments])


def node_script(launch: Launch, *, rank: str, master: str, port: str) -> str:
    """What bash runs on every node: the ranks, and a way for signals to reach them.

    The launchers hand a SIGTERM on but kill after 30 seconds, which a checkpoint may not keep to; SIGUSR1 ends them.
    Composer's also ends ranks that are still leaving when the first has left. With both signals ignored from the start,
    which the ranks inherit until they set their own handlers, none is ended before its time.

    Args:
        rank: The name of the variable that holds the node's rank.
        master: A word of the shell, quoted already: the first node.
        port: As ``master``.
    """
    place = {"rank": f'"${rank}"', "base_rank": f'"$(({launch.gpus} * {rank}))"', "master": master, "port": port}
    return f"""\
# SIGTERM and SIGUSR1 reach the ranks as SIGUSR1: they save a checkpoint, and this shell leaves with their {STOPPED}.
trap '' TERM USR1
setsid {composer_command(launch, **place)} &
launcher=$!
signalled=yes
stopping=
stop() {{
  signalled=yes
  [ "$stopping" ] || {{ stopping=yes; tell_ranks > /dev/null 2>&1 & }}
}}
tell_ranks() {{  # again and again: while they start up they don't listen yet
  while kill -USR1 -- "-$launcher"; do sleep 5; done
}}
trap stop TERM USR1
while [ "$signalled" ]; do  # a signal interrupts the wait
  signalled=
  wait "$launcher"
  status=$?
done
exit "$status"
"""


def _directives(launch: Launch, more: dict[str, str | None]) -> list[str]:
    """What sbatch is asked for, a line each."""
    wishes = {
        "job-name": launch.name,
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "gres": f"gpu:{launch.gpus}",
        "cpus-per-task": launch.cpus,
        "mem": None if launch.memory is None else f"{launch.memory}G",
        **more,
        "output": "%x-%j.out",
        "open-mode": "append",
        "signal": f"USR1@{launch.grace}",
    }
    return [f"#SBATCH --{key}={value}" for key, value in wishes.items() if value is not None]


def slurm_script(
    launch: Launch, *, partition: str | None, account: str | None, time: str | None, setup: str | None
) -> str:
    """For ``sbatch``: one task on every node, and the job queued again after a stop with a checkpoint."""
    directives = _directives(launch, {"partition": partition, "account": account, "time": time})
    exports = [f"export {name}={shlex.quote(value)}" for name, value in launch.environment]
    # srun doesn't inherit it from sbatch.
    cpus = "" if launch.cpus is None else f" --cpus-per-task={launch.cpus}"
    node = node_script(launch, rank="SLURM_PROCID", master='"$MASTER_ADDR"', port='"$MASTER_PORT"')
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {launch.name} on {_size(launch)}. In the folder that its paths start from: sbatch THIS_FILE",
            *directives,
            "#SBATCH --requeue",
            "",
            *([setup] if setup else []),
            *exports,
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))",
            "export MASTER_ADDR MASTER_PORT",
            "node=$(cat <<'END_OF_NODE'",
            f"{node}END_OF_NODE",
            ")",
            "# A node that is still leaving isn't killed because another has left.",
            f'srun --kill-on-bad-exit=0 --wait={launch.grace}{cpus} bash -c "$node"',
            "status=$?",
            f'if [ "$status" = {STOPPED} ]; then',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$status"',
            "",
        ]
    )


def skypilot_task(
    launch: Launch,
    *,
    accelerator: str,
    spot: bool,
    image: str | None,
    setup: str | None,
    secrets: tuple[str, ...],
    volumes: tuple[tuple[str, str], ...],
) -> dict:
    """For ``sky jobs launch``, which starts the run again when its machines are taken away."""
    resources = {
        "accelerators": f"{accelerator}:{launch.gpus}",
        "use_spot": spot,
        "cpus": None if launch.cpus is None else f"{launch.cpus}+",
        "memory": None if launch.memory is None else f"{launch.memory}+",
        "image_id": None if image is None else f"docker:{image}",
        "job_recovery": {"max_restarts_on_errors": launch.retries, "recover_on_exit_codes": [INTERRUPTED, STOPPED]},
    }
    master = 'MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
    node = node_script(launch, rank="SKYPILOT_NODE_RANK", master='"$MASTER_ADDR"', port=str(PORT))
    task = {
        "name": launch.name,
        "num_nodes": launch.nodes,
        "resources": {key: value for key, value in resources.items() if value is not None},
        "workdir": ".",
        "volumes": {path: name for name, path in volumes},
        "envs": dict(launch.environment),
        "secrets": dict.fromkeys(secrets),  # null: taken from `sky jobs launch --secret NAME`
        "setup": setup,
        "run": master + node,
    }
    return {key: value for key, value in task.items() if value not in (None, {})}


def _size(launch: Launch) -> str:
    return f"{launch.nodes} x {launch.gpus} GPUs"
