import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback
from composer.optim import LinearScheduler

from tests.callbacks import tiny_run
from vitcomposer.callbacks import RunRecord, Throughput
from vitcomposer.runs.environment import describe_environment

FACTS = {"recipe": "supervised", "model": "tiny", "seed": 0, "lr_peak": 1e-2, "class_imbalance": None}
DESIGN_FIELDS = (
    "recipe, model, top1, top5, loss, epochs, steps, images_seen, seconds, images_per_sec, data_wait_fraction, "
    "train_flops, mfu, peak_memory_bytes, world_size, device, seed, git_commit"
)


def record_in(folder: Path, **options: Any) -> tuple[RunRecord, Throughput]:
    throughput = Throughput(lambda step: 1000, "fp32")
    return RunRecord(folder, "recipe: supervised\n", FACTS, throughput=throughput, **options), throughput


def run(
    folder: Path, max_duration: str, *, log_interval: str = "1ba", callbacks: tuple[Callback, ...] = (), **options: Any
) -> Any:
    record, throughput = record_in(folder, log_interval=log_interval)
    trainer = tiny_run.build(max_duration, callbacks=[throughput, *callbacks], loggers=[record], **options)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer


def lines_of(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_run_folder_tells_the_story_of_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    run(folder, "3ep", ema=True)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
    ]
    assert (folder / "config.yaml").read_text() == "recipe: supervised\n"
    summary, last = summary_of(folder), lines_of(folder)[-1]
    more = {"top1_ema", "top5_ema", "class_top1", "class_top1_ema", "class_imbalance", "knn", "lr_peak", "finished"}
    more |= {"bad_images", "bad_eval_images"}
    more |= {"weakest", "best", "stopped_by", "train_seconds", "evaluation_seconds", "saving_seconds", "gpu_hours"}
    assert set(summary) == {*DESIGN_FIELDS.split(", "), *more}
    assert summary["recipe"] == "supervised" and summary["model"] == "tiny" and summary["lr_peak"] == 0.01
    assert summary["top1"] == last["metrics/eval/top1"] and 0 <= summary["top1"] <= 1
    assert summary["loss"] == last["metrics/eval/loss"]
    assert summary["top1_ema"] == last["metrics/ema/top1"]
    assert summary["epochs"] == 3 and summary["steps"] == 12 and summary["images_seen"] == 96
    assert summary["train_flops"] == 96_000 and summary["world_size"] == 1 and summary["device"] == "cpu"
    assert summary["seconds"] > 0 and summary["images_per_sec"] > 0 and 0 < summary["data_wait_fraction"] < 1
    assert [summary[name] for name in ("top5", "top5_ema", "mfu", "peak_memory_bytes")] == [None] * 4
    assert summary["finished"] is True


def test_metrics_have_one_line_per_logged_step(tmp_path: Path) -> None:
    run(tmp_path, "3ep", log_interval="3ba")
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 9, 12], "every 3 steps and every evaluation"
    assert [line["epoch"] for line in lines] == [0.75, 1, 1.5, 2, 2.25, 3]
    assert [line["sample"] for line in lines] == [8 * line["step"] for line in lines]
    assert ["metrics/eval/top1" in line for line in lines] == [False, True, False, True, False, True]
    assert all({"seconds", "lr", "loss/train/total"} <= set(line) for line in lines)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert "throughput/images_per_sec" in lines[-1]
    assert not any(name.startswith("time/") for line in lines for name in line)


def test_lr_is_that_of_the_step(tmp_path: Path) -> None:
    class Used(Callback):
        lrs: list[float] = []

        def before_train_batch(self, state: Any, logger: Any) -> None:
            self.lrs.append(state.optimizers[0].param_groups[0]["lr"])

    used = Used()
    schedule = LinearScheduler(alpha_i=1.0, alpha_f=0.0)
    run(tmp_path, "4ba", schedulers=schedule, eval_interval=0, callbacks=(used,))
    assert [line["lr"] for line in lines_of(tmp_path)] == used.lrs
    assert len(set(used.lrs)) == 3, "Composer's scheduler is one step behind, and that is what the optimizer used"


