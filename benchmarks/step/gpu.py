"""What one GPU gives: training steps against timm's, curriculum stages, batches, multi-crop, attention, optimizers.

    python -m benchmarks.step.gpu                       # under 9 minutes, benchmarks/results/gpu_<device>.*
    python -m benchmarks.step.gpu --sections training   # the rest of an earlier result stays
    python -m benchmarks.step.gpu --device cpu --quick  # whether the code runs, in tiny; nothing is written

Data are synthetic and stay on the device. Every section has a share of the time and is written as soon as it ends; what
no longer fits is left out and named. `vitcomposer plan` reads the MFU from here, or of `--measured FILE`.

Beside an image with PyTorch 2.11, Python 3.12 and a compiler it needs timm>=1.0.31, numba with llvmlite, and
schedulefree; where nothing can be fetched, take their wheels along. The sections swav and trainer need Composer,
Streaming and OmegaConf too, and are left out where those are not installed.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.step import gpu_parts, gpu_runs, gpu_steps
from benchmarks.step.gpu_steps import Rows, Scale

# Seconds of each; 480 in all leave a minute for imports, numba's compilation and rows that take longer than the first.
SECTIONS: dict[str, tuple[int, Callable[[Scale], Iterator[Rows]]]] = {
    "training": (190, gpu_steps.training),
    "attention": (20, gpu_parts.attention),
    "stages": (60, gpu_steps.stages),
    "swav": (35, gpu_runs.swav),
    "trainer": (50, gpu_runs.trainer),
    "augmentation": (15, gpu_parts.augmentation),
    "time_out": (20, gpu_runs.time_out),
    "multi_crop": (30, gpu_steps.multi_crop),
    "batches": (40, gpu_steps.batches),
    "optimizers": (20, gpu_parts.optimizers),
}

ONE_ROW = ("swav", "time_out")  # sections that end with their first, whatever it took


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = _parse(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda must name a GPU that PyTorch sees, and it sees none. Use --device cpu --quick.")
    if device.type == "cpu" and not args.quick:
        sys.exit("--device cpu measures nothing that anyone needs. Add --quick to see whether the code runs.")
    scale = gpu_steps.tiny_scale(device) if args.quick else gpu_steps.full_scale()
    name = gpu_steps.device_name(device)
    path = args.out / f"gpu_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.json"
    report = _start(path, name, smoke=args.quick)
    write = args.write or not args.quick
    for section in args.sections:
        budget, rows_of = SECTIONS[section]
        print(f"{section}:", flush=True)
        report["sections"][section] = []
        report["left_out"].pop(section, None)
        for rows in _within(rows_of(scale), budget, section, report):
            report["sections"][section] += rows
            for row in rows:
                print("  " + _line(row), flush=True)
        if write:
            _save(report, path)
    return report


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether the code runs")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="write with --quick too")
    return parser.parse_args(argv)


def _within(rows: Iterator[Rows], budget: float, section: str, report: dict[str, Any]) -> Iterator[Rows]:
    """The rows that come within ``budget`` seconds; none is begun that, as long as the longest, would end later."""
    began, longest = time.perf_counter(), 0.0
    while True:
        start = time.perf_counter()
        if longest and start - began + longest > budget:
            report["left_out"][section] = f"anything after {start - began:.0f} of {budget} s"
            print(f"  left out {report['left_out'][section]}", flush=True)
            return
        try:
            found = next(rows)
        except StopIteration:
            return
        except (RuntimeError, ImportError, AttributeError, TypeError, ValueError) as error:
            # A machine that is lent for minutes: a section that fails must not take the others along.
            report["left_out"][section] = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"  failed: {report['left_out'][section]}", flush=True)
            if report["smoke"]:
                raise
            return
        longest = max(longest, time.perf_counter() - start)
        yield found
        if section in ONE_ROW:
            return


def _start(path: Path, name: str, *, smoke: bool) -> dict[str, Any]:
    """What an earlier call found on this device, or nothing, with the facts of this one."""
    old = json.loads(path.read_text()) if path.is_file() and not smoke else {"sections": {}, "left_out": {}}
    return {
        "device": name,
        "smoke": smoke,
        "date": date.today().isoformat(),
        "git_commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--short").splitlines(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in ("torch", "timm", "triton", "numpy", "numba")},
        "sections": old["sections"],
        "left_out": old["left_out"],
    }


def _git(*command: str) -> str:
    try:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(row: dict[str, Any]) -> str:
    hidden = ("family", "width", "images_per_sec_rounds")
    return ", ".join(f"{key} {_figure(value)}" for key, value in row.items() if key not in hidden and value is not None)


def _figure(value: Any) -> str:
    if not isinstance(value, float | int):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if value < 1e6 else f"{value:.4g}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _save(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report as tables, a section each."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    smoke = " **Smoke test at tiny sizes: no figure means anything.**" if report["smoke"] else ""
    lines = [
        f"# Training steps on one {report['device']}",
        "",
        f"{report['date']}, commit {report['git_commit'][:9] or 'unknown'}; Python {report['python']}, {versions}. "
        "bf16 autocast, compiled (`model`: the whole forward pass; `block`: one block for all), AdamW fused, synthetic "
        "images on the device. Rates are medians over rounds in turn; MFU counts training FLOPs as three times the "
        f"forward pass; memory is the peak of one candidate.{smoke}",
    ]
    for section, rows in report["sections"].items():
        if rows:
            lines += ["", f"## {section.replace('_', ' ').capitalize()}", "", *_table(rows)]
        if section in report["left_out"]:
            lines += ["", f"Left out: {report['left_out'][section]}."]
    return "\n".join([*lines, ""])


def _table(rows: Rows) -> list[str]:
    units = {
        "train_flops_per_image": ("GFLOP an image", 1e9),
        "peak_memory_bytes": ("peak GB", 1e9),
        "seconds": ("ms", 1e-3),
        "first_steps_seconds": ("first 3 steps, s", 1),
        "mfu": ("MFU, %", 0.01),
    }
    keys = list(
        dict.fromkeys(key for row in rows for key in row if key not in ("images_per_sec_rounds", "family", "width"))
    )
    heads = [units.get(key, (key.replace("_", " "), 1))[0] for key in keys]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = [row.get(key) for key in keys]
        shown = [
            "-" if cell is None else _figure(cell / units[key][1] if key in units else cell)
            for key, cell in zip(keys, cells, strict=True)
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


if __name__ == "__main__":
    main()
