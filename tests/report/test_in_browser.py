"""Opens reports in Chromium, where there is one: nothing complains, nothing is too wide, dark is dark."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, browser, program
from tests.report.runs import HOSTILE, SUMMARY, evaluated, line, said, write_run
from vitcomposer.cli import main
from vitcomposer.report import write_report

pytestmark = pytest.mark.skipif(program() is None, reason="no Chromium here: apt-get install chromium")

NAMES = [HOSTILE, "b" * 300, "long names of classes " * 20, "d"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, trained_run: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    environment = {"command": f"train.py demo run.name={'x' * 400}", "packages": {"torch": "2" * 200}}
    lines = [evaluated(step, step / 400) if step % 10 == 0 else line(step) for step in range(1, 301)]
    runs = []
    for name in ("hostile", "n" * 120):
        run = write_run(
            folder / name, lines, summary_json=SUMMARY, class_names_json=NAMES, environment_json=environment
        )
        runs.append(said(run, [0, 1, 2, 3] * 9, [1, 2, 3, 3] * 9, "predictions_ema.csv"))
    gates = {f"attention/gate/layer{i}/head{j}": 0.7 for i in range(1, 4) for j in (1, 2)}
    reach = {f"attention/nonlocality/layer{i}": 2.0 + i for i in range(1, 25)}
    swav = write_run(folder / "swav", [line(step, **gates, **reach, **{"knn/top1_k20": 0.4}) for step in range(1, 9)])
    assert main(["report", *map(str, [*runs, swav]), "--out", str(folder / "three.html")]) == 0
    found = {"photos": trained_run / "report.html", "three": folder / "three.html"}
    return found | {"hostile": write_report(runs[0]), "swav": write_report(swav)}


@pytest.mark.parametrize("page", ["photos", "hostile", "swav", "three"])
@pytest.mark.parametrize("width", [375, 1280])
def test_page_fits_its_window_and_nothing_complains(
    page: str, width: int, chromium: Browser, pages: dict[str, Path]
) -> None:
    chromium.complaints.clear()
    chromium.look(pages[page], width)
    chromium.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert chromium.value("document.documentElement.scrollWidth") == width
    beyond = (
        f"[...document.querySelectorAll('body *:not(.wide *)')].filter(e => e.getBoundingClientRect().right > {width})"
    )
    assert chromium.value(f"{beyond}.map(e => e.tagName + e.textContent.slice(0, 40))") == []
    broken = "[...document.images].filter(each => !each.complete || !each.naturalWidth).length"
    assert chromium.value(broken) == 0
    assert chromium.complaints == []


def test_letters_of_charts_can_be_read_on_a_phone(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.look(pages["photos"], 375)
    heights = "[...document.querySelectorAll('svg text')].map(each => each.getBoundingClientRect().height)"
    found = chromium.value(heights)
    assert len(found) > 50 and min(found) >= 12, "pixels of a line of text"


@pytest.mark.parametrize("page", ["photos", "swav"])
@pytest.mark.parametrize("dark", [False, True])
def test_colours_follow_the_system_and_can_be_read(
    dark: bool, page: str, chromium: Browser, pages: dict[str, Path]
) -> None:
    chromium.look(pages[page], 1280, dark=dark)
    back = luminance(chromium.value("getComputedStyle(document.body).backgroundColor"))
    assert (back < 0.1) is dark
    texts = "'h1, .lead, .card p, .note, th, td, summary, svg text, pre'"
    style = "(each.closest('svg') ? getComputedStyle(each).fill : getComputedStyle(each).color)"
    colours = chromium.value(f"[...new Set([...document.querySelectorAll({texts})].map(each => {style}))]")
    assert len(colours) > (10 if page == "swav" else 4), "a layer has a colour"
    for colour in colours:
        bright, dim = sorted((luminance(colour) + 0.05, back + 0.05), reverse=True)
        assert bright / dim >= 4.5, colour


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)``, as WCAG 2 defines it."""
    channels = [int(part) / 255 for part in colour.strip("rgb()").split(",")]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
