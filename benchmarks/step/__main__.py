"""One training step against timm's model in the same plain loop, in turn: images per second and peak memory.

    python -m benchmarks.step --out benchmarks/results/step_cpu.json
    python -m benchmarks.step --models convit_ti,convit_s --batch 4 8 32 --trained 100 --out step_convit_cpu.json
    python -m benchmarks.step --models convit_s,vit_b --batch 128 --device cuda --compile --out step_gpu.json

A step is forward, backward and fused AdamW on images that stay where they are. On a CPU: float32, one thread, CPU time;
on a GPU: bf16 autocast, time between CUDA events. Candidates take turns in every round, and only ratios inside a round
are compared. Also stochastic depth on a subset of the samples against a factor per sample, and Composer's Trainer
against the bare loop (``--trainer``).
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from benchmarks import ROOT
from benchmarks.provenance import commit
from benchmarks.step.plain_loop import (
    CLASSES,
    MODELS,
    PIXELS,
    Step,
    TrainingStep,
    classify,
    compare,
    peak_bytes,
    random_batch,
    seconds_of,
    take_turns,
)
from vitcomposer.models import build_model, layers
from vitcomposer.models.cpu_linear import speed_up_linears

SWAV = "swav"  # DeiT-S; its two sides are in swav.py
DROP_MODEL, DROP_RATE = "vit_small_patch16", 0.4
FIRST_BATCH = 4  # images of the steps before the first that is measured
RULE_RATES, RULE_BATCH = (0.05, 0.1, 0.2, 0.3, 0.4), 20

Measure = Callable[[], dict[str, Any]]


def against_timm(name: str) -> dict[str, nn.Module]:
    """Our network and timm's of one name."""
    ours, theirs = MODELS[name]
    return {
        "timm": timm.create_model(theirs, num_classes=CLASSES),
        "vitcomposer": build_model(ours, num_classes=CLASSES, image_size=PIXELS),
    }


def measure_model(
    name: str, batch: int, trained: int, rounds: int, device: torch.device, compiled: bool
) -> dict[str, Any]:
    """Steps of both sides in turn, after ``trained`` steps of a few images: the first weights may be slow ones.

    timm's ConViT holds denormal numbers in its positional softmax at the start, which a CPU multiplies slowly.
    """
    torch.manual_seed(0)
    data, loss = random_batch(batch, device), classify
    if name == SWAV:
        # Our task is a ComposerModel, and Composer takes 6 seconds to import.
        from benchmarks.step.swav import both_sides, loss_itself

        sides, loss = both_sides(batch, device), loss_itself
    else:
        sides = against_timm(name)
    if device.type == "cpu":
        speed_up_linears(sides["vitcomposer"])  # as a run does
    for model in sides.values() if trained else ():
        first = TrainingStep(model, *random_batch(FIRST_BATCH, device), loss, device=device, compiled=False)
        for _ in range(trained):
            first()
    steps = {who: TrainingStep(model, *data, loss, device=device, compiled=compiled) for who, model in sides.items()}
    row = compare(take_turns(dict(steps), rounds, device), "timm", "vitcomposer", batch)
    return {"model": name, "batch": batch, **row, "peak_bytes": {w: peak_bytes(s, device) for w, s in steps.items()}}


def with_subset(step: Step, above: float) -> Step:
    """``step`` with stochastic depth on a subset of the samples above the rate ``above``."""

    def run() -> None:
        before, layers.SUBSET_ABOVE = layers.SUBSET_ABOVE, above
        try:
            step()
        finally:
            layers.SUBSET_ABOVE = before

    return run


