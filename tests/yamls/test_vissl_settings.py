"""README's section "Coming from VISSL": each line of its table is a setting that a run takes."""

import math
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_train
from tests.test_pages import README, section_of
from vitcomposer import cli, config

ROWS = re.findall(r"^\| (.+) \| (.+) \|$", section_of(README, "Coming from VISSL"), re.M)[1:]


def settings(cell: str) -> list[list[str]]:
    """Every piece of code of a cell that sets something, as the words that a shell makes of it."""
    pieces = [shlex.split(piece) for piece in re.findall(r"`([^`]+)`", cell)]
    return [words for words in pieces if all("=" in word for word in words)]


def test_each_setting_of_vissl_has_one_here_that_its_yaml_takes() -> None:
    ours = [settings(here) for _, here in ROWS]
    assert len(ROWS) == 10 and sum(1 for found in ours if found) == 8  # two are commands
    file = {"init.weights=FILE": "init.weights=weights/vissl.torch"}
    for words in (words for found in ours for words in found):
        config.load(ROOT / "yamls/swav_deit_s.yaml", [file.get(word, word) for word in words])


@pytest.mark.parametrize(
    "name", [word for vissl, _ in ROWS for word in re.findall(r"[A-Z][\w.]+[a-zA-Z]+(?==)", vissl)]
)
def test_a_name_of_vissl_is_answered_with_ours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = "" if "." in name else "DISTRIBUTED."
    assert cli.main(["train", "swav_deit_s", f"config.{prefix}{name}=1"]) == 2
    assert "Use " in capsys.readouterr().err


def test_the_settings_of_vissl_train(tmp_path: Path) -> None:
    """All of the table at once that fit together: two steps of one block on synthetic images."""
    together = [words for _, here in ROWS for words in settings(here)[:1] if words != ["init.weights=FILE"]]
    together.append(["precision=auto"])  # of the precisions in the table the one that a CPU has too
    small = ["data.source=synthetic", "data.local=null", "data.synthetic_samples=8", "data.num_workers=0"]
    small += ["global_train_batch_size=4", "model.depth=1", "monitor=null", "loss.queue_length=0"]
    small += ["max_duration=2ba", "schedule.t_warmup=0ba", f"run.folder={tmp_path}", "run.log_interval=1ba"]
    given = [word for words in together for word in words]
    assert any(word.startswith("crops.size_crops=[160,96]") for word in given)
    assert run_train([str(ROOT / "yamls/swav_deit_s.yaml"), *given, *small, "run.progress_bar=false"]) == 0
    losses = re.findall(r'"loss/train/total": ([\d.]+)', (tmp_path / "swav_deit_s/metrics.jsonl").read_text())
    assert len(losses) == 2 and float(losses[0]) == pytest.approx(math.log(3000), rel=0.1)
