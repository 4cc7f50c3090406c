"""What a teacher costs a student's step: asked beside it, or read from a cache; and what ten logits of many lose.

    OMP_NUM_THREADS=1 python -m benchmarks.distill.step --out benchmarks/results/distill_step.json

A step is forward, loss, backward and fused AdamW of the recipe's task on images in memory: float32, 224 pixels, one
thread, CPU time. Candidates take turns in every round, and only ratios inside a round are compared. The teacher has
random weights, which cost the same. Reading the cache is what the loader does beside the images, in its own worker.
"""

import argparse
import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks import ROOT
from benchmarks.provenance import commit
from benchmarks.step.plain_loop import (
    CLASSES,
    PIXELS,
    TrainingStep,
    classify,
    compare,
    random_batch,
    spread,
    take_turns,
)
from vitcomposer import config
from vitcomposer.data.augment.mixing import soft_targets
from vitcomposer.data.random import view_seed
from vitcomposer.losses import DistillationLoss, TeacherAnswers, soft_target_cross_entropy
from vitcomposer.models import build_model
from vitcomposer.schema import IMAGENET_MEAN, IMAGENET_STD
from vitcomposer.tasks import DistillationTask
from vitcomposer.teacher.cache import (
    MANIFEST,
    SPLIT,
    VERSION,
    WEIGHTS,
    CachedTeacher,
    conditions,
    open_cache,
    set_name,
    shard_name,
)
from vitcomposer.teacher.frozen import FrozenTeacher
from vitcomposer.teacher.rows import encode_rows, row_dtype
from vitcomposer.teacher.writer import highest

YAML = ROOT / "yamls" / "deit_s_distilled_cached.yaml"
STUDENT, TEACHER, TOP_K = "deit_small_distilled_patch16", "regnety_160", 10
SETS, SHARDS, SHARD_IMAGES = 3, 8, 16384  # an epoch of repeated augmentation reads three sets
READS = 50  # in a turn, for the clock
CPU = torch.device("cpu")


def measure_step(batch: int, rounds: int) -> dict[str, Any]:
    """A student's step with the answers in the batch against one that asks the teacher."""
    network = timm.create_model(TEACHER, num_classes=CLASSES)
    same = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "student_mean": IMAGENET_MEAN, "student_std": IMAGENET_STD}
    teacher = FrozenTeacher(network, image_size=PIXELS, precision="fp32", **same)
    images, labels = random_batch(batch, CPU)
    answers = highest(teacher(images), TOP_K)
    target = soft_targets(labels, CLASSES, 0.1)
    cached = {f"teacher_{name}": value for name, value in answers._asdict().items()}
    steps: dict[str, Any] = {
        "cached": student_step(images, labels, None, {"target": target, **cached}),
        "live": student_step(images, labels, teacher, {"target": target, "unmixed": images}),
    }
    return {"batch": batch, **compare(take_turns(steps, rounds, CPU), "live", "cached", batch)}


