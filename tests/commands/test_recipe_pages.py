"""``vitcomposer list``, ``show`` and ``copy``: names that lead to yamls, and a file that is never written over."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from vitcomposer import cli, config
from vitcomposer.schema.pages import Page, all_pages


def test_list_has_a_row_for_every_recipe_the_cheapest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "what", "ImageNet", "top-1", "cost", "ran", "here"]
    assert sorted(row.split()[0] for row in rows) == sorted(page.stem for page in (ROOT / "yamls").glob("*.yaml"))
    assert rows[0].split()[0] == "demo" and rows[-1].split()[-3:] == ["142.0", "EFLOP", "-"]
    row = next(row for row in rows if row.startswith("deit_s "))
    assert [row[head.index(name) :].partition("  ")[0].strip() for name in ("what", "ImageNet", "cost")] == [
        "DeiT-S/16, 300 epochs",
        "79.9",
        "10.6 EFLOP",
    ]
    assert last.startswith("Next: vitcomposer show NAME") and max(map(len, [head, *rows])) <= 110


@pytest.mark.parametrize(
    ("name", "top1", "price", "ran_here"),
    [
        ("demo", None, "2.5 minutes", "97.8"),
        ("swav_demo", None, "1.5 minutes", "91.0 k-NN"),
        ("finetune_photos", None, "2.5 PFLOP", None),
        ("vit_b", None, "12.1 EFLOP", None),
        ("dino_vit_s", "74.0 linear", "14.6 EFLOP", None),
        ("vit_s_hot", "81.3 target", "10.24 EFLOP", None),
        ("deit_s_distilled_cached", "81.2 target", "10.7 EFLOP", None),
    ],
)
def test_figures_are_those_of_the_header(name: str, top1: str | None, price: str, ran_here: str | None) -> None:
    page = next(page for page in all_pages() if page.name == name)
    assert (page.top1, page.price, page.ran_here) == (top1, price, ran_here)


def test_long_method_is_cut_at_a_word() -> None:
    page = Page("x", "A method of a name, which has more than forty-four letters: it has", "", "", "", "")
    assert page.what == "A method of a name"
    assert Page("x", "word " * 20, "", "", "", "").what.endswith("word ...")


def test_show_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "deit_s"]) == 0
    assert capsys.readouterr().out == (ROOT / "yamls/deit_s.yaml").read_text()


def test_copy_is_a_yaml_of_ones_own_and_writes_over_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    assert cli.main(["copy", "deit_s", str(mine)]) == 0
    assert capsys.readouterr().out == f"wrote {mine}\nNext: vitcomposer train {mine}\n"
    assert config.load(mine).run.name == "mine" and mine.read_bytes() == (ROOT / "yamls/deit_s.yaml").read_bytes()
    mine.write_text("changed")
    assert cli.main(["copy", "deit_s", str(mine)]) == 2
    assert f"error: {mine} is there, and is not written over" in capsys.readouterr().err
    assert mine.read_text() == "changed"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "deits"], "There is no recipe 'deits'. Did you mean 'deit_s'?"),
        (["copy", "??", "x.yaml"], "There is no recipe '??'. `vitcomposer list` prints their names."),
        (["copy", "deit_s", "folder"], "folder must be the name of a yaml. Write it like deit_s_mine.yaml."),
        (["copy", "deit_s", "no/such/folder/x.yaml"], "No such file or directory: 'no/such/folder/x.yaml'"),
    ],
)
def test_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
