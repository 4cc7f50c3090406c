"""Writes the hours that ``plan`` estimates into the headers of the yamls: python -m vitcomposer.cost.headers."""

import re
import textwrap
from pathlib import Path

from vitcomposer import config
from vitcomposer.cost.estimate import costs_of
from vitcomposer.cost.supply import Machines
from vitcomposer.schema.pages import read_page
from vitcomposer.shipped import RESULTS, YAMLS

GPU, GPUS, CPUS, IMAGES = "h200", 8, 192, 1_281_167  # one machine of eight, as they are sold, and ImageNet-1k
_COST = re.compile(r"^# Cost: .*\n(?:#   .*\n)*", re.MULTILINE)
_HOURS = re.compile(r"; (?:hours not measured[\w ]*|estimated [^;]*)\.$")


def is_planned(path: Path) -> bool:
    """Whether a yaml's header counts FLOPs of ImageNet-1k and its recipe trains a network."""
    page = read_page(path)
    return " EFLOP" in page.cost and not page.name.startswith("probe_")


def hours_in_words(path: Path, results: Path = RESULTS) -> str:
    """The hours of a yaml's run as its header quotes them."""
    found = costs_of(
        config.load(path), gpu=GPU, gpus=GPUS, images=IMAGES, results=results, machines=Machines(cpus=CPUS)
    )
    if found["hours"] is None:
        return "hours not measured"
    where = f"{GPUS} {GPU.upper()} with {CPUS} cores"
    if found["supply"] is None:
        where = f"{GPUS} {GPU.upper()} that never wait for images"
    alone = found["gpu_bound_hours"]
    waits = "" if found["hours"] < 1.005 * alone else f" (GPUs alone {alone:.2f} h)"
    return f"estimated {found['hours']:.2f} h on {where}{waits}"


def with_hours(text: str, hours: str) -> str:
    """The text of a yaml whose cost ends with these hours.

    Raises:
        ValueError: Its header has no cost that ends with hours.
    """
    whole = _COST.search(text)
    cost = " ".join(line.lstrip("# ") for line in (whole[0] if whole else "").splitlines())
    if whole is None or not _HOURS.search(cost):
        raise ValueError("The header must hold a line Cost that ends in hours. Write '; hours not measured.'")
    told = _HOURS.sub(f"; {hours}.", cost)
    lines = textwrap.fill(told, 120, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
    return text[: whole.start()] + lines + "\n" + text[whole.end() :]


if __name__ == "__main__":
    for yaml in filter(is_planned, sorted(YAMLS.glob("*.yaml"))):
        written = yaml.read_text(encoding="utf-8")
        yaml.write_text(with_hours(written, hours_in_words(yaml)), encoding="utf-8")