def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    save = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": "3ba", "save_overwrite": True}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, "3ep")
    with pytest.raises(RuntimeError, match="the loss went away"):
        run(broken, "3ep", fail_at=9, **save)  # after step 8; the last checkpoint is of step 6
    assert not (broken / "summary.json").exists(), "a run that failed has no summary"
    assert [line["step"] for line in lines_of(broken)] == list(range(1, 9))
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "epo')
    run(broken, "3ep", load_path=str(tmp_path / "checkpoints" / "latest-rank0.pt"), **save)
    a, b = lines_of(whole), lines_of(broken)
    assert [line["step"] for line in b] == list(range(1, 13))
    for name in ("loss/train/total", "metrics/eval/top1", "metrics/eval/loss", "epoch", "sample", "lr"):
        assert [line.get(name) for line in b] == [line.get(name) for line in a], name
    assert [line["seconds"] for line in b] == sorted(line["seconds"] for line in b)
    summary, unbroken = summary_of(broken), summary_of(whole)
    for name in ("top1", "loss", "steps", "images_seen", "train_flops", "finished"):
        assert summary[name] == unbroken[name]


def test_evaluation_after_a_resume_extends_the_line_of_its_step(tmp_path: Path) -> None:
    class StopAtEpochEnd(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch == 4:
                state.evaluators[0].eval_interval = lambda state, event: False
                state.stop_training()

    save = {"save_folder": str(tmp_path / "checkpoints"), "save_interval": "100ep", "save_overwrite": True}
    run(tmp_path, "2ep", callbacks=(StopAtEpochEnd(),), **save)
    stopped = summary_of(tmp_path)
    assert stopped["finished"] is False and stopped["steps"] == 4 and stopped["top1"] is None
    run(tmp_path, "2ep", load_path=str(tmp_path / "checkpoints" / "latest-rank0.pt"), **save)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert "metrics/eval/top1" in lines[3] and "loss/train/total" in lines[3]
    assert summary_of(tmp_path)["finished"] is True


def test_longer_run_in_the_folder_of_a_finished_one_takes_its_summary_away(tmp_path: Path) -> None:
    run(tmp_path, "1ep")
    assert summary_of(tmp_path)["finished"]
    with pytest.raises(RuntimeError, match="the loss went away"):
        run(tmp_path, "2ep", fail_at=2)
    assert not (tmp_path / "summary.json").exists()
    assert [line["step"] for line in lines_of(tmp_path)] == [1], "a run from step 0 starts its metrics anew"


def test_evaluation_at_the_end_of_training_reaches_the_summary(tmp_path: Path) -> None:
    run(tmp_path, "3ba", eval_interval="100ba")
    assert summary_of(tmp_path)["top1"] is not None
    assert lines_of(tmp_path)[-1]["metrics/eval/top1"] == summary_of(tmp_path)["top1"]
    assert summary_of(tmp_path)["epochs"] == 0.75


def test_only_numbers_are_logged_and_json_stays_valid(tmp_path: Path) -> None:
    class Odd(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            odd = {
                "odd/nan": math.nan,
                "odd/tensor": torch.tensor(2.5, requires_grad=True),
                "odd/int": torch.tensor(3),
                "odd/matrix": torch.zeros(2, 2),
                "odd/text": "no",
                "odd/flag": True,
            }
            logger.log_metrics(odd)

    run(tmp_path, "1ba", callbacks=(Odd(),), eval_interval=0)
    (line,) = lines_of(tmp_path)
    odd = {name: value for name, value in line.items() if name.startswith("odd/")}
    assert odd == {"odd/nan": None, "odd/tensor": 2.5, "odd/int": 3}


def test_missing_fact_is_refused(tmp_path: Path) -> None:
    facts = {"recipe": "supervised", "model": "tiny", "seed": 0}
    with pytest.raises(ValueError, match="lr_peak.*got .'model', 'recipe', 'seed'."):
        RunRecord(tmp_path, "", facts, throughput=Throughput(None, "fp32"))


def test_environment_names_versions_and_hardware_but_not_the_host() -> None:
    environment = describe_environment()
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert all(environment["packages"].values())
    assert environment["cpu"]["cores"] == os.cpu_count() and environment["memory_bytes"] > 2**28
    assert environment["world_size"] == environment["nodes"] == 1
    assert environment["gpus"] == [] or environment["gpu_driver"]
    assert socket.gethostname() not in json.dumps({**environment, "command": ""})
