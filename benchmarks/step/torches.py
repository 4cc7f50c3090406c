"""One training step under several versions of torch in turn: eager, compiled, attention, Muon; CPU seconds, one thread.

    python -m benchmarks.step.torches --python .venv-torch-2.7/bin/python --python .venv/bin/python \\
        --out benchmarks/results/torches.json

Each round starts every interpreter once, another one first each time, and only figures of one round are compared. The
compiler runs in the first round alone, on a small network, with an empty cache. Every interpreter needs torch,
torchvision and timm; our own packages are those of the checkout. ``--measure`` is what each of them runs.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import ROOT
from benchmarks.provenance import commit, cpu_name
from benchmarks.step.plain_loop import CLASSES, MODELS, PIXELS, TrainingStep, classify, random_batch, seconds_of, spread
from vitcomposer.models import build_model

CPU = torch.device("cpu")
timm_optim: Any = timm.optim  # it does not declare what it exports
STEPS = 2  # after one to warm up; the faster counts, since nothing but other work on the machine makes one slower
SMALL: dict[str, Any] = {"depth": 4}  # of ViT-Ti: what is compiled
PARTS = {
    "vit_s": "ViT-S, eager",
    "vit_s without sdpa": "ViT-S, eager, attention as softmax(QK^T)V",
    "convit_ti": "ConViT-Ti, eager",
    "small": "ViT-Ti of 4 blocks, eager",
    "compile start": "the same, torch.compile: its first step, compiler included",
    "small compiled": "the same, compiled: further steps",
    "timm muon": "timm's Muon, a step on the matrices of 2 blocks of ViT-S",
    "torch muon": "torch.optim.Muon, the same",
}


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0) -> Tensor:
    """(B, h, N, K) as F.scaled_dot_product_attention, with the matrix (B, h, N, N) in memory."""
    assert dropout_p == 0
    return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1) @ value


def fastest(step: Callable[[], Any], steps: int = STEPS) -> float:
    seconds_of(step, CPU)
    return min(seconds_of(step, CPU) for _ in range(steps))


def training_step(name: str, batch: int, *, compiled: bool = False, **options: Any) -> TrainingStep:
    torch.manual_seed(0)
    model = build_model(MODELS[name][0], num_classes=CLASSES, image_size=PIXELS, **options)
    return TrainingStep(model, *random_batch(batch, CPU), classify, device=CPU, compiled=compiled)


def cpu_seconds_with_children() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measure_compiler(batch: int) -> dict[str, float]:
    """A small network; the C++ compiler is a child of this process."""
    eager = fastest(training_step("vit_ti", batch, **SMALL))
    step = training_step("vit_ti", batch, compiled=True, **SMALL)
    before = cpu_seconds_with_children()
    step()
    start = cpu_seconds_with_children() - before
    return {"small": eager, "compile start": start, "small compiled": fastest(step)}


def matrices() -> list[nn.Parameter]:
    """Weights of the linear layers of two blocks of ViT-S, with a gradient."""
    torch.manual_seed(0)
    model = build_model(MODELS["vit_s"][0], num_classes=CLASSES, image_size=PIXELS, depth=2)
    found = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    for parameter in found:
        parameter.grad = torch.randn_like(parameter)
    return found


def measure_muon() -> dict[str, float]:
    """Both with Jordan's coefficients and scale of the learning rate; ``muon difference`` compares what they change."""
    makers: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "timm muon": lambda weights: timm_optim.Muon(
            weights, lr=0.02, weight_decay=0.0, nesterov=True, ns_coefficients="original", adjust_lr_fn="original"
        )
    }
    if hasattr(torch.optim, "Muon"):
        makers["torch muon"] = lambda weights: torch.optim.Muon(weights, lr=0.02, weight_decay=0.0)  # pyright: ignore[reportAttributeAccessIssue]
    found, moved = {}, {}
    for name, make in makers.items():
        weights = matrices()
        before = [weight.detach().clone() for weight in weights]
        optimizer = make(weights)
        found[name] = fastest(optimizer.step)
        moved[name] = torch.cat([(w.detach() - b).flatten() for w, b in zip(weights, before, strict=True)])
    if len(moved) == 2:
        ours, theirs = moved.values()
        found["muon difference"] = float((ours - theirs).norm() / ours.norm())
    return found


