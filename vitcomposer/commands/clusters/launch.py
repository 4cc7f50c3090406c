"""``vitcomposer launch``: writes the file with which SLURM, Kubernetes, SkyPilot or a shell starts a recipe."""

import argparse
import re
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from vitcomposer.config.credentials import holds_credential, is_credential_name, variable_within
from vitcomposer.errors import require
from vitcomposer.schema.recipe import Recipe
from vitcomposer.whole_files import write_whole

if TYPE_CHECKING:
    from vitcomposer.launch.shell import Launch

_KUBERNETES = ("kubernetes", "jobset", "pytorchjob")
# Names of objects, and of hosts that are made from them with a few more letters.
_DNS_LABEL = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
_WORD = r"[\w][\w.,:@%+/=-]*"
_TIME = r"\d+(:\d\d){0,2}|\d+-\d\d?(:\d\d){0,2}"


def add_command(commands: Any) -> None:
    """Add ``launch`` to the subcommands of a parser."""
    parser = commands.add_parser("launch", description=_run.__doc__)
    engines = parser.add_subparsers(metavar="ENGINE", dest="engine", required=True)
    everywhere, shell, queued, pods = _common(), _shell(), _queued(), _pods()

    engines.add_parser("composer", parents=[everywhere, shell], help="shell commands, one for each node")
    engines.add_parser("torchrun", parents=[everywhere, shell], help="shell commands, one for each node")
    _add_slurm(engines, [everywhere, queued])
    engines.add_parser("kubernetes", parents=[everywhere, queued, pods], help="an Indexed Job and its Service")
    engines.add_parser("jobset", parents=[everywhere, queued, pods], help="a JobSet (jobset.x-k8s.io/v1alpha2)")
    engines.add_parser("pytorchjob", parents=[everywhere, queued, pods], help="a PyTorchJob (kubeflow.org/v1)")
    _add_skypilot(engines, [everywhere, queued, _stored()])
    parser.set_defaults(run=_run)


def _add_slurm(engines: Any, parents: list[argparse.ArgumentParser]) -> None:
    slurm = engines.add_parser("slurm", parents=parents, help="a script for sbatch")
    slurm.add_argument("--partition", help="(default: the cluster's)")
    slurm.add_argument("--account", help="(default: yours)")
    slurm.add_argument("--time", help="limit, such as 1-12:00:00; the run goes on in another job after it")
    slurm.add_argument("--setup", help="shell command before the run, such as 'source .venv/bin/activate'")


def _add_skypilot(engines: Any, parents: list[argparse.ArgumentParser]) -> None:
    sky = engines.add_parser("skypilot", parents=parents, help="a task for sky jobs launch")
    sky.add_argument("--accelerator", required=True, help="SkyPilot's name of the GPU, such as H100")
    sky.add_argument("--spot", action=argparse.BooleanOptionalAction, default=True, help="(default: on)")
    sky.add_argument("--image", help="of a container (default: SkyPilot's machine)")
    sky.add_argument("--setup", help="shell command that installs vitcomposer")


def _common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("yaml", help="a recipe's yaml, by the path that it has on the nodes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as max_duration=100ep")
    parser.add_argument("--nodes", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="N", help="each has one rank")
    parser.add_argument("--out", metavar="FILE", help="(default: printed)")
    parser.add_argument("--force", action="store_true", help="write over FILE")
    return parser


def _shell() -> argparse.ArgumentParser:
    from vitcomposer.launch.shell import PORT

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--master-addr", metavar="HOST", help="the first node, as the others reach it")
    parser.add_argument("--port", type=int, default=PORT, help="of the first node (default: %(default)s)")
    return parser


def _queued() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--cpus", type=int, metavar="N", help="of a node")
    parser.add_argument("--memory", type=int, metavar="GIB", help="of a node")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="no credentials; repeatable")
    help_text = "seconds from a signal to the end, for a checkpoint (default: %(default)s)"
    parser.add_argument("--grace", type=int, default=120, metavar="SECONDS", help=help_text)
    return parser


def _stored() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    help_text = "of credentials in the cluster, which become variables; repeatable"
    parser.add_argument("--secret", action="append", default=[], metavar="NAME", help=help_text)
    help_text = "storage that outlives the machines and where it is mounted; repeatable"
    parser.add_argument("--volume", action="append", default=[], metavar="NAME:PATH", help=help_text)
    help_text = "of a run that failed by itself; stops don't count (default: %(default)s)"
    parser.add_argument("--retries", type=int, default=3, help=help_text)
    return parser


def _pods() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[_stored()])
    parser.add_argument("--image", required=True, help="that has vitcomposer installed, and the yaml")
    parser.add_argument("--namespace", help="(default: that of kubectl)")
    help_text = "GiB of /dev/shm, counted as memory (default: %(default)s)"
    parser.add_argument("--shared-memory", type=int, default=16, metavar="GIB", help=help_text)
    return parser


