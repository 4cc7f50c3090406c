import io
import logging
import re
import sys
from typing import Any

import pytest
from composer import Callback

from tests.callbacks import tiny_run
from vitcomposer.callbacks import Progress, Throughput


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, max_duration: str, **options: Any) -> str:
    throughput = Throughput(None, "fp32")
    progress = Progress(throughput, stream=stream, seconds_per_line=options.pop("seconds_per_line", 30.0))
    trainer = tiny_run.build(max_duration, callbacks=[throughput, progress], **options)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return stream.getvalue()


def test_log_file_gets_one_plain_line_per_evaluation() -> None:
    lines = run(io.StringIO(), "3ep").splitlines()
    assert [re.search(r"epoch (\d/\d)  step (\d+/12)", line).groups() for line in lines] == [  # type: ignore[union-attr]
        ("1/3", "1/12"),
        ("1/3", "4/12"),
        ("2/3", "8/12"),
        ("3/3", "12/12"),
    ]
    assert "top-1" not in lines[0]
    assert re.search(r"loss \d\.\d{4}  top-1 \d+\.\d\d %  [\d,]+ images/s  00:0\d elapsed, 00:00 left", lines[-1])
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_line_has_the_accuracy_of_the_average_beside_that_of_the_weights() -> None:
    stream = io.StringIO()
    throughput = Throughput(None, "fp32")
    shown, seen = Progress(throughput, stream=stream), Evaluated()
    trainer = tiny_run.build("2ep", callbacks=[throughput, shown, seen], ema=True)
    trainer.fit()
    trainer.close()
    raw, average = (100 * seen.top1[label] for label in ("eval", "ema"))
    assert f"top-1 {raw:.2f} %  EMA {average:.2f} %" in stream.getvalue().splitlines()[-1]


class Evaluated(Callback):
    """The last top-1 of each evaluator."""

    def __init__(self) -> None:
        self.top1: dict[str, float] = {}

    def eval_end(self, state: Any, logger: Any) -> None:
        self.top1[state.dataloader_label] = float(state.eval_metrics[state.dataloader_label]["top1"].compute())


def test_log_file_gets_lines_by_time_without_evaluation() -> None:
    lines = run(io.StringIO(), "5ba", eval_interval=0, seconds_per_line=0.0).splitlines()
    assert [line.split("  ")[1] for line in lines] == [f"step {n}/5" for n in range(1, 6)]


@pytest.mark.parametrize("max_duration, total", [("2ep", 8), ("6ba", 6), ("44sp", 6)])
def test_terminal_bar_counts_the_batches_of_the_whole_run(max_duration: str, total: int) -> None:
    shown = run(Terminal(), max_duration)
    assert f" {total}/{total} " in shown
    assert "100%" in shown
    assert shown.endswith("\n"), "the shell prompt starts on its own line"
    last = shown.split("\r")[-1]
    assert "loss" in last and "top-1" in last and "images/s" in last


def test_terminal_shows_the_progress_of_an_evaluation() -> None:
    assert "eval 1/4" in run(Terminal(), "1ep")


def test_bar_ends_cleanly_when_training_fails() -> None:
    stream = Terminal()
    root_handlers = list(logging.getLogger().handlers)
    with pytest.raises(RuntimeError, match="the loss went away"):
        run(stream, "2ep", fail_at=6)
    assert stream.getvalue().endswith("\n")
    assert " 5/8 " in stream.getvalue()
    assert logging.getLogger().handlers == root_handlers, "redirection of log records is undone"


def test_log_records_do_not_cut_into_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Talk(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            logging.getLogger("talk").warning("step %d is slow", state.timestamp.batch.value)

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        throughput = Throughput(None, "fp32")
        trainer = tiny_run.build("1ep", callbacks=[throughput, Progress(throughput), Talk()])
        trainer.fit()
        trainer.close()
    finally:
        logging.getLogger().removeHandler(handler)
    assert re.findall(r"[\r\n]step (\d) is slow\n", stream.getvalue()) == ["1", "2", "3", "4"]
    assert stream.getvalue().count("is slow") == 4
