import io
import json
import logging
import re
import sys
import time
from typing import Any

import pytest
from composer import Callback

from tests.callbacks import tiny_run
from vitcomposer.callbacks import Progress, Throughput
from vitcomposer.runs.closing import clock


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO, max_duration: str, **options: Any) -> str:
    throughput = Throughput(None, "fp32")
    shown = {name: options.pop(name) for name in ("seconds_per_line", "output") if name in options}
    progress = Progress(throughput, stream=stream, **shown)
    more = options.pop("callbacks", [])
    trainer = tiny_run.build(max_duration, callbacks=[throughput, progress, *more], **options)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return stream.getvalue()


def test_log_file_gets_one_row_per_evaluation() -> None:
    printed = run(io.StringIO(), "3ep")
    head, first, *rows = printed.splitlines()
    assert head.split() == ["epoch", "loss", "val", "top-1", "images/s", "waited", "left"]
    assert re.fullmatch(r" +0\.25 +\d\.\d{3} +\S*", first), "the first step is told at once"
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert re.fullmatch(r" +3 +\d\.\d{3} +\d+\.\d +[\d,]+ +\d+ % +0:00", rows[-1])
    assert len({len(line) for line in (head, *rows)}) == 1, "columns stand below each other"
    assert "\r" not in printed and "\x1b" not in printed


def test_row_has_the_accuracy_of_the_average_beside_that_of_the_weights() -> None:
    stream, seen = io.StringIO(), Evaluated()
    printed = run(stream, "2ep", callbacks=[seen], ema=True)
    raw, average = (100 * seen.top1[label] for label in ("eval", "ema"))
    assert printed.splitlines()[-1].split()[2:4] == [f"{raw:.1f}", f"{average:.1f}"]


class Slow(Callback):
    """The bar moves ten times a second at most."""

    def batch_start(self, state: Any, logger: Any) -> None:
        time.sleep(0.11)


class Evaluated(Callback):
    """The last top-1 of each evaluator."""

    def __init__(self) -> None:
        self.top1: dict[str, float] = {}

    def eval_end(self, state: Any, logger: Any) -> None:
        self.top1[state.dataloader_label] = float(state.eval_metrics[state.dataloader_label]["top1"].compute())


def test_log_file_gets_rows_by_time_without_evaluation() -> None:
    _, *rows = run(io.StringIO(), "5ba", eval_interval=0, seconds_per_line=0.0).splitlines()
    assert [row.split()[0] for row in rows[:5]] == ["0.25", "0.5", "0.75", "1", "1.25"]


def test_json_is_an_object_a_row() -> None:
    rows = [json.loads(line) for line in run(io.StringIO(), "2ep", output="json").splitlines()]
    assert [(row["event"], row["step"], row["epoch"]) for row in rows] == [
        ("row", 1, 0.25),
        ("row", 4, 1),
        ("row", 8, 2),
    ]
    assert rows[0]["top1"] is None and 0 <= rows[-1]["top1"] <= 1 and rows[-1]["seconds_left"] == 0


@pytest.mark.parametrize("max_duration", ["2ep", "6ba", "44sp"])
def test_terminal_has_a_bar_of_the_epoch_below_the_rows(max_duration: str) -> None:
    shown = run(Terminal(), max_duration, callbacks=[Slow()])
    of = "/2" if max_duration == "2ep" else ""
    assert re.search(rf"\repoch 1{of} ▕\S+ *▏ *\d+ %  loss \d\.\d+", shown)
    rows = [line for line in re.split(r"[\r\n]", shown) if re.match(r" +\d[\d.]* +\d\.\d{3} +\d+\.\d ", line)]
    assert [row.split()[0] for row in rows] == ["1", "2" if max_duration == "2ep" else "1.5"]


def test_terminal_that_cannot_move_its_cursor_gets_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\r" not in run(Terminal(), "1ep")


def test_terminal_shows_the_progress_of_an_evaluation() -> None:
    assert "eval 1/4" in run(Terminal(), "1ep")


def test_bar_ends_cleanly_when_training_fails() -> None:
    stream = Terminal()
    root_handlers = list(logging.getLogger().handlers)
    with pytest.raises(RuntimeError, match="the loss went away"):
        run(stream, "2ep", fail_at=6)
    assert re.search(r"[\r\n] *\r?$", stream.getvalue()), "the shell prompt starts on its own line"
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


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (422, "7:02"), (4022, "1:07:02")])
def test_time_is_minutes_and_seconds(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
