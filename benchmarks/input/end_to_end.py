"""Images per second through train.py with a model that costs nothing, by loader workers, each on as many cores.

    python -m benchmarks.input.end_to_end --workers 1 2 --out benchmarks/results/end_to_end_cpu.json
    python -m benchmarks.input.end_to_end --workers 1 --rounds 1 --out trial.json          on one core

n workers and the main process have n cores. What train.py adds to the loader is the transfer, normalising to float32
(the device's work), the step, its logging and callbacks; its CPU time an image is told apart from the workers'. The
loader alone, with as many workers on as many cores, comes before it in each round. The photographs are those of
benchmarks.input, listed several times over so that an epoch lasts. Needs Linux.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks import ROOT
from benchmarks.input.candidates import lengthen_epoch
from benchmarks.input.photos import build_photos
from benchmarks.provenance import commit, cpu_name
from vitcomposer.runs import layout

BATCH = 128
# Crop and flip only, as in the headline of benchmarks.input; mixing and erasing belong to the device's work.
OVERRIDES = [
    "model.name=mean_color",
    "model.drop_path_rate=0",
    "precision=fp32",
    f"global_train_batch_size={BATCH}",
    "augment.rand_augment=null",
    "augment.random_erasing=0",
    "augment.repeated_augmentation=1",
    "mixing.mixup_alpha=0",
    "mixing.cutmix_alpha=0",
    "algorithms={}",
    "schedule.t_warmup=1ba",
    "run.eval_interval=1000ep",
    "run.save_interval=1000ep",
    "run.progress_bar=false",
]


class Seen(NamedTuple):
    """What was read when a line of the run's metrics appeared; CPU seconds of the main process and of its workers."""

    images: int
    wall: float
    main: float
    workers: float


def data_set(work: Path, count: int) -> Path:
    """MDS shards of ``count`` photographs, made seekable, the training split listed several times over."""
    photos, mds = work / f"photos-{count}", work / f"mds-{count}"
    if not (mds / "lengthened").exists():
        build_photos(photos, "full", count)
        linked = work / f"linked-{count}"
        for split in ("train", "val"):
            (linked / split).parent.mkdir(parents=True, exist_ok=True)
            if not (linked / split).is_symlink():
                (linked / split).symlink_to(photos.resolve())
        run([sys.executable, "-m", "vitcomposer", "convert", "folder", str(linked), str(mds)])
        lengthen_epoch(mds / "train" / "index.json")
        (mds / "lengthened").touch()
    return mds


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(command: list[str], cores: Sequence[int] | None = None) -> None:
    pinned = [] if cores is None else ["taskset", "-c", ",".join(map(str, cores))]
    subprocess.run([*pinned, *command], check=True, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)


def loader_alone(overrides: list[str], workers: int, cores: Sequence[int], work: Path) -> dict[str, float]:
    found = work / "bench.json"
    command = [sys.executable, "-m", "vitcomposer", "bench", "yamls/deit_s.yaml", *overrides]
    run([*command, "--workers", str(workers), "--seconds", "5", "--json", str(found)], cores)
    speed = json.loads(found.read_text())["speeds"][-1]
    return {"images_per_second": speed["images_per_second"], "images_per_cpu_second": speed["images_per_cpu_second"]}


def through_train(overrides: list[str], batches: int, cores: Sequence[int], work: Path) -> dict[str, float]:
    """Between the second and the last but one of the lines that the run writes, every ten steps."""
    runs, name = work / "runs", f"noop-{time.time_ns()}"
    command = [sys.executable, "train.py", "yamls/deit_s.yaml", *overrides, f"max_duration={batches}ba"]
    command += [f"run.folder={runs}", f"run.name={name}"]
    process = subprocess.Popen(
        ["taskset", "-c", ",".join(map(str, cores)), *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seen = list(watch(process, runs / name / layout.METRICS))
    if process.returncode or len(seen) < 4:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    first, last = seen[1], seen[-2]
    images = last.images - first.images
    return {
        "images": images,
        "images_per_second": images / (last.wall - first.wall),
        "main_process_us_an_image": 1e6 * (last.main - first.main) / images,
        "workers_us_an_image": 1e6 * (last.workers - first.workers) / images,
    }


def watch(process: subprocess.Popen[bytes], metrics: Path) -> list[Seen]:
    seen: list[Seen] = []
    lines = 0
    while process.poll() is None:
        time.sleep(0.01)
        text = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        whole = [line for line in text if line.endswith("\n")]
        if len(whole) > lines:
            lines = len(whole)
            workers = [child.pid for child in psutil.Process(process.pid).children()]
            images = json.loads(whole[-1])["sample"]
            seen.append(Seen(images, time.perf_counter(), cpu_seconds(process.pid), sum(map(cpu_seconds, workers))))
    return seen


def cpu_seconds(pid: int) -> float:
    """Of all threads of another process, to the nanosecond."""
    return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid() of the C library makes its number


def summary(rounds: list[dict[str, Any]], counts: list[int]) -> dict[str, Any]:
    """Medians by number of workers, and ratios inside the rounds: to the loader alone, to that many first rows."""
    found: dict[str, Any] = {}
    for count in counts:
        rows = [one[str(count)] for one in rounds]
        row = {key: statistics.median(row["train"][key] for row in rows) for key in rows[0]["train"]}
        work = row["workers_us_an_image"]
        row["workers_share_of_cpu"] = work / (work + row["main_process_us_an_image"])
        row["of_loader_alone"] = statistics.median(
            row["train"]["images_per_second"] / row["loader"]["images_per_second"] for row in rows
        )
        for kind in ("loader", "train"):
            first = [one[str(counts[0])][kind]["images_per_second"] / counts[0] for one in rounds]
            own = [row[kind]["images_per_second"] / count for row in rows]
            row[f"{kind}_each_of_one"] = statistics.median(a / b for a, b in zip(own, first, strict=True))
        found[str(count)] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "end_to_end")
    parser.add_argument("--photos", type=int, default=512)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers, smallest first")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if max(args.workers) > len(cores):
        parser.error(f"--workers must be at most {len(cores)}, the cores of this process, got {args.workers}.")
    args.work.mkdir(parents=True, exist_ok=True)
    mds = data_set(args.work, args.photos)
    classes = len(json.loads((mds / "train" / "class_names.json").read_text()))
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        row: dict[str, Any] = {}
        for workers in args.workers:
            data = [f"data.local={mds}", f"data.num_workers={workers}", f"model.num_classes={classes}"]
            overrides, own = [*OVERRIDES, *data], cores[-workers:]
            loader = loader_alone(overrides, workers, own, args.work)
            trained = through_train(overrides, args.batches, own, args.work)
            row[str(workers)] = {"loader": loader, "train": trained}
            print(
                f"round {number}, {workers} on as many cores: loader {loader['images_per_second']:,.0f} images/s, "
                f"train.py {trained['images_per_second']:,.0f}; an image {trained['main_process_us_an_image']:.0f}"
                f" us of the main process and {trained['workers_us_an_image']:.0f} us of a worker",
                flush=True,
            )
        rounds.append(row)
    report = {
        "summary": summary(rounds, args.workers),
        "rounds": rounds,
        "cores": cores,
        "cpu": cpu_name(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "mosaicml", "mosaicml-streaming", "numba")},
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
