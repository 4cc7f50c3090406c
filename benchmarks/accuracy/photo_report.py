"""Tables and plots of what ``benchmarks.accuracy.photos`` measured."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.accuracy.photo_tables import TABLES

Run = dict[str, Any]
HEAD = (
    "| | top-1, mean of seeds | seeds | averaged weights | training TFLOP | times fewer | CPU seconds | times fewer "
    "| MB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def write_report(report: dict[str, Any], out: Path) -> None:
    """``photos.json``, ``photos.md`` and one picture a table in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "photos.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (out / "photos.md").write_text(text)
    for name, rows in report["tables"].items():
        if TABLES[name].drawn:
            draw(TABLES[name].title, rows, out / f"photos_{name}.png")
    print(text)


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Recipes on small colour photographs",
        "",
        f"`python -m benchmarks.accuracy.photos`: {report['cpu']}, one thread a run, float32, torch "
        f"{report['versions']['torch']}. Top-1 in percent of all held-out images, weights of the last step; +- is the "
        "standard deviation over the seeds. TFLOP and CPU seconds are those of the whole run, imports and evaluation "
        "in the seconds, and of the run before it where it starts from one; times fewer is against the first row, seed "
        "by seed. MB is the largest memory of the process. Keys of each row: the JSON beside this file.",
    ]
    for name, rows in report["tables"].items():
        table = TABLES[name]
        lines += ["", f"## {table.title}", "", table.text, "", HEAD]
        base = rows.get(table.baseline, [])
        lines += [_row(row, runs, base) for row, runs in rows.items()]
    return "\n".join([*lines, ""])


def _row(name: str, runs: list[Run], base: list[Run]) -> str:
    cells = [name, spread(run["top1"] for run in runs), _each(run["top1"] for run in runs)]
    cells += [spread(run["top1_ema"] for run in runs) if runs[0]["top1_ema"] is not None else "-"]
    cells += [f"{runs[0]['train_flops'] / 1e12:,.2f}", _ratio("train_flops", runs, base)]
    cells += [f"{statistics.mean(run['cpu'] for run in runs):,.0f}", _ratio("cpu", runs, base)]
    cells += [f"{max(run['peak_memory'] for run in runs) / 1e6:,.0f}"]
    return f"| {' | '.join(cells)} |"


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation in percent."""
    found = [100 * value for value in values]
    mean = f"{statistics.mean(found):.2f}"
    return f"{mean} +- {statistics.stdev(found):.2f}" if len(found) > 1 else mean


def _each(values: Iterable[float]) -> str:
    return ", ".join(f"{100 * value:.2f}" for value in values)


def _ratio(key: str, runs: list[Run], base: list[Run]) -> str:
    """How many times the baseline's of the same seeds, on average."""
    of_seed = {run["seed"]: run[key] for run in base}
    ratios = [of_seed[run["seed"]] / run[key] for run in runs if run["seed"] in of_seed]
    return f"{statistics.mean(ratios):.2f}" if ratios else "-"


def draw(title: str, rows: dict[str, list[Run]], path: Path) -> None:
    """Accuracy over CPU seconds and over FLOPs, a point for each row, with the range of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    for axes, key, unit, label in zip(
        panels, ("cpu", "train_flops"), (1.0, 1e12), ("CPU seconds of a run", "training TFLOP"), strict=True
    ):
        for number, (name, runs) in enumerate(rows.items()):
            tops = [100 * max(run["top1"], run["top1_ema"] or 0.0) for run in runs]
            x, y = statistics.mean(run[key] for run in runs) / unit, statistics.mean(tops)
            colour = "#475569" if number == 0 else "#c2410c"
            axes.errorbar(x, y, yerr=[[y - min(tops)], [max(tops) - y]], fmt="o", color=colour, capsize=3, alpha=0.8)
            axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axes.set(xlabel=label, title=title if key == "cpu" else None)
        axes.margins(x=0.25, y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1, %: mean and range of the seeds")
    figure.savefig(path, dpi=130)
    plt.close(figure)
