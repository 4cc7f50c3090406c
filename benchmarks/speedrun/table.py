"""The tables of ``README.md``, from the entries on disk."""

import json
from pathlib import Path

from benchmarks.speedrun import entry
from benchmarks.speedrun.tracks import FOLDER, TRACKS, Track

PAGE = FOLDER / "README.md"
_MARK = "<!-- From here on written by `python -m benchmarks.speedrun table`. -->\n"
_COLUMNS = (
    "| {clock}, mean | entry | top-1, mean of seeds | p | weights | machine | commit, date |\n"
    "|---|---|---|---|---|---|---|\n"
)


def write_table(page: Path = PAGE) -> None:
    rules, mark, _ = page.read_text().partition(_MARK)
    page.write_text(rules + (mark or _MARK) + "".join(_section(track) for track in TRACKS.values()))


def _section(track: Track) -> str:
    entries = [path.parent for path in track.entries.glob(f"*/{entry.RESULT}")]
    judged = sorted(((entry.check(folder), folder) for folder in entries), key=lambda pair: pair[0].seconds)
    rows = "".join(_row(verdict, folder) for verdict, folder in judged)
    table = _COLUMNS.format(clock=track.clock) + rows if rows else "No entry yet: not run.\n"
    return f"\n## {track.title}: `{track.name}`\n\nData: `{track.command}`. Hardware: {track.hardware}.\n\n{table}"


def _row(verdict: entry.Verdict, folder: Path) -> str:
    found = json.loads((folder / entry.RESULT).read_text())
    machine, where = found["machine"], folder.relative_to(FOLDER).as_posix()
    cells = (
        f"{_number(verdict.seconds)}" if not verdict.faults else f"({_number(verdict.seconds)}, does not count)",
        f"[{folder.name}]({where}/{entry.RECIPE}), [logs]({where}/logs)",
        f"{100 * verdict.mean:.2f} +- {100 * verdict.deviation:.2f} (n={len(found['runs'])})",
        f"{verdict.p:.1g}",
        found["weights"],
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f}",
        f"{found['commit']}, {found['date']}",
    )
    return "| " + " | ".join(cells) + " |\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
