"""Has mkdocs make the site of `make docs`: README, docs/, a card for each yaml, the results, and what they link."""

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the environment of the site has mkdocs and nothing of ours

from vitcomposer.schema.pages import all_pages, read_page  # noqa: E402

_LINK = re.compile(r'(?P<before>\]\(|<img src=")(?P<to>[^)"\s#]+)')
_LINK_TO_FOLDER = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
_PLACES = {"README.md": "index.md", "yamls/README.md": "recipes/index.md", "recipes/RECORDS.md": "measured/records.md"}


def place_of(path: str) -> str:
    """Where a file of the checkout lies in the site: ``yamls/deit_s.yaml`` at ``recipes/deit_s.md``."""
    folder, name = posixpath.split(path)
    if path in _PLACES:
        return _PLACES[path]
    if folder == "yamls":
        return f"recipes/{Path(name).stem}.md"
    if folder == "benchmarks/results" and name.endswith(".md"):
        return f"measured/{name}"
    if path == "CHANGELOG.md":
        return "changelog.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"


def written_pages() -> list[str]:
    """The pages of the checkout that lie outside of docs/, and docs/ itself."""
    found = [*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")]
    return [*_PLACES, "CHANGELOG.md", *sorted(path.relative_to(ROOT).as_posix() for path in found)]


def links_of(text: str, path: str) -> Iterator[tuple[str, str]]:
    """Each relative link of a page as it is written, and the file or folder of the checkout that it leads to."""
    for found in _LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found["to"]))
        if ":" not in found["to"] and (ROOT / target).exists():
            yield found["to"], target


def for_site(text: str, path: str) -> str:
    """The text of a page whose links lead to the places of the site; those to folders are plain text."""
    targets = dict(links_of(text, path))
    folders = {link for link, target in targets.items() if (ROOT / target).is_dir()}
    text = _LINK_TO_FOLDER.sub(lambda found: found[1] if found[2] in folders else found[0], text)
    here = posixpath.dirname(place_of(path))

    def moved(found: re.Match[str]) -> str:
        target = targets.get(found["to"])
        return found[0] if target is None else found["before"] + posixpath.relpath(place_of(target), here or ".")

    text = re.sub(r"^(#+ .*)\n(?=[-|])", r"\1\n\n", text, flags=re.M)  # mkdocs begins a list after an empty line
    return _LINK.sub(moved, text)


def card(name: str) -> str:
    """The page of one yaml: what its header says, how it is started, and the yaml itself."""
    page = read_page(ROOT / f"yamls/{name}.yaml")
    said = [f"- {what}: {text}" for what, text in (("Expected", page.expected), ("Cost", page.cost))]
    said.append(
        "- Measured here: " + page.measured.replace("(recipes/RECORDS.md)", "([records](../measured/records.md))")
    )
    commands = [f"vitcomposer train {name}", f"vitcomposer copy {name} mine.yaml    # to change it"]
    lines = [f"# {name}", "", f"{page.method}. {page.source}", "", *said, "", "```bash", *commands, "```", ""]
    text = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", "\n".join(lines))
    return f"{text}\n```yaml\n{(ROOT / f'yamls/{name}.yaml').read_text()}```\n"


def contents() -> dict[str, str]:
    """Every page of the site by its place."""
    pages = {place_of(path): for_site((ROOT / path).read_text(), path) for path in written_pages()}
    return pages | {f"recipes/{page.name}.md": card(page.name) for page in all_pages()}


def copied_files() -> list[str]:
    """The files of the checkout outside of docs/ that pages link and that are no pages themselves."""
    linked = {target for path in written_pages() for _, target in links_of((ROOT / path).read_text(), path)}
    return sorted(target for target in linked if place_of(target).startswith("source/") and (ROOT / target).is_file())


def on_config(config: Any) -> Any:
    """Called by mkdocs: adds the cards and the results to the menu."""
    for entry in config["nav"]:
        if "Recipes" in entry:
            entry["Recipes"] += [f"recipes/{page.name}.md" for page in all_pages()]
        if "Measured" in entry:
            entry["Measured"] += [place_of(path) for path in written_pages() if path.startswith("benchmarks/")]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: gives it the pages, whose links are those of the site, and the files that they link."""
    from mkdocs.structure.files import File

    for place, text in contents().items():
        there = files.get_file_from_path(place)
        if there is not None:
            files.remove(there)
        files.append(File.generated(config, place, content=text))
    for path in copied_files():
        files.append(File.generated(config, place_of(path), abs_src_path=str(ROOT / path)))
    return files
