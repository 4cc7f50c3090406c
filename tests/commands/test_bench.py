"""The bench command on shards and without a data set: every figure there, and what a user gets wrong."""

import json
import re
from pathlib import Path

import pytest

from vitcomposer import cli, config
from vitcomposer.commands.plan import bench
from vitcomposer.cost import bottleneck, input_speed

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
    (part,) = found["parts"]
    assert part["image_size"] == 32 and part["limit"] in ("loader", "device augmentation", "model step")
    assert f"32 px: loader of 1 worker {part['loader_images_per_second']:,.0f} images/s" in text
    assert f"the {part['limit']} is the limit" in text and "steps of 8 images, fp32, on cpu" in text
    for word in ("processes, not threads", "persistent", "prefetch_factor 2", "pinned memory", "needs"):
        assert word in text


CURRICULUM = "algorithms.Curriculum={image_sizes: [16, 32], compute: [0.5, 0.5]}"
DATA = ["data.source=synthetic", "data.synthetic_samples=512"]


@pytest.fixture(scope="module")
def benched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What bench writes for a curriculum of two sizes."""
    file = tmp_path_factory.mktemp("bench") / "here.json"
    assert run(*SMALL, *DATA, CURRICULUM, *FLAGS, "--workers", "0", "--json", str(file)) == 0
    return file


def plan(tmp_path: Path, measured: Path, *argv: str) -> dict:
    file = tmp_path / "plan.json"
    command = ["plan", YAML, *SMALL, *DATA, *argv, "--gpu", "h200", "--results", str(tmp_path / "none")]
    assert cli.main([*command, "--measured", str(measured), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_plan_takes_the_decode_that_bench_measured_at_each_size(benched, tmp_path, capsys):
    written = json.loads(benched.read_text())
    rates = written["input"]["images_per_cpu_second"]
    assert list(rates) == ["256", "1024"] and [part["image_size"] for part in written["parts"]] == [16, 32]
    found = plan(tmp_path, benched, CURRICULUM, "--cpus", "3")
    decode = [stage["limits"]["decode"] for stage in found["stages"]]
    assert decode == pytest.approx([3 * rate for rate in rates.values()])
    assert found["bytes_per_image"] == pytest.approx(written["bytes_per_image"])
    assert found["basis"] == "roofline estimate, not measured"  # no H200 was measured
    assert f"(synthetic images on a core of {written['cpu']}; here.json)" in capsys.readouterr().out


def test_plan_takes_the_step_where_the_gpu_is_the_one_that_bench_measured(benched, tmp_path, capsys):
    written = json.loads(benched.read_text())
    (small, large) = written["sections"]["training"]
    assert (small["image_size"], large["image_size"]) == (16, 32) and small["mfu"] is None
    for row, mfu in ((small, 0.1), (large, 0.2)):
        row |= {"mfu": mfu, "precision": "amp_bf16"}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({**written, "device": "NVIDIA H200"}))
    found = plan(tmp_path, file, CURRICULUM)
    assert "  not compiled, amp_bf16, without evaluation" in capsys.readouterr().out
    assert [stage["mfu"] for stage in found["stages"]] == pytest.approx([0.1, 0.2])
    assert found["basis"] == "measured MFU of gpu.json"
    small["precision"] = large["precision"] = "fp32"
    file.write_text(json.dumps({**written, "device": "NVIDIA H200"}))
    assert plan(tmp_path, file, CURRICULUM)["basis"] == "roofline estimate, not measured"


def test_a_bench_of_another_input_is_refused(benched, tmp_path, capsys):
    command = ["plan", YAML, *SMALL, *DATA, "augment.rand_augment=null", "--gpu", "h200", "--measured", str(benched)]
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert "--measured must be a bench of a recipe whose workers do the same (ours-seekable)" in told
    assert "here.json of ours-ra" in told and told.count("\n") == 1
    broken = {**json.loads(benched.read_text()), "input": {"kind": "ours-ra", "images_per_cpu_second": {"9": 0}}}
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    assert cli.main([*command[:-1], str(tmp_path / "broken.json")]) == 2
    assert "or vitcomposer bench --json, got 'something else'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rates", "limit"),
    [
        ((100.0, 1000.0, 1000.0), "loader"),
        ((100.0, 1000.0, 105.0), "model step"),  # the device takes 1 / (1/1000 + 1/105) = 95 images a second
        ((500.0, 300.0, 400.0), "device augmentation"),
    ],
)
def test_the_slowest_part_is_the_limit(rates, limit):
    assert bottleneck.bottleneck(*rates) == limit


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


def test_without_numbers_the_workers_of_the_recipe_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitcomposer.commands.plan.bench.number_of_workers", lambda data, **_: data.num_workers)
    cfg = config.load(YAML, ["data.source=synthetic", "data.num_workers=3"])
    assert bench._given_workers(None) == [] and bench._usual_workers(cfg) == [0, 1, 3]


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


def test_recipes_without_labels_are_sent_to_check(capsys):
    assert cli.main(["bench", "swav_demo", "data.source=synthetic"]) == 2
    told = capsys.readouterr().err
    assert "recipe must be supervised or distill, got 'swav'. Use vitcomposer check" in told
