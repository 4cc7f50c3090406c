"""Names that strangers chose reach terminal, model card and pictures as text, never as something that acts."""

import re

import numpy as np
import pytest

from vitcomposer import cli
from vitcomposer.commands.look import inspect
from vitcomposer.data.conversion.inspect import SplitReport
from vitcomposer.escape import for_markdown, for_terminal, message
from vitcomposer.evaluation import confusion
from vitcomposer.export.card import write_card

HOSTILE = [
    "\x1b[31mred\x1b]0;title\x07",
    "two\nlines\r",
    "<script>alert(1)</script>",
    "[click](https://example.org)",
    "![pixel](https://example.org/x.png)",
    "[/foo]",
    ":smile: [bold]b[/bold]",
    "a|b|c",
    "\u202eevil\u2028next",
    "$\\frac{1}$",
    "www.example.org",
    "\udcff",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_terminal_gets_one_line_without_control_characters(name: str) -> None:
    shown = for_terminal(name)
    assert shown.isprintable() and shown.encode()
    assert for_terminal("plain näme 猫") == "plain näme 猫"


@pytest.mark.parametrize(("given", "shown"), [("\x1b[1m", r"\x1b[1m"), ("a\nb", r"a\nb"), ("\u202e", r"\u202e")])
def test_what_is_escaped_can_still_be_read(given: str, shown: str) -> None:
    assert for_terminal(given) == shown
    assert message("a\nb\x1b") == "a\nb\\x1b"


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_of_a_name_has_no_markup(name: str) -> None:
    text = for_markdown(name)
    assert "\n" not in text and "<" not in text and ">" not in text
    assert not re.search(r"(?<!\\)[\[\]()`*_|!:$]", text)
    assert "www.example" not in text, "GitHub makes a link of it"


def card(names: list[str], **metrics: object) -> str:
    model = {"name": "vit_tiny_patch16", "num_classes": len(names)}
    evaluation = {"image_size": 32, "crop_ratio": 1.0, "interpolation": "bicubic"}
    ours = {"model": model, "evaluation": evaluation, "mean": [0.5], "std": [0.5], "exif": "apply", "averaged": False}
    page = {"vitcomposer": ours, "label_names": names}
    return write_card(page, parameters=1000, files={}, metrics=metrics, notes=[])


def test_a_model_card_shows_hostile_names_and_values_as_text() -> None:
    plain, hostile = card(["cat", "dog"]), card(HOSTILE[:2], top1=0.5, recipe="<script>\n# x", git_commit="[a](b)")
    assert len(plain.splitlines()) == len(card(HOSTILE).splitlines())
    for text in (hostile, card(HOSTILE)):
        assert "<script>" not in text and "\x1b" not in text and "](https" not in text and "[a](b)" not in text
    assert "top-1" not in card(["cat"], top1="<b>much</b>"), "what is no number is no accuracy"


def test_inspect_shows_names_that_look_like_its_own_markup(capsys: pytest.CaptureFixture[str]) -> None:
    report = SplitReport(
        name="[/foo]",
        samples=1,
        shards=1,
        bytes=1,
        hashes=[],
        columns={"[/bar]\x1b[0m": "bytes"},
        class_names=["[/foo]", "\x1b[31mred"],
        class_counts=None,
        first_sample="[/x]: JPEG",
    )
    inspect._print_report(report)
    shown = capsys.readouterr().out
    assert "\x1b[31m" not in shown
    for text in ("[/foo]", r"\x1b[31mred", "[/x]: JPEG"):
        assert text in shown


def test_an_error_cannot_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "nowhere\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_class_name_that_looks_like_a_formula_can_be_drawn() -> None:
    labels = np.arange(4, dtype=np.int32)
    names = ["$\\frac{1$", "a$b", "\x1b[31m", "two\nlines"]
    assert confusion.draw_confusion(labels, labels[::-1].copy(), names, title="t").startswith(b"\x89PNG")


def test_an_error_is_printed_at_once_by_the_first_rank_and_by_others_when_nobody_ended_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[str] = []

    def sleep(_: float) -> None:
        waited.append(capsys.readouterr().err)

    monkeypatch.setattr("time.sleep", sleep)
    for place in (None, "0", "1"):
        if place is not None:
            monkeypatch.setenv("LOCAL_RANK", place)
        assert cli.main(["inspect", "no/such\x1bfolder"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "no/such\\x1bfolder" in error and error.count("\n") == 1
        assert waited == ([""] if place == "1" else []), "it waits before it prints"
