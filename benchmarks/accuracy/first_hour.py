"""The first hour with one's own photographs: ours, timm's train.py, `yolo classify`, from scratch on equal CPU time.

    python -m benchmarks.accuracy.first_hour run --photos FOLDER --timm train.py --yolo ENV/bin --budget 600
    python -m benchmarks.accuracy.first_hour report

FOLDER holds ``train`` and ``val`` of one folder per class, or such folders alone, of which a tenth of each class is
held out as ``vitcomposer convert`` does; all tools get that split. ``train.py`` is that of timm's repository, which no
wheel has; ENV is an environment of its own that has ``ultralytics`` (AGPL-3.0: measured here and no part of this
project). The two sets of the results are made by

    curl -O https://download.pytorch.org/tutorial/hymenoptera_data.zip && unzip hymenoptera_data.zip    # ants and bees
    kaggle datasets download -d alxmamaev/flowers-recognition --unzip    # flowers

Each tool is typed as its documentation says, in an empty folder and with an empty home, so that what a first start
compiles counts. A machine that others share gives no seconds that can be compared: the budget is CPU seconds of
all processes that the commands start, with one thread each. Runs of 1 and of 6 (ours: 41) epochs on a part of the
photographs tell what a step costs and what everything else; from that follows how many epochs fill the budget, and each
run that counts, from the first command on, trains that many with its whole schedule.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.provenance import commit, cpu_name

WORK = ROOT / ".bench/first_hour"
SIZE = 96  # pixels, of all tools: what `vitcomposer new` chooses without pre-trained weights
POLL = 0.2  # seconds
PART = 160  # images, about, on which an epoch's cost is measured
_TICKS = os.sysconf("SC_CLK_TCK")
_OF_A_BATCH = re.compile(r"^global_train_batch_size: (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """What one run is given."""

    photos: str  # name of the folder, in the folder where the commands are typed
    classes: int
    epochs: int
    batch: int  # images a step: what `vitcomposer new` chooses for these photographs
    seed: int  # 0: the tool's own default, which nobody types
    minutes: float = 10.0  # of the budget; of ours the augmentation follows from them
    part: bool = False  # a trial on few photographs, for which `vitcomposer new` would choose smaller batches


@dataclass(frozen=True)
class Tool:
    """A row of the table."""

    title: str
    commands: Callable[[Run], list[str]]
    first_step: str  # regular expression of what it prints when the first step is done
    accuracy: Callable[[Path], list[float]]  # of every evaluation, in the folder of the commands; the last is the end's
    trial: int = 6  # epochs of the longer trial


def _type_ours(run: Run) -> list[str]:
    changes = f" seed={run.seed}" if run.seed else ""
    changes += f" global_train_batch_size={run.batch}" if run.part else ""
    return [
        f"vitcomposer new {run.photos} --minutes {run.minutes:g}",
        f"vitcomposer convert folder {run.photos} datasets/{run.photos} --for {run.photos}.yaml",
        f"vitcomposer train {run.photos}.yaml max_duration={run.epochs}ep{changes}",
    ]


def _type_timm(model: str) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        seed = f" --seed {run.seed}" if run.seed else ""
        line = f"python train.py --data-dir {run.photos} --num-classes {run.classes} --model {model} --img-size {SIZE}"
        return [f"{line} --device cpu -b {run.batch} --epochs {run.epochs} --workers 1{seed}"]

    return command


def _type_yolo(run: Run) -> list[str]:
    seed = f" seed={run.seed}" if run.seed else ""
    line = f"yolo classify train model=yolo11n-cls.yaml data={run.photos} imgsz={SIZE} device=cpu epochs={run.epochs}"
    return [line + seed]


def _read_ours(folder: Path) -> list[float]:
    (metrics,) = folder.glob("runs/*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [100 * line["metrics/eval/top1"] for line in lines if "metrics/eval/top1" in line]


def _read_timm(folder: Path) -> list[float]:
    (table,) = folder.glob("output/train/*/summary.csv")
    return [float(row["eval_top1"]) for row in csv.DictReader(table.open())]


def _read_yolo(folder: Path) -> list[float]:
    (table,) = folder.glob("runs/classify/*/results.csv")
    return [100 * float(row["metrics/accuracy_top1"]) for row in csv.DictReader(table.open())]


_VIT = (  # without --aa rand-m9-mstd0.5-inc1, which ends timm 1.0.31 with Pillow 13: it posterizes to 0 bits
    f"vit_tiny_patch16_224 --model-kwargs img_size={SIZE} --opt adamw --lr 5e-4 --weight-decay .05 --mixup .2 "
    "--reprob .25"
)
TOOLS = {
    "ours": Tool("vitcomposer", _type_ours, r"^ +\d[\d.]* +\d+\.\d+ ", _read_ours, 41),
    "timm_vit": Tool("timm's train.py, ViT-Ti/16", _type_timm(_VIT), r"^Train: 0 \[", _read_timm),
    "timm_resnet": Tool("timm's train.py, ResNet-18", _type_timm("resnet18"), r"^Train: 0 \[", _read_timm),
    "yolo": Tool("yolo classify, YOLO11n-cls", _type_yolo, r" 1/\d+ +0G +[\d.]+ ", _read_yolo),
}


def split_photos(photos: Path, folder: Path) -> Path:
    """A folder ``train`` and a folder ``val`` of links to photographs, split as ``vitcomposer convert`` does."""
    from vitcomposer.data.conversion.sources import FolderSource

    out = folder / photos.resolve().name
    if not out.exists():
        source = FolderSource(photos, find_copies=False)
        for split in ("train", "val"):
            for item in source.splits[split]:
                place = out / split / source.class_names[item.label] / Path(item.name).name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source.root / item.name, place)
    return out


def measure(commands: list[str], pattern: str, folder: Path, path: str) -> dict[str, Any]:
    """Type commands one after another in a folder; seconds and CPU seconds to the first step, and of all.

    Args:
        commands: Lines for a shell.
        pattern: Of what is printed when the first step is done.
        folder: Where they are typed; what they print goes into ``printed.txt``.
        path: Folders of programs that come before those of this machine.

    Raises:
        RuntimeError: A command failed, or no first step was seen.
    """
    home = folder / "home"
    home.mkdir()
    environment = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": str(home), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    printed, step = folder / "printed.txt", re.compile(pattern, re.MULTILINE)
    begin, spent, first = time.perf_counter(), 0.0, None
    for line in commands:
        with printed.open("a") as file:
            process = subprocess.Popen(
                ["bash", "-c", line], cwd=folder, env=environment, stdout=file, stderr=file, process_group=0
            )
        used, before = 0.0, _of_ended_children()
        try:
            ended = False
            while not ended:
                ended = process.poll() is not None
                used = max(used, tree_seconds(process.pid))
                if first is None and line is commands[-1] and step.search(_text(printed)):
                    first = (time.perf_counter() - begin, spent + used)
                time.sleep(POLL)
        finally:
            _end(process)
        if process.returncode:
            raise RuntimeError(f"{line}: exit {process.returncode}\n{_text(printed)[-2000:]}")
        spent += max(used, _of_ended_children() - before)  # the second lacks what a command left behind
    if first is None:
        raise RuntimeError(f"{commands[-1]}: nothing like {pattern!r} was printed\n{_text(printed)[-2000:]}")
    found = {"seconds_to_first_step": first[0], "cpu_to_first_step": first[1]}
    return {**found, "seconds": time.perf_counter() - begin, "cpu": spent}


def tree_seconds(pid: int) -> float:
    """CPU seconds of a process, of all processes below it, and of those that it has waited for."""
    seconds, waiting = 0.0, [pid]
    while waiting:
        at = Path("/proc", str(waiting.pop()))
        try:
            fields = (at / "stat").read_text().rpartition(")")[2].split()
            waiting += [
                int(child) for task in (at / "task").iterdir() for child in (task / "children").read_text().split()
            ]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended, and its parent counts it
        seconds += sum(map(int, fields[11:15])) / _TICKS  # user, system, and both of waited-for children
    return seconds


def _of_ended_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _text(printed: Path) -> str:
    return re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", printed.read_text(errors="replace")).replace("\r", "\n")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """What the command started and left behind goes with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_tool(name: str, run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """The run that fills the budget, after the trials that say how many epochs do."""
    plan = {"epochs": args.epochs} if args.epochs else _plan(name, run, args)
    planned = replace(run, epochs=plan["epochs"])
    found = _run_once(name, planned, args.work / "photos" / run.photos, args)
    lines = TOOLS[name].commands(planned)
    found |= {"tool": name, "photos": run.photos, "seed": run.seed, "batch": run.batch, "budget": args.budget, **plan}
    return {**found, "commands": lines, "characters": sum(map(len, lines)), "commit": commit()}


def _plan(name: str, run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """How many epochs fill the budget, and the trials that say so."""
    part, share = take_part(args.work / "photos" / run.photos, args.work / "part", run.batch)
    trials = _trials(name, run, part, args)
    epoch = (trials[1] - trials[0]) / (TOOLS[name].trial - 1)
    epochs = max(round((args.budget - trials[0] + epoch) * share / epoch), 1)
    return {"epochs": epochs, "trials": trials, "share_in_trials": share}


def _trials(name: str, run: Run, part: Path, args: argparse.Namespace) -> list[float]:
    """CPU seconds of the trials: those of another seed where there are, since no cost depends on it."""
    for path in args.work.glob(f"{run.photos}-{name}-*.json"):
        found = json.loads(path.read_text())
        if (found["budget"], found["batch"]) == (args.budget, run.batch) and "trials" in found:
            return found["trials"]
    few, many = replace(run, epochs=1, part=True), replace(run, epochs=TOOLS[name].trial, part=True)
    return [_run_once(name, trial, part, args)["cpu"] for trial in (few, many)]


def take_part(photos: Path, folder: Path, batch: int) -> tuple[Path, float]:
    """A copy of every n-th image of both splits, and what share of the steps of an epoch it has.

    Of ``train`` it has whole batches, at least ``PART`` images where there are so many.
    """
    images = sorted(photos.glob("train/*/*"))
    every, out = max(len(images) // max(PART, 3 * batch), 1), folder / photos.name
    steps = len(images[::every]) // batch
    if not out.exists():
        for image in images[::every][: steps * batch] + sorted(photos.glob("val/*/*"))[::every]:
            place = out / image.relative_to(photos)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, place)
    return out, steps / (len(images) // batch)


def _run_once(name: str, run: Run, photos: Path, args: argparse.Namespace) -> dict[str, Any]:
    folder = args.work / f"{run.photos}-{name}-{run.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(photos, folder / run.photos)
    shutil.copy(args.timm, folder / "train.py")
    programs = args.yolo if name == "yolo" else Path(sys.executable).parent
    tool = TOOLS[name]
    found = measure(tool.commands(run), tool.first_step, folder, str(programs.absolute()))
    return {**found, "top1": tool.accuracy(folder)}


def run_all(args: argparse.Namespace) -> None:
    """Every tool and seed that has no result yet; one file each, so that an interrupted comparison goes on."""
    photos = split_photos(args.photos, args.work / "photos").name
    yaml = args.work / f"{photos}.yaml"
    for written in (yaml, yaml.with_suffix(".duplicates.csv")):
        written.unlink(missing_ok=True)
    command = [sys.executable, "-m", "vitcomposer", "new", str(args.work / "photos" / photos), "--out", str(yaml)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    chosen = _OF_A_BATCH.search(yaml.read_text())
    assert chosen, "the page has a batch"
    classes = len(list((args.work / "photos" / photos / "train").iterdir()))
    for seed in args.seeds:
        for name in args.tools:
            file = args.work / f"{photos}-{name}-{seed}.json"
            if not file.exists():
                run = Run(photos, classes, 1, int(chosen[1]), seed, minutes=args.budget / 60)
                found = run_tool(name, run, args)
                file.write_text(json.dumps(found, indent=1) + "\n")
                print(f"{photos}, {name}, seed {seed}: {found['top1'][-1]:.1f} in {found['cpu']:.0f} CPU s", flush=True)


def table(runs: list[dict[str, Any]]) -> str:
    """The rows of the results, a set after the other."""
    lines: list[str] = []
    for photos in sorted({run["photos"] for run in runs}):
        lines += ["", f"## {photos}", "", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
        for name, tool in TOOLS.items():
            of_tool = [run for run in runs if (run["photos"], run["tool"]) == (photos, name)]
            lines += [_row(tool.title, of_tool)] if of_tool else []
    return "\n".join(lines)


_COLUMNS = (
    "tool",
    "commands",
    "characters",
    "seconds to the first step (CPU)",
    "epochs",
    "CPU seconds",
    "top-1 at the end, %",
    "best evaluation",
)


def _row(title: str, runs: list[dict[str, Any]]) -> str:
    def middle(key: str) -> float:
        return statistics.median(run[key] for run in runs)

    first = f"{middle('seconds_to_first_step'):.0f} ({middle('cpu_to_first_step'):.0f})"
    ends, best = [run["top1"][-1] for run in runs], [max(run["top1"]) for run in runs]
    cells = [title, len(runs[0]["commands"]), runs[0]["characters"], first, f"{middle('epochs'):.0f}"]
    cells += [f"{middle('cpu'):.0f}", ", ".join(f"{top1:.1f}" for top1 in ends)]
    return f"| {' | '.join(map(str, cells))} | {', '.join(f'{top1:.1f}' for top1 in best)} |"


def report(work: Path, out: Path) -> None:
    """Write the results that are there as JSON, and print the table."""
    runs = [json.loads(path.read_text()) for path in sorted(work.glob("*.json"))]
    versions = {name: version(name) for name in ("torch", "timm", "mosaicml", "vitcomposer")}
    page = {"runs": runs, "cpu": cpu_name(), "commit": commit(), "versions": versions}
    (out / "first_hour.json").write_text(json.dumps(page, indent=1) + "\n")
    print(table(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--photos", type=Path, help="folder of photographs")
    parser.add_argument("--timm", type=Path, help="train.py of timm's repository")
    parser.add_argument("--yolo", type=Path, help="folder of the program yolo")
    parser.add_argument("--budget", type=float, default=600.0, help="CPU seconds of each run")
    parser.add_argument("--epochs", type=int, help="of each run, where its cost is known: without trials")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    args.work = args.work.absolute()
    if args.action == "report":
        report(args.work, args.out)
    elif not (args.photos and args.timm and args.yolo):
        parser.error("--photos, --timm and --yolo must be given")
    else:
        run_all(args)


if __name__ == "__main__":
    main()