def measure(batch: int, *, compiled: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    parts: dict[str, float] = {name: fastest(training_step(name, batch)) for name in ("vit_s", "convit_ti")}
    with mock.patch.object(F, "scaled_dot_product_attention", explicit_attention):
        parts["vit_s without sdpa"] = fastest(training_step("vit_s", batch))
    parts |= measure_muon()
    if compiled:
        parts |= measure_compiler(batch)
    return {"torch": torch.__version__, "seconds": parts}


def ask(python: str, batch: int, *, compiled: bool) -> dict[str, Any]:
    """What another interpreter measures, with an empty cache of compiled code and a compiler that works in turn."""
    command = [python, "-m", "benchmarks.step.torches", "--measure", "--batch", str(batch)]
    command += [] if compiled else ["--no-compile"]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, **threads, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = list(dict.fromkeys(row["torch"] for row in report["rounds"][0]))
    first = versions[0]
    lines = [f"# A training step by version of torch, {report['machine']}, one thread", ""]
    lines += [
        f"CPU seconds at batch {report['batch']}, {PIXELS} px, float32: medians of {len(report['rounds'])} rounds, "
        f"each with a process for every version, in turn; the compiler in the first round alone, with an empty cache. "
        f"The ratio is that of one round: seconds with {first} over those with the other, so above 1 is faster. "
        f"Made by `python -m benchmarks.step.torches` at {report['commit']}. {report['note']}".rstrip(),
        "",
        f"| what | {' | '.join(versions)} | {' | '.join(f'times as fast as {first}' for _ in versions[1:])} |",
        "|-" * (2 * len(versions)) + "|",
    ]
    for part, what in PARTS.items():
        values = {version: seconds_by_round(report, version, part) for version in versions}
        measured = {version: [s for s in values[version] if s is not None] for version in versions}
        if any(measured.values()):
            cells = [f"{statistics.median(found):.3f}" if found else "has none" for found in measured.values()]
            cells += [ratio(values[first], values[version]) for version in versions[1:]]
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(within(report, version) for version in versions)]) + "\n"


def seconds_by_round(report: dict[str, Any], version: str, part: str) -> list[float | None]:
    rows = [next(row for row in rows if row["torch"] == version) for rows in report["rounds"]]
    return [row["seconds"].get(part) for row in rows]


def ratio(slow: Sequence[float | None], fast: Sequence[float | None]) -> str:
    """Median, smallest and largest of the rounds that have both."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True) if a is not None and b is not None]
    if len(ratios) < 2:
        return "-" if not ratios else f"{ratios[0]:.2f}"
    found = spread(ratios)
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def within(report: dict[str, Any], version: str) -> str:
    """What is compared within one version."""
    of = {part: seconds_by_round(report, version, part) for part in (*PARTS, "muon difference")}
    said = [f"fused attention makes a step {ratio(of['vit_s without sdpa'], of['vit_s'])} times as fast"]
    if any(of["small compiled"]):
        said.append(f"the compiler {ratio(of['small'], of['small compiled'])} times")
    if any(of["torch muon"]):
        difference = max(value for value in of["muon difference"] if value is not None)
        said.append(f"torch's Muon is {ratio(of['timm muon'], of['torch muon'])} times as fast as timm's")
        said.append(f"whose change of the weights it has within {difference:.1e} of its norm")
    return f"- {version}: {', '.join(said)}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.step.torches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", default=[], help="an interpreter; once for each version of torch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--measure", action="store_true", help="this interpreter alone, as a line of JSON")
    parser.add_argument("--note", default="", help="a sentence for the head of the table, such as what else ran")
    parser.add_argument("--out", type=Path, help="JSON; a Markdown table is written beside it")
    args = parser.parse_args(arguments)
    if args.measure:
        print(json.dumps(measure(args.batch, compiled=not args.no_compile)))
        return
    pythons = args.python or [sys.executable]
    report: dict[str, Any] = {"machine": cpu_name(), "commit": commit(), "batch": args.batch, "note": args.note}
    report["rounds"] = []
    for number in range(args.rounds):
        first = number % len(pythons)
        turns = [*range(first, len(pythons)), *range(first)]
        compiled = number == 0 and not args.no_compile
        rows = {at: ask(pythons[at], args.batch, compiled=compiled) for at in turns}
        report["rounds"].append([rows[at] for at in range(len(pythons))])
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
        if args.out:  # a run that is broken off leaves what it has
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
