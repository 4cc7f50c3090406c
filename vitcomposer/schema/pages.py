"""Reads the headers of the yamls: python -m vitcomposer.schema.pages writes yamls/README.md, one line for each."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from vitcomposer.errors import ConfigError, did_you_mean
from vitcomposer.shipped import YAMLS

_CONTINUED = re.compile(r"\n#   (?!.*(train\.py|cache-teacher|=))")  # of a line; a command stands there too
_FIELD = re.compile(r"# (Expected|Measured|Cost)[\w -]*: (.+)")


@dataclass(frozen=True)
class Page:
    """What the first lines of a yaml say about it."""

    name: str
    method: str
    source: str
    expected: str
    measured: str
    cost: str

    @property
    def what(self) -> str:
        """The method in at most 44 letters."""
        whole = self.method.replace(", ImageNet-1k", "").partition(":")[0]
        parts = whole.split(", ")
        while len(parts) > 1 and len(", ".join(parts)) > 44:
            parts.pop()
        return textwrap.shorten(", ".join(parts), 44, placeholder=" ...")

    @property
    def top1(self) -> str | None:
        """Percent on ImageNet, with what it is of where that is no classifier; None where nothing was published."""
        found = re.match(r"(\d\d\.\d)(?: (linear|k-NN)\b|, a (target)| as a (target))?", self.expected)
        return None if found is None else " ".join(part for part in found.groups() if part)

    @property
    def flops(self) -> float | None:
        """Of the whole run; None where the header tells its time instead."""
        found = re.search(r"([\d.]+) ([PE])FLOP", self.cost)
        return None if found is None else float(found[1]) * {"P": 1e15, "E": 1e18}[found[2]]

    @property
    def price(self) -> str:
        """FLOPs or time in two words."""
        found = re.search(r"[\d.]+ (?:[PE]FLOP|minutes)", self.cost)
        return found[0] if found else self.cost

    @property
    def ran_here(self) -> str | None:
        """Percent that this project measured, of nearest neighbours where it says so; None where it was not run."""
        found = re.match(r"\d\d\.\d( k-NN)?", self.measured)
        return found[0] if found else None


def all_pages(folder: Path = YAMLS) -> list[Page]:
    """Those of all yamls, by name."""
    return [read_page(path) for path in sorted(folder.glob("*.yaml"))]


def find_named(name: str) -> Path:
    """The yaml that a name such as ``deit_s`` stands for.

    Raises:
        ConfigError: There is no such name.
    """
    names = [path.stem for path in YAMLS.glob("*.yaml")]
    if name not in names:
        hint = did_you_mean(name, names) or " `vitcomposer list` prints their names."
        raise ConfigError(f"There is no recipe {name!r}.{hint}")
    return YAMLS / f"{name}.yaml"


def read_page(path: Path) -> Page:
    """The header of a yaml.

    Raises:
        ValueError: It lacks a line that every header has.
    """
    text = path.read_text(encoding="utf-8")
    lines = _CONTINUED.sub(" ", text.partition("\nrecipe:")[0]).splitlines()
    method, _, source = lines[0].removeprefix("# ").partition(".  ")
    fields = {found[1]: found[2] for line in lines if (found := _FIELD.match(line))}
    missing = {"Expected", "Measured", "Cost"} - fields.keys()
    if missing or not source:
        raise ValueError(f"{path} must begin with method and source, Expected, Measured and Cost; it lacks {missing}.")
    return Page(path.stem, method, source, fields["Expected"], fields["Measured"], fields["Cost"])


def table(folder: Path = YAMLS) -> str:
    """yamls/README.md."""
    head = [
        "# Recipes",
        "",
        "One yaml is one method with its every number; its first lines say where they come from, and what differs.",
        "Written by `make yamls` from those lines. Accuracy is ImageNet-1k top-1 unless another data set is named.",
        "Estimated hours are those of `vitcomposer plan` ([how](../docs/speed.md#what-plan-computes)).",
        "",
        "| yaml | method | source | expected | measured here | cost |",
        "|---|---|---|---|---|---|",
    ]
    rows = [
        f"| [{page.name}]({page.name}.yaml) | "
        + " | ".join(map(_cell, (page.method, page.source, page.expected, page.measured, page.cost)))
        + " |"
        for page in all_pages(folder)
    ]
    return "\n".join([*head, *rows, ""])


def _cell(text: str) -> str:
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text.replace("|", "\\|"))
    text = re.sub(r"\(recipes/RECORDS\.md\)", "([RECORDS](../recipes/RECORDS.md))", text)
    return text.rstrip(".")


if __name__ == "__main__":
    (YAMLS / "README.md").write_text(table(), encoding="utf-8")
