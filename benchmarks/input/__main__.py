"""Images per CPU second of vitcomposer's input path and of every peer that installs, in turns on one core.

    python -m benchmarks.input                       single crops of 224 px from files like ImageNet's
    python -m benchmarks.input --set s256            the same from files with a shorter side of 256
    python -m benchmarks.input --multicrop           SwAV's 2x160 + 4x96 and 2x224 + 6x96
    python -m benchmarks.input --small              views of 96 and 128 px, from the whole image and from image_small
    python -m benchmarks.input --only ours-seekable dali --rounds 9

Needs Linux. The first call makes a photo set from the sample pictures of installed packages, installs each peer in an
environment of its own (benchmarks/input/peers) and writes the photos in each peer's form, all in the folder --work;
FFCV builds only where apt-get installed libopencv-dev, libturbojpeg0-dev and pkg-config. A peer that cannot be
installed becomes a row that says why. CPU time is that of all processes and threads of a candidate. Results are a JSON
file with every round's numbers, a table and a picture in the folder --out.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.input.candidates import BASELINES, CANDIDATES, Candidate, Group
from benchmarks.input.environments import Workshop, stored_bytes
from benchmarks.input.photos import SETS, build_photos
from benchmarks.input.report import write_report
from benchmarks.input.turns import CandidateError, Process, Turn, run_rounds, summarise
from benchmarks.provenance import cpu_name

_SINGLE: dict[Group, str] = {
    "crop": "RandomResizedCrop 224, flip, batches of 64",
    "augment": "The same with RandAugment or 3-Augment",
    "worker": "The same with one DataLoader worker on the same core",
}
_MULTICROP: dict[Group, str] = {
    "multicrop-160": "2 x 160 + 4 x 96 pixels",
    "multicrop-224": "2 x 224 + 6 x 96 pixels",
}


_SMALL: dict[Group, str] = {
    "small-96": "RandomResizedCrop 96, flip, batches of 64",
    "small-128": "RandomResizedCrop 128, flip, batches of 64",
    "small-224": "RandomResizedCrop 224, flip, batches of 64, for scale",
}


def main() -> None:
    args = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no candidate stays behind
    groups = _MULTICROP if args.multicrop else _SMALL if args.small else _SINGLE
    chosen = _choose(args.only, groups)
    photo_count, images, turn_seconds = (64, 64, 0.0) if args.quick else (960, 128 if args.multicrop else 256, 0.5)
    work = args.work.resolve()
    photos = work / f"{args.set}-{photo_count}" / "photos"
    workshop = Workshop(work, install=args.install)
    print(f"photos: {photo_count} of set {args.set}", file=sys.stderr)
    statistics = build_photos(photos, args.set, photo_count)
    report = {
        "title": f"{'Multi-crop' if args.multicrop else 'Small-view' if args.small else 'Single-crop'} input, CPU",
        "date": datetime.date.today().isoformat(),
        "git_commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain").splitlines(),
        "hardware": _hardware(),
        "python": platform.python_version(),
        "photos": {"set": SETS[args.set], **statistics},
        "groups": groups,
        "rounds": args.rounds,
        "candidates": {},
    }
    rows, starts = _prepare(chosen, workshop, photos, photo_count)
    turns = run_rounds(starts, rounds=args.rounds, images=images, turn_seconds=turn_seconds)
    report["candidates"] = _fill(rows, chosen, *turns)
    if not args.multicrop and not args.small:
        report["quality"] = _quality(photos, photo_count // 3)
    kind = "multicrop_" if args.multicrop else "small_" if args.small else ""
    name = f"input_{kind}{args.set}"
    print(write_report(report, args.out, name))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.input", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(CANDIDATES)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench", help="folder that keeps photos and environments")
    parser.add_argument("--rounds", type=int, default=9, help="turns that count (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"candidates, beside the baseline: {names}")
    parser.add_argument("--set", choices=SETS, default="full", help="photo set (default: %(default)s)")
    parser.add_argument("--multicrop", action="store_true", help="SwAV's crops instead of single ones")
    parser.add_argument("--small", action="store_true", help="views of a curriculum's first stages")
    parser.add_argument("--no-install", dest="install", action="store_false", help="use peers that are there already")
    parser.add_argument("--quick", action="store_true", help="few photos and images: to see that it works")
    return parser.parse_args()


def _choose(only: list[str] | None, groups: dict[Group, str]) -> dict[str, Candidate]:
    found = {name: candidate for name, candidate in CANDIDATES.items() if candidate.group in groups}
    unknown = set(only or ()) - set(found)
    if unknown:
        sys.exit(f"--only must be of {', '.join(found)}, got {', '.join(sorted(unknown))}.")
    if only is None:
        return found
    needed = {BASELINES[found[name].group] for name in only}
    return {name: candidate for name, candidate in found.items() if name in needed or name in only}


def _prepare(
    chosen: dict[str, Candidate], workshop: Workshop, photos: Path, photo_count: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Callable[[int], Process]]]:
    """A row for each candidate, and for those that have all they need how to start them on a core."""
    rows: dict[str, dict[str, Any]] = {}
    starts: dict[str, Callable[[int], Process]] = {}
    for name, candidate in chosen.items():
        rows[name] = {key: getattr(candidate, key) for key in ("label", "group", "ours", "remarks")}
        rows[name]["baseline"] = name == BASELINES[candidate.group]
        try:
            python, store = workshop.python(candidate.peer), workshop.store(candidate.store, photos)
        except CandidateError as error:
            rows[name]["failure"] = str(error)
            continue
        rows[name]["stored_bytes"] = stored_bytes(store, photo_count)
        job = {"module": candidate.module, "store": str(store), "options": candidate.options}
        starts[name] = partial(Process, python, job, workshop.logs / f"{name}.log")
    return rows, starts


def _fill(
    rows: dict[str, dict[str, Any]],
    chosen: dict[str, Candidate],
    turns: dict[str, list[Turn]],
    firsts: dict[str, dict[str, Any]],
    failures: dict[str, str],
) -> dict[str, dict[str, Any]]:
    for name, first in firsts.items():
        rows[name].update(first)
    for name, failure in failures.items():
        rows[name]["failure"] = failure
    for name, own in turns.items():
        baseline = BASELINES[chosen[name].group]
        if baseline not in turns:
            sys.exit(f"The baseline {baseline} could not be measured: {rows[baseline]['failure']}")
        rows[name].update(summarise(own, turns[baseline]))
    return rows


def _quality(photos: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.input.quality", photos, str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _hardware() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.system(),
    }


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
