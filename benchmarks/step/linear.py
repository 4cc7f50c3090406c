"""Products of linear layers by oneDNN and by PyTorch's own library, and whole steps with either, on one core.

    python -m benchmarks.step.linear --out benchmarks/results/linear_cpu.json

For each shape: the layer's output and both gradients, GFLOP/s, and the largest error against float64 as a share of the
largest value. For each network: images per CPU second of forward, backward and fused AdamW, the two in turn in every
round; only ratios inside a round are compared. float32, one thread.
"""

import argparse
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import commit, cpu_name
from benchmarks.step.plain_loop import CLASSES, TrainingStep, classify
from vitcomposer.models import build_model
from vitcomposer.models.cpu_linear import ONEDNN_IS_FASTER, linear, speed_up_linears
from vitcomposer.training.setup import keep_freed_memory

# Rows, inputs, outputs: MLPs of small networks on small images, ViT-Ti and ViT-S at 224 px, batch 8.
SHAPES = ((8192, 108, 432), (8192, 192, 768), (1576, 192, 768), (1576, 384, 1536), (1576, 1536, 384), (256, 384, 1000))
NETWORKS: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("vit_small_patch16", 224, 4, {}),
    ("vit_tiny_patch16", 224, 8, {}),
    ("convit_tiny", 224, 8, {}),
    ("convit_tiny", 32, 128, {"patch_size": 4, "embed_dim": 108, "depth": 6, "num_heads": 9, "local_up_to_layer": 5}),
    ("vit_tiny_patch16", 32, 128, {"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}),
)
SECONDS = 0.5  # of one measurement of a product


def measure_shape(rows: int, inputs: int, outputs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
    gradient = torch.randn(rows, outputs)
    exact = _all_three(F.linear, *(t.detach().double().requires_grad_() for t in (x, weight)), gradient.double())
    found: dict[str, Any] = {"rows": rows, "inputs": inputs, "outputs": outputs}
    for name, product in (("pytorch", F.linear), ("onednn", linear)):
        spent, count = time.process_time(), 0
        while time.process_time() - spent < SECONDS:
            results = _all_three(product, x, weight, gradient)
            count += 1
        rate = count * 6e-9 * rows * inputs * outputs / (time.process_time() - spent)
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, exact, strict=True)]
        found[name] = {"gflops": round(rate, 1), "error": max(errors)}
    return found


def _all_three(product: Any, x: Tensor, weight: Tensor, gradient: Tensor) -> list[Tensor]:
    out = product(x, weight)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), gradient)]


def measure_network(name: str, size: int, batch: int, options: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Steps of two equal networks in turn, of which one has fast products."""
    data = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    steps = {}
    for kind in ("pytorch", "onednn"):
        torch.manual_seed(0)
        model = build_model(name, num_classes=CLASSES, image_size=size, **options)
        if kind == "onednn":
            speed_up_linears(model)
        steps[kind] = TrainingStep(model, *data, classify, device=torch.device("cpu"), compiled=False)
        steps[kind]()
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(rounds):
        for kind, step in steps.items():
            spent = time.process_time()
            step()
            step()
            seconds[kind].append((time.process_time() - spent) / 2)
    ratios = [a / b for a, b in zip(seconds["pytorch"], seconds["onednn"], strict=True)]
    rates = {kind: round(batch / statistics.median(values), 2) for kind, values in seconds.items()}
    spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"network": name, "size": size, "batch": batch, "options": options, "images_per_cpu_second": rates} | {
        "ratio": spread
    }


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Linear layers on a CPU: oneDNN against PyTorch's own library",
        "",
        f"`python -m benchmarks.step.linear`: {report['cpu']}, one thread, float32, "
        f"torch {report['versions']['torch']}, commit {report['commit']}. A product's figures are GFLOP/s of "
        "output and both gradients; the error is the "
        "largest difference from float64 as a share of the largest value. Steps are forward, backward and AdamW, "
        f"the two in turn, {report['rounds']} rounds.",
        "",
        "| rows x inputs x outputs | PyTorch | oneDNN | times | error of PyTorch | of oneDNN |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["products"]:
        a, b = row["pytorch"], row["onednn"]
        lines.append(
            f"| {row['rows']} x {row['inputs']} x {row['outputs']} | {a['gflops']:.0f} | {b['gflops']:.0f} "
            f"| {b['gflops'] / a['gflops']:.2f} | {a['error']:.1e} | {b['error']:.1e} |"
        )
    lines += ["", "| network | pixels, batch | images per CPU second, PyTorch | oneDNN | times [min-max] |"]
    lines += ["|---|---|---|---|---|"]
    for row in report["networks"]:
        rates, ratio = row["images_per_cpu_second"], row["ratio"]
        options = ", ".join(f"{key} {value}" for key, value in row["options"].items())
        lines.append(
            f"| {row['network']}{': ' + options if options else ''} | {row['size']}, {row['batch']} "
            f"| {rates['pytorch']:,} | {rates['onednn']:,} "
            f"| {ratio['median']:.2f} [{ratio['min']:.2f}-{ratio['max']:.2f}] |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a table is written beside it")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run does
    if not ONEDNN_IS_FASTER:
        parser.exit(2, "error: on this processor PyTorch's own library multiplies, so there is nothing to compare\n")
    report = {
        "products": [measure_shape(*shape) for shape in SHAPES],
        "networks": [measure_network(*network, args.rounds) for network in NETWORKS],
        "rounds": args.rounds,
        "cpu": cpu_name(),
        "commit": commit(),
        "versions": {"torch": version("torch")},
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