def student_step(images: Tensor, labels: Tensor, teacher: FrozenTeacher | None, batch: dict[str, Tensor]) -> Any:
    loss = soft_loss(alpha=0.5)
    student = build_model(STUDENT, num_classes=CLASSES, image_size=PIXELS)
    task = DistillationTask(student, loss=loss, num_classes=CLASSES, teacher=teacher, sees_unmixed=True)

    def of_batch(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return task.loss(model(images), batch)

    return TrainingStep(student, images, labels, of_batch, device=CPU, compiled=False)


def soft_loss(alpha: float, temperature: float = 1.0) -> DistillationLoss:
    return DistillationLoss(soft_target_cross_entropy, kind="soft", alpha=alpha, temperature=temperature, kl="batch")


def measure_reading(batch: int, rounds: int) -> dict[str, Any]:
    """Looking a batch of views up and checking them, against a step of DeiT-Ti on as many images."""
    with tempfile.TemporaryDirectory() as folder:
        cache, boxes = write_random_cache(Path(folder))
        rng = np.random.default_rng(0)
        network = build_model("deit_tiny_patch16", num_classes=CLASSES, image_size=PIXELS)
        step = TrainingStep(network, *random_batch(batch, CPU), classify, device=CPU, compiled=False)

        def read() -> None:
            ids = rng.integers(SHARDS * SHARD_IMAGES, size=batch).tolist()
            samples = [{"sample_id": at, "epoch": i, "copy": i % 3} for i, at in enumerate(ids)]
            flips = np.zeros(batch, np.bool_)
            for _ in range(READS):
                cache.columns(samples, [cache.seed(sample) for sample in samples], [boxes] * batch, flips)

        for _ in range(20):  # maps and checks the shards, once a run
            read()
        seconds = take_turns({"read": read, "step": step}, rounds, CPU)
    reads = [value / READS for value in seconds["read"]]
    shares = [read / step for read, step in zip(reads, seconds["step"], strict=True)]
    return {
        "batch": batch,
        "microseconds_per_image": spread([1e6 * value / batch for value in reads]),
        "share_of_step": spread(shares),
        "seconds": {"read": reads, "step": seconds["step"]},
    }


def write_random_cache(folder: Path) -> tuple[CachedTeacher, tuple[int, int, int, int]]:
    """A cache of random answers, and the box of all its views."""
    cfg = config.load(YAML, [f"cache.local={folder}", "precision=fp32"])
    rng, box, indexes = np.random.default_rng(0), (0, 0, 224, 224), []
    for crop_set in range(SETS):
        entries = []
        for number in range(SHARDS):
            rows = np.zeros(SHARD_IMAGES, row_dtype(TOP_K))
            rows["sample_id"] = number * SHARD_IMAGES + np.arange(SHARD_IMAGES)
            rows["view_seed"] = [view_seed(0, crop_set, at, 0) for at in rows["sample_id"]]
            rows["box"], rows["logits"] = box, rng.normal(size=(SHARD_IMAGES, TOP_K))
            data, entry = encode_rows(rows, shard_name(number))
            path = folder / set_name(crop_set) / shard_name(number)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            entries.append(entry)
        index = json.dumps({"version": 2, "shards": entries}).encode()
        (folder / set_name(crop_set) / "index.json").write_bytes(index)
        indexes.append(hashlib.sha256(index).hexdigest())
    made_from = {**conditions(cfg), SPLIT: "none", WEIGHTS: "none"}
    sizes = {"seed": 0, "top_k": TOP_K, "images": SHARDS * SHARD_IMAGES, "shard_images": SHARD_IMAGES}
    manifest = {"version": VERSION, **sizes, "made_from": made_from, "crop_sets": SETS, "indexes": indexes}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return open_cache(cfg), box


def measure_top_k(seed: int = 0) -> list[dict[str, Any]]:
    """Soft loss of the ten highest of 100 logits against that of all, on numbers of two handwritten digits.

    The teacher is a small network trained on them; the student another at several stages of learning from labels.
    """
    torch.manual_seed(seed)
    images, labels = two_digit_numbers(seed)
    teacher = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 100))
    train(teacher, images, labels, 400)
    student = nn.Sequential(nn.Linear(128, 32), nn.GELU(), nn.Linear(32, 100))
    test, _ = two_digit_numbers(seed + 1)
    with torch.no_grad():
        every = TeacherAnswers.of_logits(teacher(test))
    ten = highest(every, TOP_K)
    # Of the log-sum-exp of the logits that are not stored, in that of all.
    left = (ten.rest - every.logits.float().logsumexp(dim=1)).exp()
    found, done = [], 0
    for steps in (0, 50, 400):
        train(student, images, labels, steps - done)
        done = steps
        for temperature in (1.0, 3.0):
            loss = soft_loss(1.0, temperature)
            exact, logits = gradient(loss, student, test, every)
            short, other = gradient(loss, student, test, ten)
            found.append(
                {
                    "student_steps": steps,
                    "temperature": temperature,
                    "probability_not_stored": float(left.mean()),
                    "loss": exact,
                    "difference": short - exact,
                    "bound": bound(student, test, left) if temperature == 1 else None,
                    "gradient_difference": float((other - logits).norm() / logits.norm()),
                }
            )
    return found


