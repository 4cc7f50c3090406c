"""The bench command on shards and without a data set: every figure there, and what a user gets wrong."""

import json
import re
from pathlib import Path

import pytest

from vitcomposer import cli, config
from vitcomposer.cost import input_speed

ROOT = Path(__file__).resolve().parents[2]
YAML = str(ROOT / "yamls" / "deit_ti.yaml")
SMALL = ["model.image_size=32", "model.patch_size=8", "global_train_batch_size=16"]
FLAGS = ["--seconds", "0.05"]


def run(*argv: str) -> int:
    return cli.main(["bench", YAML, *argv])


@pytest.mark.parametrize("source", ["mds", "synthetic"])
def test_bench_measures_every_stage(source, request, tmp_path, capsys):
    if source == "mds":
        data = [f"data.local={request.getfixturevalue('photo_mds')}", "model.num_classes=8"]
    else:
        data = ["data.source=synthetic", "data.synthetic_samples=512"]
    file = tmp_path / "figures.json"
    assert run(*SMALL, *data, *FLAGS, "--workers", "0,1", "--target", "10000", "--json", str(file)) == 0
    found = json.loads(file.read_text())
    names = ["container only", "decode and crop", "whole collate", "loader, 0 workers", "loader, 1 worker"]
    assert [speed["name"] for speed in found["speeds"]] == names
    assert [speed["name"] for speed in found["threads"]] == ["1 thread"]
    assert all(speed["images_per_second"] > 0 for speed in found["speeds"] + found["threads"])
    assert list(found["milliseconds"]) == ["read", "draw box", "decode", "resize", "augment and rest"]
    assert list(found["prefetch"]) == ["1", "2", "4"]
    text = capsys.readouterr().out
    for name in (*names, "1 thread"):
        assert name in text
    for word in ("processes, not threads", "persistent", "prefetch_factor 2", "pinned memory", "needs"):
        assert word in text


def test_stages_and_speeds_agree(photo_mds):
    """Box, decode and resize are the whole of "decode and crop", and the collate takes at least as long."""
    overrides = [*SMALL, f"data.local={photo_mds}", "model.num_classes=8", "augment.rand_augment=null"]
    found = input_speed.measure(config.load(YAML, overrides), workers=[0], seconds=0.3)
    container, crops, collate, loader = (1e3 / speed["images_per_cpu_second"] for speed in found["speeds"])
    stages = found["milliseconds"]
    assert stages["draw box"] + stages["decode"] + stages["resize"] == pytest.approx(crops, rel=0.2)
    assert stages["read"] == pytest.approx(container)
    assert container < crops
    mean = sum(path.stat().st_size for path in (photo_mds / "train").glob("*.mds")) / 192
    assert found["bytes_per_image"] == pytest.approx(mean, rel=0.05)


def test_cores_follow_from_the_loader_with_the_most_workers():
    speeds = [{"images_per_cpu_second": rate} for rate in (50_000.0, 900.0, 800.0)]
    assert input_speed.cores_for({"speeds": speeds}, 10_000) == 13
    assert input_speed.cores_for({"speeds": speeds}, 800) == 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--workers", "0,two"], "--workers must be numbers of processes, got '0,two'"),
        (["--workers", ""], "--workers must be numbers"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--target", "-1"], "--target must be images a second above 0"),
        (["data.local=/nowhere"], "data.local must be a folder .*'/nowhere', which does not exist"),
        (["data.lokal=x"], "lokal"),
    ],
)
def test_mistakes_are_named_in_one_line(argv, message, capsys):
    assert run(*SMALL, *argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    assert re.search(message, error)


def test_a_missing_yaml_is_named(capsys):
    assert cli.main(["bench", "nothing.yaml"]) == 2
    assert "There is no yaml at nothing.yaml" in capsys.readouterr().err
