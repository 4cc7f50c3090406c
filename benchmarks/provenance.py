"""Where the figures of a report come from: the commit of the checkout and the processor."""

import platform
import subprocess
from pathlib import Path

from benchmarks import ROOT


def commit() -> str:
    """The checkout's commit, shortened as git does."""
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