def bound(student: nn.Module, images: Tensor, left: Tensor) -> float:
    """Of the difference at temperature 1: spreading a probability r evenly over m classes changes the teacher's entropy
    by at most ``r log m`` and the cross-entropy by at most r times the range of the student's log-probabilities.
    """
    with torch.no_grad():
        logits = student(images)
    span = logits.amax(dim=1) - logits.amin(dim=1)
    return float((left * (span + np.log(logits.shape[1] - TOP_K))).mean())


def gradient(
    loss: DistillationLoss, student: nn.Module, images: Tensor, answers: TeacherAnswers
) -> tuple[float, Tensor]:
    logits = student(images).detach().requires_grad_()
    value = loss(logits, torch.full_like(logits, 0.01), answers)
    (found,) = torch.autograd.grad(value, logits)
    return float(value), found


def two_digit_numbers(seed: int, count: int = 4000) -> tuple[Tensor, Tensor]:
    pixels, digits = (np.asarray(part) for part in load_digits(return_X_y=True))
    pairs = np.random.default_rng(seed).integers(len(digits), size=(count, 2))
    images = pixels[pairs].reshape(count, -1) / 16
    return torch.tensor(images, dtype=torch.float32), torch.tensor(digits[pairs] @ [10, 1])


def train(network: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (128,))
        nn.functional.cross_entropy(network(images[chosen]), labels[chosen], label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()


def table(report: dict[str, Any]) -> str:
    step, reading = report["step"], report["reading"]
    speed, ratio, share = step["images_per_second"], step["ratio"], reading["share_of_step"]
    lines = [
        f"# A teacher's answers from a cache, on {report['machine']}, float32, 224 px, one thread, CPU time",
        "",
        f"Medians of {report['rounds']} rounds, smallest to largest in brackets. "
        "Made by `python -m benchmarks.distill.step`.",
        "",
        f"Step of {STUDENT}, batch {step['batch']}: {speed['cached']['median']:.2f} images/s with cached answers, "
        f"{speed['live']['median']:.2f} with {TEACHER} beside it: **{ratio['median']:.2f} times faster** "
        f"({ratio['min']:.2f} to {ratio['max']:.2f}).",
        "",
        f"Reading and checking the answers: {reading['microseconds_per_image']['median']:.1f} us an image, "
        f"**{share['median']:.3%}** ({share['min']:.3%} to {share['max']:.3%}) of a step of deit_tiny_patch16.",
        "",
        f"The {TOP_K} highest logits instead of all 100, numbers of two handwritten digits, soft loss (`kl: batch`):",
        "",
        "| student's steps | temperature | teacher's probability not stored | loss | difference | bound | gradient |",
        "|-|-|-|-|-|-|-|",
    ]
    for row in report["top_k"]:
        limit = "-" if row["bound"] is None else f"{row['bound']:.4f}"
        lines.append(
            f"| {row['student_steps']} | {row['temperature']:g} | {row['probability_not_stored']:.4f} | "
            f"{row['loss']:.4f} | {row['difference']:+.4f} | {limit} | {row['gradient_difference']:.2%} |"
        )
    lines += [
        "",
        "bound: of the difference, from the probability not stored; gradient: relative difference in L2 norm.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="of the student's step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON; a Markdown table is written beside it")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.perf_counter()
    report: dict[str, Any] = {
        "machine": f"one {platform.machine()} core",
        "rounds": args.rounds,
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "timm", "mosaicml")},
        "top_k": measure_top_k(),
        "reading": measure_reading(16, args.rounds),
        "step": measure_step(args.batch, args.rounds),
    }
    report["seconds"] = time.perf_counter() - began
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
