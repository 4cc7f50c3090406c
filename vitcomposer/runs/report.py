"""Draws the metrics of a run as pictures and one self-contained report.html."""

import base64
import html
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from vitcomposer.runs import layout
from vitcomposer.runs.metrics import read_object, split_metrics
from vitcomposer.whole_files import whole_file, write_whole

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d1600a", "#2c7d3f", "#6e6e6e"
KNN_COLORS = (ORANGE, BLUE, GREEN, "#8a4fa3", "#b3913a", GREY)
SMOOTHED_POINTS = 100  # the smoothed loss is a mean over 1/100 of the run

GATES_PER_ROW = 5
DRAWN = {
    "loss/train/total",
    "metrics/eval/loss",
    "metrics/eval/top1",
    "metrics/ema/top1",
    "throughput/images_per_sec",
    "throughput/data_wait_fraction",
}
_FAMILY = re.compile(r"_[^/]*$")  # top1_<head>, top5_k<k>: one picture

ROWS = (
    ("recipe", "Recipe", "{}"),
    ("model", "Model", "{}"),
    ("finished", "Finished", "{}"),
    ("top1", "Top-1", "{:.2%}"),
    ("top5", "Top-5", "{:.2%}"),
    ("top1_ema", "Top-1 of the averaged weights (EMA)", "{:.2%}"),
    ("top5_ema", "Top-5 of the averaged weights (EMA)", "{:.2%}"),
    ("loss", "Evaluation loss", "{:.4f}"),
    ("knn", "k-NN top-1", "knn"),
    ("epochs", "Epochs", "{:,g}"),
    ("steps", "Steps", "{:,}"),
    ("images_seen", "Images seen", "{:,}"),
    ("seconds", "Wall clock", "duration"),
    ("images_per_sec", "Training speed, images/s", "{:,.0f}"),
    ("data_wait_fraction", "Training time spent waiting for data", "{:.1%}"),
    ("train_flops", "Training FLOPs", "{:.3g}"),
    ("mfu", "Model FLOPs utilisation", "{:.1%}"),
    ("peak_memory_bytes", "Peak device memory, GiB", "gib"),
    ("lr_peak", "Peak learning rate", "{:.3g}"),
    ("device", "Device", "{}"),
    ("world_size", "Devices", "{}"),
    ("seed", "Seed", "{}"),
    ("git_commit", "Commit", "{}"),
)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.2rem; margin-top: 2rem; }}
img {{ width: 100%; }}
table {{ border-collapse: collapse; }}
th {{ text-align: left; font-weight: normal; color: #555; padding: .2rem 2rem .2rem 0; }}
td {{ font-variant-numeric: tabular-nums; }}
tr {{ border-bottom: 1px solid #e4e4e4; }}
pre {{ background: #f6f6f4; padding: 1rem; overflow-x: auto; font-size: .85rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{sections}
</body>
</html>
"""


def write_report(run_folder: str | Path) -> Path:
    """Write the pictures of a run and ``report.html`` into its folder and return the latter.

    ``curves.png`` is always there, ``attention.png`` where attention was measured (``run.attention_interval``), and
    ``more.png`` where the run logged anything that neither of them shows.

    Raises:
        ValueError: The folder has no ``metrics.jsonl``.
    """
    folder = Path(run_folder)
    path = folder / layout.METRICS
    if not path.is_file():
        raise ValueError(
            f"run_folder must be the folder of a run, with a metrics.jsonl, got {folder}. "
            "Give the folder that holds config.yaml."
        )
    lines, bad = split_metrics(path.read_bytes())
    if bad:
        print(f"{path}: {len(bad)} of its lines cannot be read and are left out of the report.")
    # Less than an epoch is better told in steps.
    x = "epoch" if lines and (lines[-1].get("epoch") or 0) >= 1 else "step"
    pictures = {
        layout.CURVES: _draw(lines, x),
        layout.ATTENTION: _draw_attention(lines, x),
        layout.MORE: _draw_more(lines, x),
    }
    for name, figure in pictures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # of an older report
        else:
            with whole_file(folder / name) as partial:
                figure.savefig(partial)
    report = folder / layout.REPORT
    write_whole(report, _page(folder))
    return report


def has_report(run_folder: str | Path) -> bool:
    """Whether the report of a finished run is there, later than its last number, or cannot be made."""
    folder = Path(run_folder)
    metrics, report = folder / layout.METRICS, folder / layout.REPORT
    if not metrics.is_file():
        return True
    is_whole = report.is_file() and (folder / layout.CURVES).is_file()
    return is_whole and report.stat().st_mtime_ns >= metrics.stat().st_mtime_ns


def _draw(lines: list[dict[str, Any]], x: str) -> Figure:
    """The four pictures of a run, 1200 x 800 pixels."""
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    loss, top1, lr, speed = figure.subplots(2, 2, sharex=True).flat
    _draw_loss(loss, lines, x)
    _draw_top1(top1, lines, x)
    _draw_series(lr, lines, x, "lr", color=BLUE)
    lr.set(title="Learning rate (largest group)", ylabel="learning rate")
    lr.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", scilimits=(-2, 2))
    _draw_speed(speed, lines, x)
    for axes in (loss, top1, lr, speed):
        _style(axes)
    for axes in (lr, speed):
        _name_x(axes, x)
    return figure


def _style(axes: Axes) -> None:
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name_x(axes: Axes, x: str) -> None:
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(integer=x == "step", nbins="auto"))


def _draw_loss(axes: Axes, lines: list[dict[str, Any]], x: str) -> None:
    axes.set(title="Loss", ylabel="loss per image")
    xs, ys = _series(lines, x, "loss/train/total")
    if xs:
        smooth = _smooth(ys)
        label = "training" if smooth == ys else "training (smoothed)"
        axes.plot(xs, ys, color=BLUE, alpha=0.25, linewidth=1)
        axes.plot(xs, smooth, color=BLUE, linewidth=1.8, label=label, marker="o" if len(xs) == 1 else "")
    _draw_series(axes, lines, x, "metrics/eval/loss", color=ORANGE, label="evaluation", marker="o")
    _end(axes)


def _draw_top1(axes: Axes, lines: list[dict[str, Any]], x: str) -> None:
    axes.set(title="Evaluation top-1", ylabel="top-1 (%)")
    _draw_series(axes, lines, x, "metrics/eval/top1", color=ORANGE, label="weights", marker="o", scale=100)
    _draw_series(axes, lines, x, "metrics/ema/top1", color=GREEN, label="averaged weights (EMA)", marker="s", scale=100)
    neighbours = _numbered(lines, r"knn/top1_k(\d+)")
    if neighbours and not axes.lines:
        axes.set(title="k-NN top-1", ylabel="top-1 (%)")
    for (key, (k,)), color in zip(neighbours.items(), itertools.cycle(KNN_COLORS)):
        _draw_series(axes, lines, x, key, color=color, label=f"k-NN, k = {k}", marker="o", scale=100)
    _end(axes)


def _draw_speed(axes: Axes, lines: list[dict[str, Any]], x: str) -> None:
    axes.set(title="Training speed and waiting for data")
    _draw_series(axes, lines, x, "throughput/images_per_sec", color=BLUE)
    if not axes.lines:
        return _end(axes)
    axes.set_ylim(bottom=0, top=1.05 * axes.dataLim.y1)
    axes.set_ylabel("images/s", color=BLUE)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    wait = axes.twinx()
    _draw_series(wait, lines, x, "throughput/data_wait_fraction", color=ORANGE, scale=100)
    wait.set_ylim(0, 100)
    wait.set_ylabel("training time spent waiting for data (%)", color=ORANGE)
    wait.spines[["top"]].set_visible(False)


def _numbered(lines: list[dict[str, Any]], pattern: str) -> dict[str, tuple[int, ...]]:
    """The keys that match, with the numbers in them, in the order of those."""
    keys = {key for line in lines for key, value in line.items() if value is not None}
    matches = {key: match for key in keys if (match := re.fullmatch(pattern, key))}
    numbers = {key: tuple(int(group) for group in match.groups()) for key, match in matches.items()}
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def _draw_attention(lines: list[dict[str, Any]], x: str) -> Figure | None:
    """Non-locality and gates over training, as in arXiv:2103.10697, section 4; None where they were not measured."""
    distances = _numbered(lines, r"attention/nonlocality/layer(\d+)")
    if not distances:
        return None
    gates = _numbered(lines, r"attention/gate/layer(\d+)/head(\d+)")
    gated = sorted({layer for layer, _ in gates.values()})
    rows = -(-len(gated) // GATES_PER_ROW)
    figure = Figure(figsize=(12, 4.5 + 2.4 * rows), dpi=100, layout="constrained")
    above, *below = figure.subfigures(
        1 + bool(rows), 1, height_ratios=[4.5, 2.4 * rows] if rows else None, squeeze=False
    ).flat
    _draw_distances(above.subplots(), lines, x, distances)
    if below:
        _draw_gates(below[0], lines, x, gates)
    return figure


def _draw_distances(axes: Axes, lines: list[dict[str, Any]], x: str, distances: dict[str, tuple[int, ...]]) -> None:
    depth = max(layer for (layer,) in distances.values())
    axes.set(title="How far attention reaches", ylabel="mean distance (patches)")
    for key, (layer,) in distances.items():
        color = _shade(layer, depth)
        _draw_series(axes, lines, x, key, color=color, label=f"layer {layer}", marker="o")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=1 + (depth > 14))
    _style(axes)
    _name_x(axes, x)


def _draw_gates(figure: SubFigure, lines: list[dict[str, Any]], x: str, gates: dict[str, tuple[int, ...]]) -> None:
    """A small picture per layer with a line per head."""
    gated = sorted({layer for layer, _ in gates.values()})
    heads = max(head for _, head in gates.values())
    rows, columns = -(-len(gated) // GATES_PER_ROW), min(GATES_PER_ROW, len(gated))
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in panels[len(gated) :]:
        axes.set_visible(False)
    figure.suptitle("Gate of each head: share of positional attention")
    for axes, layer in zip(panels, gated, strict=False):
        axes.set_title(f"layer {layer}", fontsize="medium")
        for key, (of, head) in gates.items():
            if of == layer:
                _draw_series(axes, lines, x, key, color=_shade(head, heads))
        axes.set_ylim(0, 1)
        _style(axes)
        if layer in gated[-columns:]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel(x)


def _shade(index: int, count: int) -> tuple[float, float, float, float]:
    """Of 1 .. count, from dark to light."""
    return colormaps["viridis"](0.92 * (index - 1) / max(1, count - 1))


def _draw_more(lines: list[dict[str, Any]], x: str) -> Figure | None:
    """A small picture for each number that was logged and is drawn nowhere else; None where there is none."""
    keys = sorted({key for line in lines for key, value in line.items() if value is not None and _is_more(key)})
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_FAMILY.sub("", key), []).append(key)
    if not groups:
        return None
    rows = -(-len(groups) // 3)
    figure = Figure(figsize=(12, 2.8 * rows), dpi=100, layout="constrained")
    panels = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    for axes, (family, members) in zip(panels, groups.items(), strict=False):
        axes.set_title(family if len(members) > 1 else members[0], fontsize="medium")
        for index, key in enumerate(members, start=1):
            _draw_series(
                axes, lines, x, key, color=_shade(index, len(members)), label=key[len(family) + 1 :], marker="o"
            )
        if 1 < len(members) <= 6:
            axes.legend(frameon=False, fontsize="small")
        _style(axes)
        _name_x(axes, x)
    return figure


def _is_more(key: str) -> bool:
    return "/" in key and key not in DRAWN and not key.startswith(("attention/", "knn/top1", "trainer/"))


def _draw_series(
    axes: Axes,
    lines: list[dict[str, Any]],
    x: str,
    key: str,
    *,
    color: str | tuple[float, ...],
    label: str | None = None,
    marker: str = "",
    scale: float = 1,
) -> None:
    xs, ys = _series(lines, x, key)
    if xs:
        # Markers help while points are few and hide the line when they are many.
        shape = "o" if len(xs) == 1 else marker if len(xs) <= 30 else ""
        width = 1.8 if len(xs) <= 1000 else 1.2
        axes.plot(xs, [y * scale for y in ys], color=color, label=label, marker=shape, markersize=4, linewidth=width)


def _end(axes: Axes) -> None:
    """Legend, or a word instead of an empty picture."""
    if axes.lines:
        axes.legend(frameon=False)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)


def _series(lines: list[dict[str, Any]], x: str, key: str) -> tuple[list[float], list[float]]:
    points = [(line[x], line[key]) for line in lines if line.get(key) is not None and line.get(x) is not None]
    return [p[0] for p in points], [p[1] for p in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window around each point; centred, because a running mean would lag behind a falling loss."""
    half = len(values) // (2 * SMOOTHED_POINTS)
    if half == 0:
        return list(values)
    sums = list(itertools.accumulate(values, initial=0.0))
    windows = ((max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def _page(folder: Path) -> str:
    summary = _read_json(folder / layout.SUMMARY)
    environment = _read_json(folder / layout.ENVIRONMENT)
    sections = [_picture(folder / layout.CURVES, "Loss, top-1, learning rate and speed over the run")]
    if summary is None:
        sections.append("<h2>Summary</h2><p>The run has not ended yet, or was cut off.</p>")
    else:
        rows = [(label, _format_any(summary.get(key), form)) for key, label, form in ROWS]
        cells = "\n".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
        sections.append(f"<h2>Summary</h2>\n<table>\n{cells}\n</table>")
    for name, title, alt in (
        (layout.ATTENTION, "Attention", "Non-locality of each layer and gates of each head over the run"),
        (layout.MORE, "More measurements", "Everything else that the run logged"),
    ):
        if (folder / name).is_file():
            sections.append(f"<h2>{title}</h2>\n{_picture(folder / name, alt)}")
    config = folder / layout.CONFIG
    texts = {
        "Configuration": config.read_text(errors="replace") if config.is_file() else None,
        "Environment": None if environment is None else json.dumps(environment, indent=2),
    }
    sections += [f"<h2>{name}</h2>\n<pre>{html.escape(text)}</pre>" for name, text in texts.items() if text]
    return PAGE.format(title=html.escape(folder.resolve().name), sections="\n".join(sections))


def _picture(path: Path, alt: str) -> str:
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{alt}" src="data:image/png;base64,{image}"></p>'


def _read_json(path: Path) -> dict[str, Any] | None:
    found = read_object(path)
    if found is None and path.is_file():
        print(f"{path} cannot be read and is left out of the report.")
    return found


def _format_any(value: Any, form: str) -> str:
    try:
        return _format(value, form)
    except (ValueError, TypeError, AttributeError, OverflowError):  # not what a run writes
        return str(value)


def _format(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if form == "duration":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60} h {minutes % 60:02} min {seconds:02} s"
    if form == "knn":
        found = sorted(
            (int(key.removeprefix("top1_k")), top1) for key, top1 in value.items() if key.startswith("top1_k")
        )
        return ", ".join(f"{top1:.2%} (k = {k})" for k, top1 in found)
    if form == "gib":
        return f"{value / 2**30:.2f}"
    return form.format(value)
