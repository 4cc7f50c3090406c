"""The results of the input benchmark as JSON, as a table in Markdown and as a picture."""

import json
from pathlib import Path
from typing import Any

_OURS, _PEER, _BASELINE = "#c2410c", "#94a3b8", "#475569"
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # keeps the baseline out of the text


def write_report(report: dict[str, Any], out: Path, name: str) -> str:
    """Write ``name``.json, .md and .png (one for each group that has a baseline) and return the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = _markdown(report)
    (out / f"{name}.md").write_text(text)
    _draw(report, out / f"{name}.png")
    return text


def _markdown(report: dict[str, Any]) -> str:
    photos, machine = report["photos"], report["hardware"]
    lines = [
        f"# {report['title']}",
        "",
        f"{photos['files']} photos ({photos['set']}): mean {photos['mean_bytes'] / 1000:.1f} KB, "
        f"{photos['mean_width']:.0f} x {photos['mean_height']:.0f} px, {photos['mean_pixels'] / 1e6:.3f} Mpx, "
        f"{photos['bits_per_pixel']:.2f} bit/px. One core of: {machine['cpu']}. Medians over {report['rounds']} "
        "rounds, smallest and largest in brackets; the ratio is to the baseline inside the same round. "
        "What comes out as float32 is normalised, as uint8 it is left to the device.",
    ]
    for title, rows in _sections(report):
        lines += ["", f"## {title}", "", *_table(rows)]
    if report.get("quality"):
        lines += ["", "## Pixels against Pillow's full decode and bicubic resize, same boxes", ""]
        lines += ["| | PSNR mean / 5th percentile, dB | largest difference |", "|---|---|---|"]
        for row, found in report["quality"].items():
            psnr = f"{found['psnr_mean']:.1f} / {found['psnr_p5']:.1f}"
            lines.append(f"| {_emphasis(row, row == 'vitcomposer')} | {psnr} | {found['largest_difference']} |")
    return "\n".join([*lines, ""])


def _sections(report: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows by group, fastest first, what could not be measured last."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["candidates"].values():
        groups.setdefault(row["group"], []).append(row)
    return [
        (title, sorted(groups[group], key=lambda row: -_ratio(row)))
        for group, title in report["groups"].items()
        if group in groups
    ]


def _ratio(row: dict[str, Any]) -> float:
    return row["ratio"]["median"] if "ratio" in row else -1.0


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| | images per CPU second | ratio | images/s, wall | out | bytes stored | remarks |", "|" + "---|" * 7]
    for row in rows:
        label = _emphasis(_name(row), row["ours"])
        if "ratio" not in row:
            lines.append(f"| {label} | - | - | - | - | - | {row['failure']} |")
            continue
        speed, ratio = row["images_per_cpu_second"], row["ratio"]
        cells = [
            label,
            f"{speed['median']:.0f} [{speed['min']:.0f}-{speed['max']:.0f}]",
            f"{ratio['median']:.2f} [{ratio['min']:.2f}-{ratio['max']:.2f}]",
            f"{row['images_per_second']['median']:.0f}",
            row["dtype"],
            f"{row['stored_bytes'] / 1000:.0f} KB",
            row["remarks"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _name(row: dict[str, Any]) -> str:
    return f"{row['label']} (baseline)" if row["baseline"] else row["label"]


def _emphasis(text: str, on: bool) -> str:
    return f"**{text}**" if on else text


def _draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sections = [(title, [row for row in rows if "ratio" in row][::-1]) for title, rows in _sections(report)]
    sections = [(title, rows) for title, rows in sections if rows]
    heights = [len(rows) + 1.2 for _, rows in sections]
    figure, axes = plt.subplots(
        len(sections), 1, figsize=(10, 0.34 * sum(heights) + 1.2), height_ratios=heights, squeeze=False, sharex=True
    )
    for axis, (title, rows) in zip(axes[:, 0], sections, strict=True):
        _draw_section(axis, title, rows)
    axes[-1, 0].set_xlabel("images per CPU second, as a multiple of the baseline (median, smallest, largest)")
    photos = report["photos"]
    subtitle = f"one core of {report['hardware']['cpu']}; {photos['mean_bytes'] / 1000:.0f} KB an image on average"
    figure.suptitle(f"{report['title']}\n{subtitle}", fontsize=11, x=0.02, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_section(axis: Any, title: str, rows: list[dict[str, Any]]) -> None:
    ratios = [row["ratio"] for row in rows]
    medians = [ratio["median"] for ratio in ratios]
    whiskers = [[r["median"] - r["min"] for r in ratios], [r["max"] - r["median"] for r in ratios]]
    axis.barh(
        range(len(rows)),
        medians,
        xerr=whiskers,
        color=[_OURS if row["ours"] else _PEER for row in rows],
        error_kw={"ecolor": "#1e293b", "elinewidth": 1, "capsize": 2},
    )
    axis.axvline(1, color=_BASELINE, linewidth=1, linestyle="--")
    axis.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=8)
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["ours"] else "normal")
    for at, row in enumerate(rows):
        speed = f"{row['ratio']['median']:.2f}x   {row['images_per_cpu_second']['median']:.0f}/s"
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axis.annotate(speed, (row["ratio"]["max"], at), fontsize=8, bbox=_WHITE, **place)
    axis.set_title(title, fontsize=9, loc="left")
    axis.margins(x=0.14)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)