def measure_drop_path(batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """A whole step of ViT-S at the drop path rate 0.4 in every block."""
    torch.manual_seed(0)
    options = {"drop_path_rate": DROP_RATE, "drop_path_mode": "constant"}
    model = build_model(DROP_MODEL, num_classes=CLASSES, image_size=PIXELS, **options)
    step = TrainingStep(model, *random_batch(batch, device), classify, device=device, compiled=False)
    candidates = {"factor": with_subset(step, 1.0), "subset": with_subset(step, 0.0)}
    row = compare(take_turns(candidates, rounds, device), "factor", "subset", batch)
    return {"model": DROP_MODEL, "rate": DROP_RATE, "batch": batch, **row}


def measure_rule(rate: float, rounds: int, device: torch.device) -> dict[str, Any]:
    """One block of ViT-S, forward and backward: whether a subset of the samples pays at a rate."""
    x = torch.randn(RULE_BATCH, 197, 384, device=device)
    attention = layers.SelfAttention(384, 6, qkv_bias=True)
    block = layers.Block(attention, 384, 1536, drop_path_rate=rate).to(device)

    def step() -> None:
        block(x).sum().backward()

    candidates = {"factor": with_subset(step, 1.0), "subset": with_subset(step, 0.0)}
    row = compare(take_turns(candidates, rounds, device), "factor", "subset", RULE_BATCH)
    return {"rate": rate, "batch": RULE_BATCH, **row}


def measure_trainer(batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Steps of the Trainer of a recipe, without loader, against the bare loop over an equal model and batch."""
    # Composer takes 6 seconds to import.
    from benchmarks.step.trainer import TrainerSteps

    torch.manual_seed(0)
    images, labels = random_batch(batch, device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TrainerSteps(ROOT / "yamls" / "deit_s.yaml", "vit_tiny_patch16", images, labels, Path(folder))
        model = build_model("vit_tiny_patch16", num_classes=CLASSES, image_size=PIXELS)
        if device.type == "cpu":
            speed_up_linears(model)
        bare = TrainingStep(model, images, trainer.targets, trainer.loss, device=device, compiled=False)
        bare()
        seconds: dict[str, list[float]] = {"trainer": [], "bare loop": []}
        for _ in range(rounds):
            seconds["trainer"].append(statistics.median(trainer.run(3)))
            seconds["bare loop"].append(statistics.median(seconds_of(bare, device) for _ in range(2)))
        trainer.close()
    row = compare(seconds, "trainer", "bare loop", batch)
    return {"model": "vit_ti", "batch": batch, **row, "overhead": {k: v - 1 for k, v in row["ratio"].items()}}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    kind = "bf16" if report["device"] == "cuda" else "float32, one thread, CPU time"
    title = f"Training steps on {report['machine']}, {PIXELS} px, {kind}"
    lines = [f"# {title}", "", f"Medians of {report['rounds']} rounds, smallest to largest in brackets; "]
    lines[-1] += f"{'compiled' if report['compile'] else 'eager'} on both sides. Made by `python -m benchmarks.step`."
    if report.get("trained"):
        lines += [
            "",
            f"Both sides were trained for {report['trained']} steps of {FIRST_BATCH} images before the first round.",
        ]
    if report["models"]:
        lines += ["", "| model | batch | timm images/s | vitcomposer images/s | ratio | peak memory |", "|-|-|-|-|-|-|"]
    for row in report["models"]:
        speed = {who: f"{value['median']:.2f}" for who, value in row["images_per_second"].items()}
        memory = " / ".join(f"{row['peak_bytes'][who] / 2**20:,.0f}" for who in ("timm", "vitcomposer"))
        lines.append(
            f"| {row['model']} | {row['batch']} | {speed['timm']} | {speed['vitcomposer']} | {_ratio(row)} | "
            f"{memory} MiB |"
        )
    rows = [("whole step of ViT-S", row) for row in report["drop_path"]] + [
        ("one block", row) for row in report["rule"]
    ]
    if rows:
        lines += ["", "Stochastic depth on a subset of the samples against a factor per sample:"]
        lines += ["", "| what | rate | batch | times faster |", "|-|-|-|-|"]
        lines += [f"| {what} | {row['rate']} | {row['batch']} | {_ratio(row)} |" for what, row in rows]
    for row in report["trainer"]:
        low, middle, high = (f"{100 * row['overhead'][key]:+.1f} %" for key in ("min", "median", "max"))
        lines += ["", f"Composer's Trainer against the bare loop, {row['model']}, batch {row['batch']}: "]
        lines[-1] += f"{middle} time per step ({low} to {high}, {len(row['seconds']['trainer'])} rounds)."
    return "\n".join(lines) + "\n"


def _ratio(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", default=",".join([*MODELS, SWAV]), help=f"of {', '.join([*MODELS, SWAV])}; empty for none"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--trained", type=int, default=0, metavar="STEPS", help="of either side before the first round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--drop-path", action="store_true", help="subset of the samples against a factor per sample")
    parser.add_argument("--trainer", action="store_true", help="Composer's Trainer against the bare loop")
    parser.add_argument("--trainer-batch", type=int, default=32)
    parser.add_argument("--out", type=Path, help="JSON; a Markdown table is written beside it")
    args = parser.parse_args(arguments)
    names = [name for name in args.models.split(",") if name]
    if unknown := sorted(set(names) - {*MODELS, SWAV}):
        parser.error(f"--models must be of {', '.join([*MODELS, SWAV])}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    device = torch.device(args.device)
    report: dict[str, Any] = {
        "device": args.device,
        "rounds": args.rounds,
        "trained": args.trained,
        "compile": args.compile,
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else f"one {platform.machine()} core",
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit(),
        "versions": {name: version(name) for name in ("torch", "timm", "mosaicml")},
        **{part: [] for part in ("models", "drop_path", "rule", "trainer")},
    }
    for part, measure in planned(args, names, device):
        report[part].append(measure())
        print(f"{part}: {_ratio(report[part][-1])}", flush=True)
        if args.out:  # a run that is broken off leaves what it has
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(table(report))
    print(table(report))


def planned(args: argparse.Namespace, names: list[str], device: torch.device) -> Iterator[tuple[str, Measure]]:
    """Parts of the report and what measures a row of each, in order."""
    for name in names:
        for batch in args.batch:
            yield "models", partial(measure_model, name, batch, args.trained, args.rounds, device, args.compile)
    if args.drop_path:
        yield "drop_path", partial(measure_drop_path, max(10, *args.batch), args.rounds, device)
        for rate in RULE_RATES:
            yield "rule", partial(measure_rule, rate, args.rounds, device)
    if args.trainer:
        yield "trainer", partial(measure_trainer, args.trainer_batch, args.rounds, device)


if __name__ == "__main__":
    main()
