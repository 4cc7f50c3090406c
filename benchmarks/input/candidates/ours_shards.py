"""The shards that ours reads, written by ``vitcomposer convert``."""

import subprocess
import sys
from pathlib import Path

from benchmarks.input.candidates import lengthen_epoch

_FLAGS = {"plain": ["--no-seekable"], "seekable": ["--seekable"], "raw": ["--raw-fraction", "1.0"]}


def write(photos: Path, store: Path, *, kind: str) -> None:
    command = [sys.executable, "-m", "vitcomposer", "convert", "folder", str(photos), str(store)]
    subprocess.run([*command, "--val-fraction", "0", *_FLAGS[kind]], check=True)
    lengthen_epoch(store / "train" / "index.json")
