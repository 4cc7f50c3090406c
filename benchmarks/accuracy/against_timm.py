"""The same small DeiT by our recipe ``supervised`` and by timm's parts, on the same photographs, with five seeds.

    python -m benchmarks.accuracy.against_timm both --data FOLDER --work .bench/against_timm
    python -m benchmarks.accuracy.against_timm report --work .bench/against_timm

FOLDER holds ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``: CIFAR-10 (Krizhevsky 2009), each image of
``torchvision.datasets.CIFAR10`` saved by Pillow as a JPEG of its default quality (75), numbered in the order of its
class. The first 500 training images of each class are trained on; all of ``val`` is evaluated, once, at the end.

timm's script ``train.py`` is in no wheel. Its loop is short, and everything in it is a public part of timm: network,
loader, ``Mixup``, ``SoftTargetCrossEntropy``, optimizer and scheduler. The two take turns; CPU seconds and memory are
those of a process of its own for each run, from its launch to its end, on one thread. What an epoch costs is the
training alone: without imports, the making of the data set and the evaluation.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.provenance import commit, cpu_name

SEEDS = (0, 1, 2, 3, 4)
PER_CLASS = 500
SIZE, EPOCHS, BATCH, WARMUP = 32, 10, 100, 1
LR, WARMUP_LR, WEIGHT_DECAY = 1e-3, 1e-6, 0.05
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RAND_AUGMENT, ERASING = "rand-m9-mstd0.5-inc1", 0.25
NETWORK = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3, "drop_path_rate": 0.1}
OURS = {
    "max_duration": f"{EPOCHS}ep",
    "global_train_batch_size": BATCH,
    "precision": "fp32",
    "model.name": "deit_tiny_patch16",
    "model.num_classes": 10,
    "model.image_size": SIZE,
    **{f"model.{key}": value for key, value in NETWORK.items()},
    "augment.repeated_augmentation": 1,
    "evaluation.crop_ratio": 1.0,
    "optimizer.lr": LR,
    "optimizer.lr_scaling": "none",
    "schedule.t_warmup": f"{WARMUP}ep",
    "schedule.alpha_i": WARMUP_LR / LR,
    "schedule.alpha_f": 0.0,
    "algorithms": "{}",
    "data.num_workers": 0,
    "run.progress_bar": False,
    "run.eval_interval": "1dur",
    "run.save_interval": "1dur",
    "run.keep_checkpoints": 1,
    "run.log_interval": "1ba",
}


def take_subset(data: Path, work: Path) -> Path:
    """A folder of the images of this comparison."""
    folder = work / "images"
    if not (folder / "val").exists():
        for cls in sorted(path for path in (data / "train").iterdir() if path.is_dir()):
            (folder / "train" / cls.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(cls.iterdir())[:PER_CLASS]:
                shutil.copy(image, folder / "train" / cls.name)
        shutil.copytree(data / "val", folder / "val")
    return folder


def train_timm(images: Path, seed: int) -> dict[str, Any]:
    """One run of timm's loop: top-1 of the last weights, the learning rate of every step, seconds."""
    from timm import create_model
    from timm.data import Mixup, create_dataset, create_loader
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    from benchmarks.timm_posterize import posterize_to_no_bits

    posterize_to_no_bits()
    random.seed(seed)
    torch.manual_seed(seed)
    model = create_model("deit_tiny_patch16_224", num_classes=10, img_size=SIZE, **NETWORK)
    shared: dict[str, Any] = {"input_size": (3, SIZE, SIZE), "interpolation": "bicubic", "mean": MEAN, "std": STD}
    shared |= {"use_prefetcher": False, "num_workers": 0, "persistent_workers": False, "pin_memory": False}
    train = create_loader(
        create_dataset("", root=str(images), split="train"),
        batch_size=BATCH,
        is_training=True,
        scale=(0.08, 1.0),
        hflip=0.5,
        auto_augment=RAND_AUGMENT,
        re_prob=ERASING,
        re_mode="pixel",
        **shared,
    )
    val = create_loader(create_dataset("", root=str(images), split="val"), batch_size=BATCH, crop_pct=1.0, **shared)
    mix = Mixup(0.8, 1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1, num_classes=10)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=EPOCHS,
        warmup_epochs=WARMUP,
        warmup_lr=WARMUP_LR,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=len(train),
    )
    assert schedule is not None
    loss_of, rates = SoftTargetCrossEntropy(), []
    began = time.process_time()
    for epoch in range(EPOCHS):
        model.train()
        for step, (x, y) in enumerate(train):
            x, target = mix(x, y)
            loss = loss_of(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step_update(epoch * len(train) + step + 1)
    training = time.process_time() - began
    model.eval()
    with torch.no_grad():
        correct = sum(int((model(x).argmax(dim=1) == y).sum()) for x, y in val)
    found = {"seed": seed, "top1": correct / len(val.dataset), "lr": rates}
    return {**found, "steps": len(rates), "cpu_of_an_epoch": round(training / EPOCHS, 3)}


def train_ours(images: Path, work: Path, seed: int) -> dict[str, Any]:
    """One run of train.py in this process, on the same files as MDS."""
    from vitcomposer.train import main as train_main

    local, runs = work / "mds", work / "runs"
    if not (local / "val" / "index.json").exists():
        command = [sys.executable, "-m", "vitcomposer", "convert", "folder", str(images), str(local)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    changes = [f"{key}={value}" for key, value in {**OURS, "data.local": local, "seed": seed}.items()]
    name = f"seed{seed}"
    shutil.rmtree(runs / name, ignore_errors=True)
    began = time.process_time()
    if train_main([str(ROOT / "yamls/deit_ti.yaml"), *changes, f"run.folder={runs}", f"run.name={name}"]):
        raise SystemExit(f"seed {seed} did not finish")
    cpu = time.process_time() - began
    summary = json.loads((runs / name / "summary.json").read_text())
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    found = {"seed": seed, "top1": summary["top1"], "lr": rates, "steps": summary["steps"]}
    # The share of the run's wall time that training took, of the CPU time of this process since its imports.
    return {**found, "cpu_of_an_epoch": round(cpu * summary["train_seconds"] / summary["seconds"] / EPOCHS, 3)}


def run_arm(arm: str, data: Path, work: Path, seeds: list[int]) -> None:
    """Every seed that has no result yet, here; one file each, so that an interrupted comparison goes on."""
    images = take_subset(data, work)
    for seed in seeds:
        file = work / f"{arm}-{seed}.json"
        if not file.exists():
            found = train_timm(images, seed) if arm == "timm" else train_ours(images, work, seed)
            file.write_text(json.dumps(found) + "\n")


def take_turns(data: Path, work: Path, seeds: list[int]) -> None:
    """Both arms, seed by seed, each run in a process of its own, whose CPU seconds and memory join its result."""
    for seed in seeds:
        for arm in ("timm", "ours"):
            file = work / f"{arm}-{seed}.json"
            if file.exists():
                continue
            words = [arm, "--data", str(data), "--work", str(work), "--seeds", str(seed)]
            with (work / f"{arm}-{seed}.txt").open("w") as printed:
                command = [sys.executable, "-m", "benchmarks.accuracy.against_timm", *words]
                process = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=printed)
                _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{arm}, seed {seed}: exit {process.returncode}, see {printed.name}")
            cost = {"cpu": round(usage.ru_utime + usage.ru_stime, 1), "peak_memory": usage.ru_maxrss * 1024}
            found = json.loads(file.read_text()) | cost
            file.write_text(json.dumps(found) + "\n")
            print(f"{arm}, seed {seed}: {100 * found['top1']:.2f} in {found['cpu']} CPU s", flush=True)


def report(work: Path, out: Path) -> None:
    """Write the results of the seeds that are there."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for arm in ("ours", "timm"):
        arms[arm] = [json.loads(path.read_text()) for path in sorted(work.glob(f"{arm}-*.json"))]
    rates = [arms[arm][0].pop("lr") for arm in arms]
    difference = max(abs(a - b) for a, b in zip(*rates, strict=True))
    for run in (run for runs in arms.values() for run in runs):
        run.pop("lr", None)
    page = {
        "arms": {arm: {**spread([run["top1"] for run in runs]), "runs": runs} for arm, runs in arms.items()},
        "largest_difference_of_learning_rates": difference,
        "overrides_of_deit_ti": {key: str(value) for key, value in OURS.items()},
        "cpu": cpu_name(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "timm", "mosaicml")},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "against_timm.json").write_text(json.dumps(page, indent=1) + "\n")
    for arm, found in page["arms"].items():
        costs = {key: statistics.mean(run[key] for run in found["runs"]) for key in ("cpu", "cpu_of_an_epoch")}
        memory = max(run["peak_memory"] for run in found["runs"]) / 1e6
        print(
            f"{arm}: {100 * found['mean']:.2f} +- {100 * found['stdev']:.2f} (n={len(found['runs'])}), "
            f"{costs['cpu']:.1f} CPU s, {costs['cpu_of_an_epoch']:.2f} an epoch, {memory:,.0f} MB"
        )


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "stdev": statistics.stdev(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=("both", "timm", "ours", "report"))
    parser.add_argument("--data", type=Path, help="folder of train/CLASS/*.jpg and val/CLASS/*.jpg")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench/against_timm")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.arm == "report":
        report(args.work, args.out)
    elif args.data is None:
        parser.error("--data must be a folder of train/CLASS/*.jpg and val/CLASS/*.jpg")
    elif args.arm == "both":
        take_turns(args.data, args.work, args.seeds)
    else:
        run_arm(args.arm, args.data, args.work, args.seeds)


if __name__ == "__main__":
    main()