def _run(args: argparse.Namespace) -> int:
    """Write the launch file of an engine for a recipe. The run that it starts resumes by itself when it was stopped."""
    from vitcomposer import config

    _check_text(args)
    cfg = config.load(args.yaml, args.overrides)
    _check_ranks(args, cfg)
    text = _render(args, cfg)
    if args.out is None:
        sys.stdout.write(text)
        return 0
    out = Path(args.out)
    require(out.parent.is_dir(), "--out", "in a folder that exists", args.out, f"Make {out.parent} first.")
    remedy = "Choose another name, or add --force."
    require(args.force or not out.exists(), "--out", "a file that does not exist yet", args.out, remedy)
    write_whole(out, text)
    start = {"slurm": "sbatch", "skypilot": "sky jobs launch"} | dict.fromkeys(_KUBERNETES, "kubectl apply -f")
    print(f"wrote {out}: {start.get(args.engine, 'bash, a line')} {out}")
    return 0


def _render(args: argparse.Namespace, cfg: Recipe) -> str:
    from vitcomposer.launch import shell as launch_commands

    launch = _launch(args, cfg)
    if args.engine in ("composer", "torchrun"):
        lines = {"composer": launch_commands.composer_lines, "torchrun": launch_commands.torchrun_lines}[args.engine]
        return lines(launch, args.master_addr if args.nodes > 1 else None, args.port)
    if args.engine == "slurm":
        wishes = {"partition": args.partition, "account": args.account, "time": args.time, "setup": args.setup}
        return launch_commands.slurm_script(launch, **wishes)
    volumes = _volumes(args, cfg.run)
    if args.engine == "skypilot":
        wishes = {"accelerator": args.accelerator, "spot": args.spot, "image": args.image, "setup": args.setup}
        task = launch_commands.skypilot_task(launch, **wishes, secrets=tuple(args.secret), volumes=volumes)
        return _to_yaml(launch, [task])
    return _to_yaml(launch, _kubernetes_objects(args, launch, volumes))


def _launch(args: argparse.Namespace, cfg: Recipe) -> "Launch":
    """What all engines are told."""
    from vitcomposer.launch.shell import Launch

    return Launch(
        name=_name(args.engine, cfg.run.name),
        arguments=(args.yaml, *args.overrides),
        nodes=args.nodes,
        gpus=args.gpus_per_node,
        environment=_environment(getattr(args, "env", [])),
        cpus=getattr(args, "cpus", None),
        memory=getattr(args, "memory", None),
        grace=getattr(args, "grace", 0),
        retries=getattr(args, "retries", 0),
    )


def _kubernetes_objects(
    args: argparse.Namespace, launch: "Launch", volumes: tuple[tuple[str, str], ...]
) -> list[dict[str, Any]]:
    from vitcomposer.launch import kubernetes as launch_kubernetes

    pods = launch_kubernetes.Pods(
        image=args.image,
        namespace=args.namespace,
        secrets=tuple(args.secret),
        volumes=volumes,
        shared_memory=args.shared_memory,
    )
    make = {
        "kubernetes": launch_kubernetes.indexed_job,
        "jobset": launch_kubernetes.job_set,
        "pytorchjob": launch_kubernetes.pytorch_job,
    }[args.engine]
    return make(launch, pods)


def _to_yaml(launch: Any, documents: list[dict[str, Any]]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:  # the pods of a master and its workers are the same
            return True

    def block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, block)
    body = yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=10**6, allow_unicode=True)
    return f"# {launch.name}: {launch.nodes} x {launch.gpus} GPUs\n{body}"


def _check_text(args: argparse.Namespace) -> None:
    """Everything that goes into the file as it is, and the numbers."""
    _match(args, "partition", _WORD, "a name of the cluster")
    _match(args, "account", _WORD, "a name of the cluster")
    _match(args, "time", _TIME, "minutes, H:MM:SS or D-HH:MM:SS")
    _match(args, "master_addr", _WORD, "a name or an address of a host")
    _match(args, "image", _WORD, "the name of an image")
    _match(args, "accelerator", r"[\w.+-]+", "SkyPilot's name of a GPU")
    _match(args, "namespace", _DNS_LABEL, "small letters, digits and -")
    for option in ("nodes", "gpus_per_node", "cpus", "memory", "grace", "shared_memory"):
        value = getattr(args, option, None)
        require(value is None or value >= 1, _flag(option), "1 or more", value, "Leave it out for its default.")
    retries, port = getattr(args, "retries", 0), getattr(args, "port", 1024)
    require(retries >= 0, "--retries", "0 or more", retries, "Leave it out.")
    require(1024 <= port <= 65535, "--port", "from 1024 to 65535", port, "Leave it out.")
    for option in (args.yaml, *args.overrides, *getattr(args, "env", []), getattr(args, "setup", None) or ""):
        require("\n" not in option, "the command line", "without line breaks", option, "Write it in one line.")
    _check_credentials(args)


