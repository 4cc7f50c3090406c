"""Damaged images, indexes and shards through every path that reads them.

``python -m benchmarks.faults.fuzz --out benchmarks/results --checked 1000`` writes fuzz.md there. Items run one after
the other in a process of their own, which a crash, a hang (``LIMIT`` seconds) or more memory than ``ROOM`` ends; the
next process goes on behind the item that did it. A path may give pixels or say what is wrong (ValueError; of a data set
ConfigError or ShardError); anything else counts as a crash.

``--checked`` also runs a part with numba's checks of every array index, which the compiled kernels are without.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.faults.items import DECODED, REFUSED, data_item, image_item, write_data
from benchmarks.faults.mutations import mutated_image

LIMIT = 90  # seconds an item may take: a data set waits up to 60 s for another run that starts on this machine
ROOM = 1 << 30  # bytes above what the process has before its first item


def free_shared_memory() -> None:
    """Streaming keeps that of a data set until its process ends, which has hundreds here."""
    import atexit

    from streaming.base.shared.memory import SharedMemory

    gc.collect()
    for block in [thing for thing in gc.get_objects() if type(thing) is SharedMemory]:
        atexit.unregister(block.cleanup)
        with contextlib.suppress(BufferError):  # still mapped by an array, which frees it later
            block.cleanup()


def child(kind: str, seed: int, first: int, end: int, root: Path) -> None:
    """Run items and write a line before and after each; the parent reads how far this came."""
    warnings.simplefilter("ignore")
    import logging

    import torch

    from vitcomposer.data.jpeg import decode as jpeg
    from vitcomposer.data.jpeg import seekable

    logging.disable()
    torch.set_num_threads(1)
    run = image_item if kind == "images" else lambda seed, number: data_item(seed, number, root)
    with open(root / f"{kind}.jsonl", "a", encoding="utf-8") as out:
        run(seed, first)  # imports; once more below, under the limits
        jpeg.warm_up(seekable=True)
        seekable.compile_kernels()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
        for number in range(first, end):
            out.write(json.dumps({"begins": number}) + "\n")
            out.flush()
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            began = time.perf_counter()
            found = run(seed, number)
            if kind == "data" and number % 10 == 0:
                free_shared_memory()
            took = time.perf_counter() - began
            faulthandler.cancel_dump_traceback_later()
            out.write(json.dumps({"ends": number, "seconds": took, **found}) + "\n")
            out.flush()


# The parent


@dataclass
class Row:
    """What came of one mutation."""

    tried: int = 0
    decoded: int = 0
    refused: int = 0
    crashes: int = 0
    hangs: int = 0
    seconds: float = 0.0  # of the slowest item


@dataclass
class Report:
    """What came of all items of a kind; ``faults`` is empty where nothing is to be mended."""

    kind: str
    rows: dict[str, Row] = field(default_factory=dict)
    compared: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    peak_bytes: int = 0

    def add(self, item: dict[str, Any]) -> None:
        row = self.rows.setdefault(item["mutation"], Row())
        row.tried += 1
        outcomes = item["outcomes"]
        main = outcomes.get("crop", outcomes.get("reader"))
        row.decoded += main == DECODED
        row.refused += main == REFUSED
        row.crashes += bool(item["notes"])
        row.seconds = max(row.seconds, item["seconds"])
        self.faults += [f"{self.kind} {item['ends']} ({item['mutation']}): {note}" for note in item["notes"]]
        for name in ("pillow", "torchvision", "box"):
            if name in item:
                self.compared.setdefault(name, Counter())[item[name]] += 1


def fuzz(kind: str, count: int, seed: int, root: Path, *, first: int = 0, checked: bool = False) -> Report:
    """Run items ``first`` to ``count`` of ``kind``, images or data; ``root`` is an empty folder."""
    if kind == "data":
        write_data(root)
    report, lines, at = Report(kind), root / f"{kind}.jsonl", first
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if checked:  # compiled anew, without what is kept of the unchecked kernels
        environment |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(root / "numba")}
    while at < count:
        command = [sys.executable, "-m", "benchmarks.faults.fuzz", "--child", kind]
        command += [str(seed), str(at), str(count), str(root.resolve())]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        items = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.exists() else []
        lines.unlink(missing_ok=True)
        for item in items:
            if "ends" in item:
                report.add(item)
        at = max((item["ends"] + 1 for item in items if "ends" in item), default=at)
        if done.returncode:
            begun = [item["begins"] for item in items if "begins" in item]
            hung = "Timeout (" in done.stderr
            report.faults.append(f"{kind} {begun[-1] if begun else at}: ended {done.returncode}\n{done.stderr[-2000:]}")
            row = report.rows.setdefault(mutation_of(kind, seed, begun[-1] if begun else at), Row())
            row.tried, row.hangs, row.crashes = row.tried + 1, row.hangs + hung, row.crashes + (not hung)
            at = (begun[-1] if begun else at) + 1
    return report


def mutation_of(kind: str, seed: int, number: int) -> str:
    return mutated_image(seed, number)[0] if kind == "images" else "a data set"


def markdown(reports: list[Report], seed: int) -> str:
    return "\n".join(_lines(reports, seed))


def _lines(reports: list[Report], seed: int) -> Iterator[str]:
    yield "# Damaged images, indexes and shards"
    yield ""
    yield (
        f"By `python -m benchmarks.faults.fuzz --seed {seed}`; Python {platform.python_version()}, "
        f"{platform.system()}. An item goes through every path that looks at it; decoded and refused are those of a "
        "training crop, and of the reader. Crashes are processes that ended, errors other than those that name what is "
        f"wrong, and wrong labels; hangs are items of more than {LIMIT} s. An item may take {ROOM >> 20} MiB."
    )
    for report in reports:
        yield ""
        yield f"## {sum(row.tried for row in report.rows.values()):,} {report.kind}"
        yield ""
        yield "| mutation | tried | decoded | refused | crashes | hangs | slowest, s |"
        yield "|---|---|---|---|---|---|---|"
        for name, row in sorted(report.rows.items()):
            counts = (
                f"{row.tried:,} | {row.decoded:,} | {row.refused:,} | {row.crashes} | {row.hangs} | {row.seconds:.2f}"
            )
            yield f"| {name} | {counts} |"
        yield ""
        for name, counts in report.compared.items():
            asked = counts.total() - counts["not asked"]
            each = ", ".join(f"{what} {n:,}" for what, n in counts.most_common() if what != "not asked")
            yield f"- {LABELS[name]}: {each}, of {asked:,}."
        yield from (f"- {fault}" for fault in report.faults)
    yield ""


LABELS = {
    "pillow": "Pillow's pixels of the whole image",
    "torchvision": "torchvision's, by up to 3",
    "box": "a box of ours against the whole image of ours",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--data", type=int, default=500, help="indexes and shards")
    parser.add_argument("--checked", type=int, default=0, help="images with numba's checks of array indexes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reports = []
    for kind, count, checked in (
        ("images", args.images, False),
        ("data", args.data, False),
        ("images", args.checked, True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            report = fuzz(kind, count, args.seed + checked, Path(folder), checked=checked)
        report.kind += " with checks of array indexes" if checked else ""
        reports.append(report)
    text = markdown([report for report in reports if report.rows], args.seed)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "fuzz.md").write_text(text, encoding="utf-8")
    sys.exit(1 if any(report.faults for report in reports) else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], *map(int, sys.argv[3:6]), Path(sys.argv[6]))
    else:
        main()
