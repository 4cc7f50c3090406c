"""Images per second through train.py with a model that costs nothing, against the loader alone, in turn.

    python -m benchmarks.input.end_to_end --out benchmarks/results/end_to_end_cpu.json

What train.py adds to the loader is the transfer, normalising to float32, the step, its logging and callbacks. The
photographs are those of benchmarks.input, linked several times over so that an epoch lasts.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.input.photos import build_photos
from benchmarks.provenance import commit

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


def data_set(work: Path, count: int, copies: int) -> Path:
    """MDS shards of ``copies`` times ``count`` photographs, made seekable."""
    photos, mds = work / f"photos-{count}", work / f"mds-{count}x{copies}"
    if not (mds / "summary.json").exists():
        build_photos(photos, "full", count)
        linked = work / "linked"
        shutil.rmtree(linked, ignore_errors=True)
        for split, number in (("train", copies), ("val", 1)):
            for copy in range(number):
                for folder in sorted(path for path in photos.iterdir() if path.is_dir()):
                    link = linked / split / folder.name / f"{copy:03}"
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(folder.resolve())
        run([sys.executable, "-m", "vitcomposer", "convert", "folder", str(linked), str(mds)])
    return mds


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def loader_alone(overrides: list[str], workers: int, work: Path) -> float:
    found = work / "bench.json"
    command = [sys.executable, "-m", "vitcomposer", "bench", "yamls/deit_s.yaml", *overrides]
    run([*command, "--workers", str(workers), "--seconds", "3", "--json", str(found)])
    speeds = json.loads(found.read_text())["speeds"]
    return speeds[-1]["images_per_second"]


def through_train(overrides: list[str], batches: int, work: Path) -> dict[str, Any]:
    runs = work / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    command = [sys.executable, "train.py", "yamls/deit_s.yaml", *overrides, f"max_duration={batches}ba"]
    run([*command, f"run.folder={runs}", "run.name=noop"])
    summary = json.loads((runs / "noop" / "summary.json").read_text())
    return {key: summary[key] for key in ("images_per_sec", "data_wait_fraction", "images_seen", "seconds")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "end_to_end")
    parser.add_argument("--photos", type=int, default=512)
    parser.add_argument("--copies", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    mds = data_set(args.work, args.photos, args.copies)
    classes = len(json.loads((mds / "train" / "class_names.json").read_text()))
    overrides = [*OVERRIDES, f"data.local={mds}", f"data.num_workers={args.workers}", f"model.num_classes={classes}"]
    rounds = []
    for number in range(args.rounds):
        alone = loader_alone(overrides, args.workers, args.work)
        trained = through_train(overrides, args.batches, args.work)
        rounds.append({"loader": alone, "train": trained, "ratio": trained["images_per_sec"] / alone})
        print(f"round {number}: loader {alone:,.0f} images/s, train.py {trained['images_per_sec']:,.0f}", flush=True)
    report = {
        "ratio": statistics.median(r["ratio"] for r in rounds),
        "rounds": rounds,
        "workers": args.workers,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "mosaicml", "mosaicml-streaming", "numba")},
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"train.py reaches {report['ratio']:.0%} of the loader alone")


if __name__ == "__main__":
    main()
