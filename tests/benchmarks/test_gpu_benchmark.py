"""The GPU benchmark in tiny on a CPU: all of it runs, it keeps to its budget, and the planner reads what it writes."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step import gpu
from tests.conftest import ROOT
from vitcomposer import cli


def test_planner_reads_what_the_benchmark_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitcomposer import config
    from vitcomposer.cost.estimate import costs_of

    peak = 1e12  # as if the CPU were a card of one TFLOP/s
    monkeypatch.setattr(gpu.gpu_steps, "peak_flops", lambda device_name, precision: peak)
    gpu.main(["--device", "cpu", "--quick", "--write", "--out", str(tmp_path), "--sections", "batches", "attention"])
    written = tmp_path / "gpu_cpu.json"
    found = json.loads(written.read_text())
    assert found["smoke"] and "Smoke test" in written.with_suffix(".md").read_text()
    (row,) = found["sections"]["batches"]
    assert row["images_per_sec"] > 0 and row["peak_memory_bytes"] > 0
    written.unlink()
    (tmp_path / "gpu_h200.json").write_text(json.dumps({**found, "device": "NVIDIA H200", "smoke": False}))
    changes = ["model.embed_dim=48", "model.num_heads=3", "model.depth=2"]
    cfg = config.load(ROOT / "yamls/deit_s.yaml", changes)
    plan = costs_of(cfg, gpu="h200", gpus=1, images=10_000, results=tmp_path)
    mfu = row["images_per_sec"] * row["train_flops_per_image"] / peak
    assert row["mfu"] == pytest.approx(mfu) and mfu > 0
    assert plan["basis"] == "measured MFU of gpu_h200.json" and plan["stages"][0]["mfu"] == pytest.approx(mfu)
    argv = ["plan", str(ROOT / "yamls/deit_s.yaml"), *changes, "--results", str(tmp_path / "none"), "--images", "10000"]
    file, told = tmp_path / "gpu_h200.json", tmp_path / "plan.json"
    assert cli.main([*argv, "--gpu", "h200", "--measured", str(file), "--json", str(told)]) == 0
    assert json.loads(told.read_text())["hours"] == pytest.approx(plan["hours"])


@pytest.mark.parametrize(
    ("content", "argv", "told"),
    [
        (
            {"device": "NVIDIA H200", "smoke": True, "sections": {}},
            [],
            "gpu.json must be what benchmarks/gpu.py writes",
        ),
        (
            [1],
            [],
            "gpu.json must be what benchmarks/gpu.py writes without --quick, or vitcomposer bench",
        ),
        ({"device": "NVIDIA L4", "smoke": False, "sections": {}}, [], "--measured must be a file in which"),
        ({"device": "NVIDIA H200", "smoke": False, "sections": {}}, ["precision=amp_fp16"], "for precision amp_fp16"),
        (None, [], "--measured must be a file that is there"),
    ],
    ids=["quick", "list", "another card", "another precision", "missing"],
)
def test_file_that_does_not_measure_the_card_is_refused(
    content: object, argv: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    if content is not None:
        file.write_text(json.dumps(content))
    command = ["plan", str(ROOT / "yamls/deit_s.yaml"), *argv, "--gpu", "h200", "--measured", str(file)]
    assert cli.main(command) == 2
    assert told in capsys.readouterr().err


def quick(*sections: str) -> dict[str, Any]:
    found = gpu.main(["--device", "cpu", "--quick", "--sections", *sections])["sections"]
    assert all(found[section] for section in sections)
    return found


def test_both_sides_of_swav_run_and_the_device_makes_the_pixels_of_the_cpu() -> None:
    found = quick("swav", "augmentation")
    assert [row["who"] for row in found["swav"]] == ["timm", "vitcomposer"]
    pixels = found["augmentation"][-1]
    assert pixels["images_unlike_the_device"] == pixels["largest_difference"] == 0


@pytest.mark.slow
def test_every_section_runs() -> None:
    """The Trainer's rows that a CPU does not have say why; a rank whose peer is silent ends by its time-out."""
    found = quick(*gpu.SECTIONS)
    assert [row["model"] for row in found["training"]] == ["vit_s", "vit_s", "convit_s", "convit_s", "vit_b", "vit_b"]
    for row in found["trainer"]:
        assert (row["images_per_sec"] is None) == ("bf16" in row["setting"]) == (row["why"] is not None)
    (row,) = found["time_out"]
    assert row["exit_code"] == 1 and "Timed out" in row["why"] and row["ended_after_seconds"] < 30


def test_budget_leaves_out_what_would_not_end_in_time() -> None:
    def rows() -> Iterator[list[dict[str, Any]]]:
        for number in range(10):
            time.sleep(0.05)
            yield [{"number": number}]

    report: dict[str, Any] = {"left_out": {}, "smoke": False}
    found = [row for some in gpu._within(rows(), 0.18, "training", report) for row in some]
    assert 1 <= len(found) <= 3 and report["left_out"]["training"].endswith("of 0.18 s")


def test_failing_section_is_named_and_does_not_stop_the_others() -> None:
    def rows() -> Iterator[list[dict[str, Any]]]:
        yield [{"number": 0}]
        raise RuntimeError("CUDA out of memory\nmore")

    report: dict[str, Any] = {"left_out": {}, "smoke": False}
    assert len(list(gpu._within(rows(), 10.0, "batches", report))) == 1
    assert report["left_out"] == {"batches": "RuntimeError: CUDA out of memory"}


def test_budgets_stay_below_nine_minutes() -> None:
    assert sum(budget for budget, _ in gpu.SECTIONS.values()) <= 480
