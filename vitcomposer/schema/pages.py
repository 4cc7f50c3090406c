"""Reads the headers of the yamls: python -m vitcomposer.schema.pages writes yamls/README.md, one line for each."""

import re
from dataclasses import dataclass
from pathlib import Path

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
        "",
        "| yaml | method | source | expected | measured here | cost |",
        "|---|---|---|---|---|---|",
    ]
    pages = [read_page(path) for path in sorted(folder.glob("*.yaml"))]
    rows = [
        f"| [{page.name}]({page.name}.yaml) | "
        + " | ".join(map(_cell, (page.method, page.source, page.expected, page.measured, page.cost)))
        + " |"
        for page in pages
    ]
    return "\n".join([*head, *rows, ""])


def _cell(text: str) -> str:
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text.replace("|", "\\|"))
    text = re.sub(r"\(recipes/RECORDS\.md\)", "([RECORDS](../recipes/RECORDS.md))", text)
    return text.rstrip(".")


if __name__ == "__main__":
    (YAMLS / "README.md").write_text(table(), encoding="utf-8")
