"""Run the fast tests on every tested PyTorch and Python that this machine has, and write docs/tested.md.

    make matrix
    python -m benchmarks.matrix --torch 2.14 --python 3.13 --workers 2

Each cell is an environment of its own (.venv-matrix/PYTHON-TORCH), set up by ``make setup`` from its lock file. Cells
run one after the other; rows of cells that are not run this time stay in the page, and so does a test that failed.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from benchmarks.provenance import commit, cpu_name

PAGE = ROOT / "docs/tested.md"
TORCHES, PYTHONS = ("2.14", "2.7"), ("3.11", "3.12", "3.13")
_HEAD = """# Tested sets

Written by `make matrix`: the fast tests on each PyTorch and Python. `constraints.txt` is the default set,
`constraints-torch-2.7.txt` the second (`make test TORCH=2.7`). Times: wall time of set-up (from uv's cache) and tests.

| torch | Python | torchvision | numpy | Pillow | date, commit | passed | failed | skipped | set-up | tests | machine |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
_PACKAGES = ("torch", "torchvision", "numpy", "pillow")


@dataclass(frozen=True)
class Cell:
    """One PyTorch on one Python, by the names that ``make`` takes."""

    torch: str
    python: str

    @property
    def folder(self) -> Path:
        return ROOT / ".venv-matrix" / f"{self.python}-{self.torch}"

    def make(self, target: str, interpreter: str, *variables: str) -> float:
        """Wall seconds of ``make TARGET``; what fails in the tests is for the report to say."""
        begin = time.monotonic()
        names = [f"TORCH={self.torch}", f"VENV={self.folder.relative_to(ROOT)}", f"PYTHON={interpreter}", *variables]
        done = subprocess.run(["make", target, *names], cwd=ROOT, check=False)
        if done.returncode and target == "setup":
            sys.exit(f"the set-up of Python {self.python} with torch {self.torch} failed")
        return time.monotonic() - begin


def main() -> None:
    args = _parse()
    rows, failures = _known_rows(), _known_failures()
    for cell in (Cell(torch, python) for torch in args.torch for python in args.python):
        interpreter = _interpreter(cell.python)
        if interpreter is None:
            print(f"no Python {cell.python} here", file=sys.stderr)
            continue
        shutil.rmtree(cell.folder, ignore_errors=True)
        set_up = cell.make("setup", interpreter)
        report = cell.folder / "report.xml"
        tests = cell.make("test", interpreter, f"WORKERS={args.workers}", f"ARGS=--junitxml={report} {args.args}")
        rows[cell], failures[cell] = _row(cell, report, set_up, tests)
        _write(rows, failures)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", choices=TORCHES, default=TORCHES)
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS)
    parser.add_argument("--workers", type=int, default=2, help="pytest workers (default: %(default)s)")
    parser.add_argument("--args", default="", help="more words for pytest")
    return parser.parse_args()


def _interpreter(version: str) -> str | None:
    """A Python of the version that runs: pyenv's names without one behind them do not."""
    pyenv = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}*/bin/python"))
    for name in (f"python{version}", *map(str, reversed(pyenv)), "python3"):
        check = [name, "-c", f"import sys; sys.exit(sys.version_info[:2] != {tuple(map(int, version.split('.')))})"]
        if shutil.which(name) and subprocess.run(check, capture_output=True, check=False).returncode == 0:
            return name
    return None


def _row(cell: Cell, report: Path, set_up: float, tests: float) -> tuple[str, list[str]]:
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    torch, torchvision, numpy, pillow = (_version(cell, name) for name in _PACKAGES)
    python = _said(cell, "import platform; print(platform.python_version())")
    when = f"{datetime.date.today().isoformat()}, {commit()[:7]}"
    cells = [torch, python, torchvision, numpy, pillow, when, f"{passed:,}", failed, count["skipped"]]
    cells += [f"{set_up:.0f} s", f"{tests / 60:.1f} min", f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"]
    return "| " + " | ".join(map(str, cells)) + " |", [
        _reason(case) for case in suite.iter("testcase") if _failed(case)
    ]


def _said(cell: Cell, program: str) -> str:
    command = [str(cell.folder / "bin/python"), "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(cell: Cell, package: str) -> str:
    return _said(cell, f"from importlib.metadata import version; print(version({package!r}))").partition("+")[0]


def _failed(case: ElementTree.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def _reason(case: ElementTree.Element) -> str:
    found = case.find("failure")
    problem = found if found is not None else case.find("error")
    first = (problem.get("message", "") if problem is not None else "").strip().partition("\n")[0]
    name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
    plain = re.sub(r"[|`<>]", " ", re.sub(r"(/[\w.-]+){2,}", "...", first))  # without this machine's folders
    return f"`{name}`: {plain[:160]}"


def _known_rows() -> dict[Cell, str]:
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    rows = [line for line in lines if re.match(r"\| \d+\.\d+\.\d+ \| \d+\.\d+\.\d+ \|", line)]
    return {_cell(*(word.strip() for word in line.split("|")[1:3])): line for line in rows}


def _known_failures() -> dict[Cell, list[str]]:
    text = PAGE.read_text() if PAGE.exists() else ""
    found = re.findall(r"^- torch (\S+), Python (\S+), (.*)", text, re.M)
    failures: dict[Cell, list[str]] = {}
    for torch, python, reason in found:
        failures.setdefault(_cell(torch, python), []).append(reason)
    return failures


def _cell(torch: str, python: str) -> Cell:
    """The cell of two versions as ``2.14`` or ``2.14.1``."""
    short = [".".join(version.split(".")[:2]) for version in (torch, python)]
    return Cell(*short)


def _write(rows: dict[Cell, str], failures: dict[Cell, list[str]]) -> None:
    def newest_first(cell: Cell) -> tuple[list[int], list[int]]:
        return [-int(part) for part in cell.torch.split(".")], [int(part) for part in cell.python.split(".")]

    cells = sorted(rows, key=newest_first)
    lines = [f"- torch {cell.torch}, Python {cell.python}, {each}" for cell in cells for each in failures.get(cell, [])]
    PAGE.write_text(
        _HEAD + "\n".join(rows[cell] for cell in cells) + "\n" + "\n## Failed\n\n" * bool(lines) + "\n".join(lines)
    )


if __name__ == "__main__":
    main()
