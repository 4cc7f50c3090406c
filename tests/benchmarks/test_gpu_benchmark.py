"""The GPU benchmark in tiny on a CPU: it keeps to its budget, and the planner reads what it writes."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step import gpu
from tests.conftest import ROOT


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
    (tmp_path / "gpu_h200.json").write_text(json.dumps({**found, "device": "NVIDIA H200"}))
    changes = ["model.embed_dim=48", "model.num_heads=3", "model.depth=2"]
    cfg = config.load(ROOT / "yamls/deit_s.yaml", changes)
    plan = costs_of(cfg, gpu="h200", gpus=1, images=10_000, results=tmp_path)
    mfu = row["images_per_sec"] * row["train_flops_per_image"] / peak
    assert row["mfu"] == pytest.approx(mfu) and mfu > 0
    assert plan["basis"] == "measured MFU of gpu_h200.json" and plan["stages"][0]["mfu"] == pytest.approx(mfu)


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
    assert sum(budget for budget, _ in gpu.SECTIONS.values()) <= 500
