"""Accuracy against training FLOPs and seconds on small real data: each speed-up of a recipe alone, and together.

    python -m benchmarks.accuracy.pareto digits --out benchmarks/results
    python -m benchmarks.accuracy.pareto fashion --fashion /usr/share/datasets/fashion-mnist --out benchmarks/results

``digits`` are the 1,797 images that scikit-learn carries, ``fashion`` is Fashion-MNIST (70,000 images,
arXiv:1708.07747) as Debian's package ``dataset-fashion-mnist`` installs it. Every run is ``train.py`` with the
overrides below; runs of one seed take turns, so that a slow hour of the machine meets all of them. All variants see
the same images equally often, so one with fewer FLOPs saves them. ``--jobs`` runs side by side disturb each other's
seconds: use 1 for those.
"""

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.provenance import commit, cpu_name

YAML = "yamls/demo.yaml"

MODEL = {
    "model.embed_dim": 64,
    "model.depth": 6,
    "model.num_heads": 4,
    "model.drop_path_rate": 0.0,
    "run.progress_bar": False,
    "run.eval_interval": "1dur",
    "run.save_interval": "1dur",
    "data.num_workers": 1,
}
DATA: dict[str, dict[str, Any]] = {
    "digits": {
        "model.image_size": 24,
        "model.embed_dim": 128,
        "max_duration": "30ep",
        "schedule.t_warmup": "3ep",
        "global_train_batch_size": 64,
        "optimizer.lr": 1.5e-3,
    },
    "fashion": {
        "model.image_size": 28,
        "model.embed_dim": 96,
        "max_duration": "12ep",
        "schedule.t_warmup": "1ep",
        "optimizer.lr": 2e-3,
        "evaluation.global_batch_size": 250,
        "augment.flip_prob": 0.5,
        "augment.crop_scale": "[0.5,1.0]",
    },
}
SIZES = {"digits": [16, 20, 24], "fashion": [16, 20, 28]}
COMPUTE = {"digits": [0.55, 0.2, 0.25], "fashion": [0.35, 0.3, 0.35]}


def variants(data: str) -> dict[str, dict[str, Any]]:
    """Overrides of each variant beside the baseline's."""
    sizes = SIZES[data]
    curriculum = f"{{image_sizes: {sizes}, compute: {COMPUTE[data]}, rand_augment_from: 1.0}}"
    low_high = f"{{image_sizes: [{sizes[0]}, {sizes[-1]}], compute: [0.8, 0.2], rand_augment_from: 1.0}}"
    return {
        "baseline": {},
        "curriculum": {"algorithms.Curriculum": curriculum},
        "train low, test high": {"algorithms.Curriculum": low_high},
        "patch dropout": {"algorithms.PatchDropout": "{keep_rates: [0.5, 0.75, 1.0], until: [0.4, 0.8, 1.0]}"},
        "SAM every 5 steps": {"algorithms.SAM": "{rho: 0.05, interval: 5}"},
        "AdamW": {"optimizer.name": "adamw"},
        "LAMB": {"optimizer.name": "lamb", "optimizer.lr": 8e-3},
        "curriculum, SAM every 5": {
            "algorithms.Curriculum": curriculum,
            "algorithms.SAM": "{rho: 0.05, interval: 5}",
        },
    }


def prepare(data: str, work: Path, fashion: Path | None) -> Path:
    """The data set as MDS shards, written once."""
    out = work / data
    if (out / "train" / "index.json").exists():
        return out
    if data == "digits":
        convert("digits", str(out))
        return out
    assert fashion is not None, "--fashion names the folder with the four .gz files"
    raw = work / "torchvision" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for path in fashion.glob("*.gz"):
        with gzip.open(path) as packed, open(raw / path.stem, "wb") as plain:
            shutil.copyfileobj(packed, plain)
    convert("torchvision", "FashionMNIST", str(out), "--root", str(work / "torchvision"))
    return out


def subset(data: Path, count: int) -> str:
    """A split of ``count`` training images, balanced over the classes; its name."""
    name = f"train_{count}"
    if not (data / name / "index.json").exists():
        convert("subset", str(data), name, "--fraction", str(count / images(data, "train")), "--seed", "0")
    return name


