"""The home folder in paths: of every key of a yaml and every argument of a command."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from vitcomposer import cli, config
from vitcomposer.errors import ConfigError
from vitcomposer.schema import expand_home

DEIT = ROOT / "yamls/deit_s.yaml"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("page", "key"),
    [
        (DEIT, "run.folder"),
        (DEIT, "data.local"),
        (DEIT, "init.weights"),
        (ROOT / "yamls/deit_s_distilled_cached.yaml", "teacher.weights"),
        (ROOT / "yamls/deit_s_distilled_cached.yaml", "cache.local"),
    ],
)
def test_every_path_of_a_yaml_may_begin_at_home(page: Path, key: str, home: Path, tmp_path: Path) -> None:
    block, name = key.split(".")
    by_command = config.load(page, [f"{key}=~/x"])
    assert getattr(getattr(by_command, block), name) == str(home / "x")
    copy = tmp_path / page.name
    copy.write_text(page.read_text())
    assert config.load(f"~/{page.name}", [f"{key}=~/x"]) == by_command
    with pytest.raises(
        ConfigError, match=rf"^{key} must be a path whose ~ names a user of this machine, got '~no-one/"
    ):
        config.load(page, [f"{key}=~no-one/x"])


def test_what_does_not_begin_so_stays() -> None:
    cfg = config.load(DEIT, ["data.local=a~b/~", "run.loggers=[wandb]"])
    assert cfg.data.local == "a~b/~"
    assert expand_home(cfg) is cfg


def test_lists_mappings_and_dataclasses_are_looked_into(home: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Block:
        path: str
        number: int = 3

    given = {"a": ["~/x", 1, None], "b": (Path("~"), "y"), "c": Block("~/z")}
    expected = {"a": [f"{home}/x", 1, None], "b": (home, "y"), "c": Block(f"{home}/z")}
    assert expand_home(given) == expected
    with pytest.raises(ConfigError, match=r"^c\.path must be"):
        expand_home({"c": Block("~no-one")})


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["convert", "digits", "~/out"], {"out": "out"}),
        (["convert", "list", "~/a.csv", "~/out", "--split=val", "--root=~/b", "--classes=~/c"], {"file": "a.csv"}),
        (["inspect", "~/data"], {"path": "data"}),
        (["eval", "~/run", "--data=~/a", "--out=~/b"], {"source": "run", "data": ["a"], "out": Path("b")}),
        (["export", "~/run", "--out=~/out"], {"out": Path("out")}),
        (["predict", "~/run", "~/a", "~/b", "--out=~/c"], {"inputs": ["a", "b"], "out": "c"}),
        (["soup", "~/a", "~/b", "--out=~/c"], {"checkpoints": ["a", "b"], "out": Path("c")}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_path_of_a_command_may_begin_at_home(
    arguments: list[str], seen: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    parse = cli.argparse.ArgumentParser.parse_known_args

    def parse_and_watch(*given: Any, **options: Any) -> Any:
        args, left = parse(*given, **options)
        args.run = lambda args: found.append(args) or 0
        return args, left

    monkeypatch.setattr(cli.argparse.ArgumentParser, "parse_known_args", parse_and_watch)
    assert cli.main(arguments) == 0
    values = vars(found[0])
    for name, tail in seen.items():
        whole = [str(home / each) for each in tail] if isinstance(tail, list) else type(tail)(home / tail)
        assert values[name] == whole
    texts = [str(each) for value in values.values() for each in (value if isinstance(value, list) else [value])]
    assert not [text for text in texts if text.startswith("~")]


def test_unknown_user_of_a_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "~no-one/data"]) == 2
    assert capsys.readouterr().err.startswith("error: path must be a path whose ~ names a user of this machine")
