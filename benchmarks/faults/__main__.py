"""Run the tests of faults and write what a user sees of each: python -m benchmarks.faults --out benchmarks/results

``--slow`` adds the tests that take minutes, such as twenty kills of a run with two ranks. ``--told FILE ...`` takes the
rows of tests that ran before, with VITCOMPOSER_FAULTS=FILE in their environment.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import ROOT

# Tests of faults that lie beside what they are about.
ELSEWHERE = ("tests/models/weights/test_torch_file.py", "tests/data/conversion/test_large_images.py")
LONGEST = 320  # characters of a message in the table
HEAD = [
    "# Faults: what a user sees, and for how long",
    "",
    "Written by `python -m benchmarks.faults`: every row is a test that brings the fault about, on "
    "a real server or process, and checks that nothing was lost. Seconds lie between the fault and the error, or the "
    "first step after it where the run goes on; on two CPU cores, of which importing Composer takes about six seconds.",
    "",
    "| fault | what a user sees | seconds | test |",
    "|---|---|---|---|",
]


def rows_of(argv: list[str]) -> list[dict[str, str | float]]:
    """What the tests told; ends the program when one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.jsonl")
        command = [sys.executable, "-m", "pytest", "tests/faults", *ELSEWHERE, *argv]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "VITCOMPOSER_FAULTS": str(told), "OMP_NUM_THREADS": "1"}, check=False
        )
        if done.returncode:
            raise SystemExit(done.returncode)
        return [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines()]


def markdown(rows: list[dict[str, str | float]]) -> str:
    lines = [*HEAD]
    for row in sorted(rows, key=lambda row: (str(row["test"]), str(row["fault"]))):
        seen = str(row["seen"]).strip().replace("|", "\\|").replace("\n", " ")
        seen = seen if len(seen) <= LONGEST else f"{seen[:LONGEST].rstrip()} ..."
        test = str(row["test"]).removeprefix("tests/faults/").replace("|", "\\|")
        lines.append(f"| {row['fault']} | {seen} | {row['seconds']:.1f} | {test} |")
    return "\n".join([*lines, "", f"{len(rows)} faults, Python {platform.python_version()}, {platform.system()}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--slow", action="store_true", help="the tests marked slow too")
    parser.add_argument("--told", nargs="+", type=Path, help="rows of tests that ran before")
    args = parser.parse_args()
    if args.told:
        lines = [line for path in args.told for line in path.read_text(encoding="utf-8").splitlines()]
        rows = list({(row["test"], row["fault"]): row for row in map(json.loads, lines)}.values())
    else:
        rows = rows_of(["-m", "slow or not slow"] if args.slow else [])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "faults.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