def convert(*arguments: str) -> None:
    command = [sys.executable, "-m", "vitcomposer", "convert", *arguments]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def train(name: str, seed: int, overrides: dict[str, Any], runs: Path) -> dict[str, Any]:
    """One run; its summary."""
    run = f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    folder = runs / run
    if not is_finished(folder):
        shutil.rmtree(folder, ignore_errors=True)
        changes = [f"{key}={value}" for key, value in overrides.items()]
        command = [sys.executable, "train.py", YAML, *changes, f"seed={seed}", f"run.name={run}", f"run.folder={runs}"]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    summary = json.loads((folder / "summary.json").read_text())
    training_seconds = summary["images_seen"] / summary["images_per_sec"]
    return {**{key: summary[key] for key in ("top1", "top1_ema", "train_flops")}, "seconds": training_seconds}


def is_finished(folder: Path) -> bool:
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["finished"]


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Mean and range over the seeds, and what the baseline costs more in the same seed's turn."""
    table = {}
    for name, found in runs.items():
        tops = [run["top1"] for run in found]
        ratios = [base["seconds"] / run["seconds"] for base, run in zip(runs["baseline"], found, strict=True)]
        table[name] = {
            "top1": {"mean": statistics.mean(tops), "min": min(tops), "max": max(tops), "seeds": tops},
            "train_flops": found[0]["train_flops"],
            "flops_ratio": runs["baseline"][0]["train_flops"] / found[0]["train_flops"],
            "seconds": {"median": statistics.median(run["seconds"] for run in found)},
            "seconds_ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        }
    return table


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# Recipe speed-ups on {report['data']}: accuracy against training cost",
        "",
        f"{report['train_images']:,} training images, {report['val_images']:,} held out; {YAML} with the overrides in "
        f"the JSON beside this file; seeds {report['seeds']}. Machine: {report['cpu']}, {report['jobs']} run(s) at a "
        "time, one torch thread each. Ratios are to the baseline of the same seed. FLOPs are those of one pass of the "
        "model: SAM's second passes show in the seconds alone.",
        "",
        "| | top-1 mean [min-max] | training GFLOP | times fewer FLOPs | seconds | times fewer seconds [min-max] |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["variants"].items():
        top, ratio = row["top1"], row["seconds_ratio"]
        lines.append(
            f"| {name} | {100 * top['mean']:.2f} [{100 * top['min']:.2f}-{100 * top['max']:.2f}] "
            f"| {row['train_flops'] / 1e9:,.0f} | {row['flops_ratio']:.2f} | {row['seconds']['median']:,.0f} "
            f"| {ratio['median']:.2f} [{ratio['min']:.2f}-{ratio['max']:.2f}] |"
        )
    return "\n".join([*lines, ""])


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, row in report["variants"].items():
        top = row["top1"]
        error = [[100 * (top["mean"] - top["min"])], [100 * (top["max"] - top["mean"])]]
        colour = "#475569" if name == "baseline" else "#c2410c"
        flops = row["train_flops"] / 1e12
        axes.errorbar(flops, 100 * top["mean"], yerr=error, fmt="o", color=colour, capsize=3, alpha=0.8)
        axes.annotate(name, (flops, 100 * top["mean"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="training TFLOP", ylabel="top-1, % (mean, min and max of the seeds)", title=report["data"])
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def images(folder: Path, split: str) -> int:
    index = json.loads((folder / split / "index.json").read_text())
    return sum(shard["samples"] for shard in index["shards"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=sorted(DATA))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "pareto")
    parser.add_argument("--fashion", type=Path, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--train-images", type=int, help="balanced over the classes (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="these variants beside the baseline")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every variant")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    local = prepare(args.data, args.work, args.fashion)
    split = subset(local, args.train_images) if args.train_images else "train"
    place = {"data.local": local, "data.train_split": split}
    shared = {**MODEL, **DATA[args.data], **place, **dict(item.split("=", 1) for item in args.set)}
    chosen = {k: v for k, v in variants(args.data).items() if not args.only or k in args.only or k == "baseline"}
    turns = [(name, seed) for seed in range(args.seeds) for name in chosen]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(lambda t: train(*t, {**shared, **chosen[t[0]]}, args.work / f"{args.data}-runs"), turns))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for (name, _), summary in zip(turns, found, strict=True):
        runs[name].append(summary)
    report = {
        "data": args.data,
        "train_images": images(local, split),
        "val_images": images(local, "val"),
        "seeds": list(range(args.seeds)),
        "jobs": args.jobs,
        "cpu": cpu_name(),
        "overrides": {
            name: {k: str(v) for k, v in {**shared, **more}.items() if k != "data.local"}
            for name, more in chosen.items()
        },
        "variants": summarize(runs),
        "runs": runs,
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "mosaicml", "mosaicml-streaming")},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"pareto_{args.data}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    draw(report, stem.with_suffix(".png"))
    print(markdown(report))


if __name__ == "__main__":
    main()
