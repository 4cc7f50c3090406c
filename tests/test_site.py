"""The site of `make docs`: its menu has every page, its links lead to what it holds, and a card is its yaml."""

import posixpath
import re

import pytest
import yaml

from docs import site_pages
from tests.test_structure import ROOT, YAMLS
from vitcomposer import config


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return site_pages.contents()


def test_every_relative_link_of_the_site_leads_to_one_of_its_pages_or_files(pages: dict[str, str]) -> None:
    there = {*pages, *map(site_pages.place_of, site_pages.copied_files())}
    there |= {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/pictures/*")}
    checked = 0
    for place, text in pages.items():
        for link in re.findall(r'(?:\]\(|<img src=")([^)"\s#]+)', text):
            if "://" not in link and not link.startswith("mailto:"):
                assert posixpath.normpath(posixpath.join(posixpath.dirname(place), link)) in there, f"{place}: {link}"
                checked += 1
    assert checked > 300


def test_the_menu_has_every_page_once(pages: dict[str, str]) -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = site_pages.on_config({"nav": nav})["nav"]
    names = [
        name for entry in listed for value in entry.values() for name in ([value] if isinstance(value, str) else value)
    ]
    assert sorted(names) == sorted(pages)


def test_links_to_folders_are_text_and_others_move() -> None:
    text = "[a](../docs) [b](../yamls/deit_s.yaml) [c](https://x.org/docs) ![d](pictures/x.png)\n## T\n- one\n"
    moved = site_pages.for_site(text, "docs/run.md")
    assert moved == "a [b](recipes/deit_s.md) [c](https://x.org/docs) ![d](pictures/x.png)\n## T\n\n- one\n"
    assert (
        site_pages.for_site("[r](../recipes/RECORDS.md)", "benchmarks/results/scale.md") == "[r](../recipes/RECORDS.md)"
    )
    assert site_pages.for_site("[r](../recipes/RECORDS.md)", "yamls/README.md") == "[r](../measured/records.md)"


@pytest.mark.parametrize("name", [path.stem for path in YAMLS])
def test_a_card_says_what_the_header_says_and_holds_the_yaml(name: str, pages: dict[str, str]) -> None:
    text = pages[f"recipes/{name}.md"]
    assert text.startswith(f"# {name}\n") and f"vitcomposer train {name}\n" in text
    held = re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S)
    assert held == [(ROOT / f"yamls/{name}.yaml").read_text()]
    config.load(name)
    for word in ("- Expected: ", "- Cost: ", "- Measured here: "):
        assert word in text
    assert "(recipes/RECORDS.md)" not in text.partition("```")[0]
