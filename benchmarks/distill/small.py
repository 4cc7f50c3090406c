"""A small student with and without a teacher on small real data: recipe ``distill`` against ``supervised``.

    python -m benchmarks.distill.small digits --work .bench/distill
    python -m benchmarks.distill.small fashion --data FOLDER --work .bench/distill
    python -m benchmarks.distill.small cifar10 --data FOLDER --work .bench/distill

A convolutional network, which DeiT found to teach best (Table 2), is trained by ``supervised`` on the training split.
It then teaches a student that sees images of the same split as the student that learns alone: same network, steps,
optimizer and seeds. kind, alpha and temperature are those of DeiT and of yamls/deit_s_distilled_cached.yaml.
``digits`` are a fifth of the 1,797 images that scikit-learn carries, with as many held out; the teacher runs beside
the student. ``fashion`` is Fashion-MNIST (arXiv:1708.07747) as ``vitcomposer convert torchvision FashionMNIST FOLDER``
writes it, of which ``vitcomposer convert subset`` takes 4,000 training images; ``cifar10`` are 10,000 of CIFAR-10, by
``vitcomposer convert torchvision CIFAR10 FOLDER``. The teacher's answers to both are stored.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.provenance import commit, cpu_name

YAML = ROOT / "yamls/demo.yaml"
SEEDS = (0, 1, 2)

RUN = {
    "run.progress_bar": False,
    "run.eval_interval": "1dur",
    "run.save_interval": "1dur",
    "run.keep_checkpoints": 1,
    "data.num_workers": 0,
    "algorithms": "{GradientClipping: {clipping_type: norm, clipping_threshold: 1.0}}",
}
DATA: dict[str, dict[str, Any]] = {
    "digits": {"data.train_split": "train_359"},
    "fashion": {
        "data.train_split": "train_4000",
        "model.image_size": 28,
        "evaluation.global_batch_size": 250,
        "augment.flip_prob": 0.5,
        "mixing.mixup_alpha": 0.2,
        "mixing.prob": 1.0,
        "optimizer.lr": 1.5e-3,
    },
    "cifar10": {
        "data.train_split": "train_10000",
        "model.image_size": 24,
        "evaluation.global_batch_size": 250,
        "augment.crop_scale": "[0.5, 1.0]",
        "augment.flip_prob": 0.5,
        "mixing.mixup_alpha": 0.2,
        "mixing.prob": 0.5,
        "optimizer.lr": 1.5e-3,
    },
}
NOTHING_ELSE = ("patch_size", "embed_dim", "depth", "num_heads", "pool", "class_token", "position_embedding")
CONVNET = {"model.name": "resnet18", "model.image_size": 32, **{f"model.{key}": "null" for key in NOTHING_ELSE}}
TEACHER = {
    "digits": {"max_duration": "60ep", "schedule.t_warmup": "6ep", "optimizer.lr": 1e-3, **CONVNET},
    "fashion": {
        "max_duration": "12ep",
        "schedule.t_warmup": "1ep",
        "optimizer.lr": 1e-3,
        "mixing.prob": 0.0,
        "run.save_interval": "2ep",
        **CONVNET,
    },
}
TEACHER["cifar10"] = {**TEACHER["fashion"], "max_duration": "15ep", "global_train_batch_size": 64}
# A distilled DeiT: two tokens, two heads, of which evaluation takes the mean.
STUDENT = {
    "model.name": "deit_tiny_distilled_patch16",
    "model.pool": "token",
    "model.class_token": True,
    "model.position_embedding": "sincos",
    "model.embed_dim": 32,
    "model.depth": 2,
    "model.num_heads": 2,
}
STEPS = {
    "digits": {"max_duration": "100ep", "schedule.t_warmup": "10ep"},
    "fashion": {"max_duration": "8ep", "schedule.t_warmup": "1ep", "model.embed_dim": 64, "model.depth": 4},
    "cifar10": {
        "max_duration": "10ep",
        "schedule.t_warmup": "1ep",
        "model.embed_dim": 96,
        "model.depth": 4,
        "model.num_heads": 3,
        "global_train_batch_size": 64,
    },
}
SOFT = {
    "distillation.kl": "batch",
    "distillation.kind": "soft",
    "distillation.alpha": 0.5,
    "distillation.temperature": 1.0,
    "distillation.teacher_sees": "unmixed",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "soft, alpha 0.5, temperature 1": SOFT,
}
CROP_SETS = 4  # of stored answers, all ten logits of each


def train(name: str, recipe: str, overrides: Mapping[str, Any], runs: Path) -> dict[str, Any]:
    """One run of train.py in this process; its summary."""
    from vitcomposer.train import main as train_main

    folder = runs / name
    if not is_finished(folder):
        shutil.rmtree(folder, ignore_errors=True)
        page = write_page(recipe, runs)
        changes = [f"{key}={value}" for key, value in overrides.items()]
        if train_main([str(page), *changes, f"run.name={name}", f"run.folder={runs}"]):
            raise SystemExit(f"{name} did not finish")
    return json.loads((folder / "summary.json").read_text())


def write_page(recipe: str, runs: Path) -> Path:
    runs.mkdir(parents=True, exist_ok=True)
    page = runs / f"{recipe}.yaml"
    page.write_text(YAML.read_text().replace("recipe: supervised", f"recipe: {recipe}"))
    return page


def store_answers(overrides: Mapping[str, Any], runs: Path) -> Path:
    """The folder of the teacher's answers, written once."""
    out = runs.with_name(f"{runs.name}-answers")
    changes = [f"{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "vitcomposer", "cache-teacher", str(write_page("distill", runs)), *changes]
    subprocess.run([*command, "--crop-sets", str(CROP_SETS), "--top-k", "all", "--out", out], check=True, cwd=ROOT)
    return out


def is_finished(folder: Path) -> bool:
    summary = folder / "summary.json"
    return summary.exists() and json.loads(summary.read_text())["finished"]


def taught_by(weights: Path) -> dict[str, Any]:
    """What a student's run says about its teacher."""
    stats = {"teacher.mean": "[0.3, 0.3, 0.3]", "teacher.std": "[0.35, 0.35, 0.35]", "teacher.weights": weights}
    return {**stats, "teacher.name": CONVNET["model.name"], "teacher.image_size": CONVNET["model.image_size"]}


def convert(*arguments: str) -> None:
    command = [sys.executable, "-m", "vitcomposer", "convert", *arguments]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def images(folder: Path, split: str) -> int:
    index = json.loads((folder / split / "index.json").read_text())
    return sum(shard["samples"] for shard in index["shards"])


def prepare(data: str, local: Path) -> None:
    """Write what of the data set is missing."""
    split = DATA[data]["data.train_split"]
    if data == "digits" and not (local / "train" / "index.json").exists():
        convert("digits", str(local))
    if not (local / split / "index.json").exists():
        share = int(split.removeprefix("train_")) / images(local, "train")
        convert("subset", str(local), split, "--fraction", str(share), "--seed", "0")


def measure(data: str, local: Path, runs: Path) -> dict[str, Any]:
    """The teacher, and every variant of the student with every seed."""
    shared = {**RUN, **DATA[data], "data.local": local}
    teacher = train("teacher", "supervised", {**shared, **TEACHER[data], "seed": 100}, runs)
    lessons = taught_by(runs / "teacher/checkpoints/latest-rank0.pt")
    if data != "digits":
        lessons["cache.local"] = store_answers({**shared, **STUDENT, **STEPS[data], **SOFT, **lessons}, runs)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in SEEDS:
        for name, more in VARIANTS.items():
            run = f"{name.split(',')[0]}-{seed}"
            overrides = {**shared, **STUDENT, **STEPS[data], **more, **(lessons if more else {}), "seed": seed}
            found[name].append(train(run, "distill" if more else "supervised", overrides, runs))
    split = DATA[data]["data.train_split"]
    return {
        "train_images": images(local, split),
        "val_images": images(local, "val"),
        "teacher": {key: teacher[key] for key in ("top1", "train_flops", "epochs", "seed")},
        "teacher_overrides": {key: str(value) for key, value in TEACHER[data].items()},
        "shared_overrides": {key: str(value) for key, value in {**RUN, **DATA[data]}.items()},
        "student_overrides": {key: str(value) for key, value in {**STUDENT, **STEPS[data]}.items()},
        "variant_overrides": {name: {key: str(v) for key, v in more.items()} for name, more in VARIANTS.items()},
        "variants": {name: row(summaries, found["alone"]) for name, summaries in found.items()},
    }


def row(summaries: list[dict[str, Any]], alone: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over the seeds, and the difference to the student alone of the same seed."""
    tops = [summary["top1"] for summary in summaries]
    gains = [a["top1"] - b["top1"] for a, b in zip(summaries, alone, strict=True)]
    return {
        "top1": {"mean": statistics.mean(tops), "stdev": statistics.stdev(tops), "seeds": tops},
        "gain": {"mean": statistics.mean(gains), "seeds": gains},
        "train_flops": summaries[0]["train_flops"],
        "steps": summaries[0]["steps"],
        "seconds": [round(summary["seconds"], 1) for summary in summaries],
    }


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# A small student with and without a teacher",
        "",
        "`python -m benchmarks.distill.small digits`, `fashion` and `cifar10`: yamls/demo.yaml with the overrides in "
        "the JSON beside this file. The students are the same network with two heads, on the same split and for as "
        "many steps; alone, both heads learn from the labels. The teacher, a ResNet-18, is trained on that split too. "
        "Top-1 in percent of the held-out split, raw weights of the last step; +- is the standard deviation of three "
        "seeds.",
    ]
    for data, found in report["data"].items():
        teacher = found["teacher"]
        lines += [
            "",
            f"**{data}**: {found['train_images']:,} training images, {found['val_images']:,} held out; teacher "
            f"{100 * teacher['top1']:.2f} after {teacher['epochs']:g} epochs.",
            "",
            "| student | top-1 | seeds | gain over alone, by seed | training GFLOP |",
            "|---|---|---|---|---|",
        ]
        for name, variant in found["variants"].items():
            top, gain = variant["top1"], variant["gain"]
            seeds = ", ".join(f"{100 * value:.2f}" for value in top["seeds"])
            gains = ", ".join(f"{100 * value:+.2f}" for value in gain["seeds"]) if name != "alone" else "-"
            lines.append(
                f"| {name} | {100 * top['mean']:.2f} +- {100 * top['stdev']:.2f} | {seeds} | {gains} "
                f"| {variant['train_flops'] / 1e9:,.0f} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=sorted(DATA))
    parser.add_argument("--data", dest="local", type=Path, help="folder of the MDS splits train and val")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench/distill")
    args = parser.parse_args()
    torch.set_num_threads(1)
    local = args.local or args.work / args.data
    prepare(args.data, local)
    stem = args.out / "distill_small"
    report: dict[str, Any] = {"data": {}}
    if stem.with_suffix(".json").exists():
        report = json.loads(stem.with_suffix(".json").read_text())
    report["data"][args.data] = measure(args.data, local, args.work / f"{args.data}-runs")
    report["data"][args.data] |= {
        "cpu": cpu_name(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "mosaicml", "mosaicml-streaming")},
    }
    report["data"] = dict(sorted(report["data"].items()))
    args.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