def _check_credentials(args: argparse.Namespace) -> None:
    """Anybody may read the file: it names credentials and holds none."""
    for override in args.overrides:
        secret = holds_credential(override) or variable_within(override)
        remedy = "Take them out: every store reads its own from the environment."
        require(not secret, override.partition("=")[0], "without credentials", "some", remedy)
    secret = holds_credential(getattr(args, "setup", None) or "")
    require(not secret, "--setup", "without credentials", "some", "Read them from the environment of the machine.")
    for secret in getattr(args, "secret", []):
        fits = re.fullmatch(r"[A-Za-z]\w*" if args.engine == "skypilot" else r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", secret)
        rule = "the name of a variable" if args.engine == "skypilot" else "the name of a Secret"
        require(fits is not None, "--secret", rule, secret, "The credentials themselves never go into the file.")


def _match(args: argparse.Namespace, option: str, pattern: str, rule: str) -> None:
    value = getattr(args, option, None)
    fits = value is None or re.fullmatch(pattern, value, re.A) is not None
    require(fits, _flag(option), rule, value, "Leave it out for its default.")


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _check_ranks(args: argparse.Namespace, cfg: Recipe) -> None:
    """What a start checks before it reads an image, on the machines of the command line."""
    from vitcomposer.cost.estimate import build_without_storage
    from vitcomposer.schema.ranks import adjustments, check_ranks

    ranks = args.nodes * args.gpus_per_node
    check_ranks(cfg, ranks, args.gpus_per_node)
    build_without_storage(cfg.model)
    for line in adjustments(cfg, ranks):
        print(line, file=sys.stderr)
    shell = args.engine in ("composer", "torchrun")
    if shell and args.nodes > 1:
        given = args.master_addr
        require(given is not None, "--master-addr", f"set for {args.nodes} nodes", given, "Name the first node.")


def _name(engine: str, name: str) -> str:
    """``name`` as the engine allows it."""
    if engine in (*_KUBERNETES, "skypilot"):
        changed = re.sub(r"[._]", "-", name.lower())
        fits = re.fullmatch(_DNS_LABEL, changed) is not None
        rule = f"at most 40 letters, digits, -, . and _ for {engine}, a letter first"
        require(fits, "run.name", rule, name, "Add run.name=NAME.")
        return changed
    fits = engine != "slurm" or re.fullmatch(r"[\w.-]+", name, re.A) is not None
    require(fits, "run.name", "letters, digits, -, . and _ for slurm", name, "Add run.name=NAME.")
    return name


def _environment(given: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = [text.partition("=") for text in given]
    for (name, equals, value), text in zip(pairs, given, strict=True):
        fits = bool(equals) and re.fullmatch(r"[A-Za-z_]\w*", name, re.A) is not None
        require(fits, "--env", "NAME=VALUE", text, "Write it like NCCL_SOCKET_IFNAME=eth0.")
        remedy = "Put it where the engine keeps secrets (--secret), or into the environment that you submit from."
        secret = is_credential_name(name) or holds_credential(value) or variable_within(value)
        require(not secret, "--env", "free of credentials", name, remedy)
    return tuple((name, value) for name, _, value in pairs)


def _volumes(args: argparse.Namespace, run: Any) -> tuple[tuple[str, str], ...]:
    volumes = []
    for text in args.volume:
        name, _, path = text.partition(":")
        place = PurePosixPath(path)
        fits = re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", name) and place.is_absolute() and ".." not in place.parts
        plain = re.fullmatch(r"[\w./-]+", path, re.A) and place not in (PurePosixPath("/"), PurePosixPath("/dev/shm"))
        require(bool(fits and plain), "--volume", "NAME:/PATH", text, "Write it like runs:/runs.")
        volumes.append((name, str(place)))
    paths = [path for _, path in volumes]
    require(len(set(paths)) == len(paths), "--volume", "one for each path", args.volume, "Mount them at two paths.")
    kept = run.remote is not None or any(PurePosixPath(run.folder).is_relative_to(path) for path in paths)
    rule = "on a --volume, since a pod's own disk goes with it" if args.engine in _KUBERNETES else "on a --volume"
    remedy = "Add run.folder=/runs --volume runs:/runs, or run.remote=s3://BUCKET/runs."
    require(kept, "run.folder", rule, run.folder, remedy)
    return tuple(volumes)
