"""Accuracy, FLOPs, CPU seconds and memory of recipes on small sets of real colour photographs, a table at a time.

    python -m benchmarks.accuracy.photos run speedups_cifar10 --data datasets/cifar10
    python -m benchmarks.accuracy.photos report

The tables are in ``photo_tables.py``. The two sets are made by

    vitcomposer convert torchvision CIFAR10 datasets/cifar10 --root datasets --download
    vitcomposer convert folder tiny_imagenet_20 datasets/tiny_imagenet_20

of which the second is http://cs231n.stanford.edu/tiny-imagenet-200.zip with the 20 classes that the table's file
names; for the results here CIFAR-10's images were JPEGs of Pillow's default quality. Every run is a process of its own,
from its launch to its end, on one thread; CPU seconds and memory are what the system counted for it. Runs of one seed
take turns, so that a slow hour of the machine meets all rows. Data sets and stored answers are not counted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.accuracy.photo_report import write_report
from benchmarks.accuracy.photo_tables import TABLES, Table
from benchmarks.provenance import commit, cpu_name

WORK = ROOT / ".bench/photos"


def run_table(name: str, data: Path, work: Path, rows: list[str], seeds: list[int]) -> None:
    """Every row and seed that has no result yet; one file each, so that an interrupted table goes on."""
    table = TABLES[name]
    unknown = sorted(set(rows) - set(table.rows))
    if unknown:
        sys.exit(f"error: --rows must be rows of {name}, got {unknown}; it has {list(table.rows)}")
    split = take_subset(data, table.train_images)
    for seed in seeds:
        for row in rows or table.rows:
            file = work / name / f"{slug(row)}-{seed}.json"
            if not file.exists():
                found = run_row(table, row, data, split, seed, work / name)
                file.write_text(json.dumps(found, indent=1) + "\n")
                print(f"{row}, seed {seed}: {100 * found['top1']:.2f} in {found['cpu']:.0f} CPU s", flush=True)


def take_subset(data: Path, count: int | None) -> str:
    """The split of ``count`` training images, balanced over the classes, written once; its name."""
    if count is None:
        return "train"
    name = f"train_{count}"
    if not (data / name / "index.json").exists():
        index = json.loads((data / "train" / "index.json").read_text())
        share = count / sum(shard["samples"] for shard in index["shards"])
        words = ["convert", "subset", str(data), name, "--fraction", str(share), "--seed", "0"]
        subprocess.run([sys.executable, "-m", "vitcomposer", *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return name


def run_row(table: Table, name: str, data: Path, split: str, seed: int, work: Path) -> dict[str, Any]:
    """One run of a row, from the weights of the row before it where it has one; seconds and FLOPs of both together."""
    row, run = table.rows[name], f"{slug(name)}-{seed}"
    keys = {"data.local": data, "data.train_split": split, "seed": seed, **table.shared, **row.keys}
    if row.after is not None:
        keys["init.weights"] = work / f"{slug(row.after)}-{seed}/checkpoints/latest-rank0.pt"
    one = run_stage(row.yaml, keys, work, run)
    summary = one["summary"]
    found = {key: summary.get(key) for key in _KEPT}
    found |= {"row": name, "seed": seed, "yaml": row.yaml, "commit": commit(), "cpu": one["cpu"]}
    found |= {"peak_memory": one["peak_memory"], "train_flops": summary.get("train_flops") or 0.0}
    found["keys"] = {key: str(value) for key, value in keys.items() if key not in ("data.local", "init.weights")}
    if row.after is not None:
        before = json.loads((work / f"{slug(row.after)}-{seed}.json").read_text())
        found |= {key: found[key] + before[key] for key in ("cpu", "train_flops")}
        found["peak_memory"] = max(found["peak_memory"], before["peak_memory"])
    shutil.copy(work / run / "metrics.jsonl", work / f"{run}.jsonl")
    return found


_KEPT = ("top1", "top1_ema", "knn", "epochs", "steps", "images_seen", "train_seconds", "evaluation_seconds")


def run_stage(yaml: str, keys: dict[str, Any], work: Path, name: str) -> dict[str, Any]:
    """One run of ``vitcomposer train``: its summary, CPU seconds of it and its children, and the largest memory.

    Raises:
        SystemExit: It failed; with the end of what it printed.
    """
    shutil.rmtree(work / name, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    changes = [f"{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "vitcomposer", "train", yaml, *changes]
    command += [f"run.folder={work}", f"run.name={name}", "run.progress_bar=false"]
    printed = work / f"{name}.txt"
    with printed.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{printed.read_text()[-3000:]}")
    summary = json.loads((work / name / "summary.json").read_text())
    return {"summary": summary, "cpu": usage.ru_utime + usage.ru_stime, "peak_memory": usage.ru_maxrss * 1024}


def slug(row: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in row)


def collect(work: Path) -> dict[str, Any]:
    """The results that are there, table by table, row by row."""
    tables: dict[str, Any] = {}
    for name, table in TABLES.items():
        rows = {row: [json.loads(path.read_text()) for path in _results(work / name, row)] for row in table.rows}
        if any(rows.values()):
            tables[name] = {row: found for row, found in rows.items() if found}
    versions = {package: version(package) for package in ("torch", "timm", "mosaicml", "mosaicml-streaming")}
    return {"tables": tables, "cpu": cpu_name(), "versions": versions}


def _results(folder: Path, row: str) -> list[Path]:
    return sorted(folder.glob(f"{slug(row)}-*.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run")
    run.add_argument("table", choices=sorted(TABLES))
    run.add_argument("--data", type=Path, required=True, help="folder of the MDS splits train and val")
    run.add_argument("--rows", nargs="*", default=[], help="these rows only")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--work", type=Path, default=WORK)
    show = actions.add_parser("report")
    show.add_argument("--work", type=Path, default=WORK)
    show.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    if args.action == "run":
        run_table(args.table, args.data.absolute(), args.work.absolute(), args.rows, args.seeds)
    else:
        write_report(collect(args.work), args.out)


if __name__ == "__main__":
    main()
