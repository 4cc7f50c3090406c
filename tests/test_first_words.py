"""What ``vitcomposer`` says before it does anything: its commands, its version, and the nearest name of a wrong one."""

import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from vitcomposer import __version__, cli

HEAVY = ("torch", "composer", "streaming", "numba", "numpy", "timm", "matplotlib", "rich")


def heavy_after(*words: str) -> tuple[int, list[str], str]:
    """Status, heavy packages that were imported, and what was printed, of a command in a process of its own."""
    code = (
        "import json, sys\nfrom vitcomposer.cli import main\n"
        "try:\n    status = main(sys.argv[2:])\nexcept SystemExit as end:\n    status = end.code\n"
        "print(json.dumps([status, [name for name in sys.argv[1].split() if name in sys.modules]]))"
    )
    command = [sys.executable, "-c", code, " ".join(HEAVY), *words]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    *printed, last = ran.stdout.splitlines()
    status, heavy = json.loads(last)
    return status, heavy, "\n".join(printed) + ran.stderr


def test_help_lists_every_command_once_by_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert cli.main([]) == 2 and capsys.readouterr().out == printed
    named = [word for line in printed.splitlines()[1:-1] for word in line.split()[1:]]
    assert sorted(named) == sorted(command.name for command in cli.COMMANDS)
    assert all(len(line) <= 80 for line in printed.splitlines())


@pytest.mark.parametrize("name", [command.name for command in cli.COMMANDS])
def test_every_command_has_a_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: vitcomposer {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("plam", "error: no command 'plam'. Did you mean plan?\n"),
        ("evaluate", "error: no command 'evaluate'. Did you mean eval?\n"),
        ("\x1b[2J", "error: no command '\\\\x1b[2J'. `vitcomposer --help` lists them.\n"),
    ],
)
def test_wrong_command_is_answered_with_the_nearest(word: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word, "x.yaml"]) == 2
    assert capsys.readouterr() == ("", answer)


def test_argument_that_is_missing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: the following arguments are required: yaml") and printed.count("\n") == 1
    assert "`vitcomposer plan --help`" in printed


def test_version_names_the_commit_torch_and_composer(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    printed = capsys.readouterr().out
    assert re.fullmatch(
        rf"vitcomposer {re.escape(__version__)}( \(\w{{7}}(, changed)?\))?, torch \d\S+, mosaicml \d\S+, Python 3\S+\n",
        printed,
    )


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "Train Vision Transformers"),
        (["--version"], 0, "vitcomposer "),
        (["trian"], 2, "no command 'trian'"),
        (["train", "deit_s", "optimzer.lr=1"], 2, "is no key of this recipe. Did you mean optimizer.lr?"),
        (["list"], 0, "DeiT-S/16, 300 epochs"),
        (
            ["plan", "deit_s", "--gpu", "h100", "optimzer.lr=1"],
            2,
            "is no key of this recipe. Did you mean optimizer.lr?",
        ),
    ],
)
def test_quick_answers_import_nothing_heavy(words: list[str], status: int, said: str) -> None:
    found, heavy, printed = heavy_after(*words)
    assert (found, heavy) == (status, []) and said in printed
