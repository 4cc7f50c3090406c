from typing import Any

import pytest
from composer import Callback

from tests.callbacks import tiny_run
from vitcomposer.callbacks import Throughput
from vitcomposer.callbacks import throughput as throughput_module


class Captured(Callback):
    """What a logger would have received at each step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def attach(self, trainer: Any) -> "Captured":
        original = trainer.logger.log_metrics
        trainer.logger.log_metrics = lambda metrics, step=None: (self.lines.append(metrics), original(metrics, step))
        return self

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]


class Clock:
    """Stands for the time module, so that a busy machine changes nothing: time passes only where someone sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput_module, "time", clock)
    monkeypatch.setattr(tiny_run, "time", clock)
    return clock


class Pauses(Callback):
    """Where evaluation and checkpoints take their time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def eval_start(self, state: Any, logger: Any) -> None:
        self.clock.sleep(100)

    def batch_checkpoint(self, state: Any, logger: Any) -> None:
        self.clock.sleep(10)

    def epoch_checkpoint(self, state: Any, logger: Any) -> None:
        self.clock.sleep(1000)


def test_data_wait_separates_loader_from_model(clock: Clock) -> None:
    throughput = Throughput(None, "fp32")
    # 8 images of 0.25 s are 2 s of loading before each step of 3 s.
    trainer = tiny_run.build("3ep", callbacks=[throughput], eval_interval=0, seconds_per_image=0.25, seconds_per_step=3)
    trainer.fit()
    trainer.close()
    assert throughput.images == 10 * tiny_run.BATCH, "12 steps less 2 of warm-up"
    assert throughput.warmup_images == 2 * tiny_run.BATCH
    assert throughput.warmup_seconds == pytest.approx(10)
    assert throughput.data_wait_fraction == pytest.approx(2 / 5)
    assert throughput.images_per_sec == pytest.approx(tiny_run.BATCH / 5)
    assert throughput.wall_seconds == pytest.approx(60)


def test_evaluation_and_checkpoints_do_not_count_as_training(clock: Clock) -> None:
    throughput = Throughput(None, "fp32")
    trainer = tiny_run.build("3ep", callbacks=[throughput, Pauses(clock)], seconds_per_step=3)
    trainer.fit()
    trainer.close()
    assert throughput.seconds == pytest.approx(10 * 3)
    assert throughput.wait_seconds == 0
    assert throughput.wall_seconds == pytest.approx(12 * (3 + 10) + 3 * (100 + 1000))
    clock.sleep(5)
    assert throughput.wall_seconds == pytest.approx(12 * (3 + 10) + 3 * (100 + 1000)), "the clock stops at close"


def test_start_of_the_loader_counts_as_waiting(clock: Clock) -> None:
    class SlowStart(Callback):
        """Between EPOCH_START and BEFORE_DATALOADER, where workers start, and as the epoch runs out."""

        def epoch_start(self, state: Any, logger: Any) -> None:
            clock.sleep(7)

        def before_dataloader(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch_in_epoch == tiny_run.STEPS_PER_EPOCH:
                clock.sleep(5)

    throughput = Throughput(None, "fp32")
    trainer = tiny_run.build("3ep", callbacks=[throughput, SlowStart()], eval_interval=0, seconds_per_step=3)
    trainer.fit()
    trainer.close()
    assert throughput.wait_seconds == pytest.approx(2 * (7 + 5)), "the first start belongs to the warm-up"
    assert throughput.seconds == pytest.approx(10 * 3 + 2 * (7 + 5))


def test_logged_rate_follows_the_window(clock: Clock) -> None:
    class SlowDown(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch == 5:
                state.model.seconds_per_step = 4

    throughput = Throughput(None, "fp32", window=2)
    trainer = tiny_run.build("2ep", callbacks=[throughput, SlowDown()], eval_interval=0, seconds_per_step=1)
    captured = Captured().attach(trainer)
    trainer.fit()
    trainer.close()
    rates = captured.values("throughput/images_per_sec")
    assert rates == pytest.approx([8, 8, 8, 16 / 5, 2, 2]), "8 steps less 2 of warm-up"
    assert throughput.recent_images_per_sec == rates[-1]
    assert throughput.images_per_sec == pytest.approx(48 / 15)
    assert captured.values("throughput/data_wait_fraction") == [0] * 6
    assert captured.values("throughput/mfu") == [], "a CPU has no peak"


def test_mfu_divides_by_the_peak_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = Throughput(lambda step: 1e9, "amp_bf16")
    throughput.flops, throughput.seconds = 1e12, 2.0
    assert throughput.mfu is None
    throughput._peak = 1e12
    assert throughput.mfu == pytest.approx(0.5)
    monkeypatch.setattr(throughput_module.dist, "get_world_size", lambda: 4)
    assert throughput.mfu == pytest.approx(0.125)


def test_totals_survive_a_resume() -> None:
    first = Throughput(None, "fp32")
    trainer = tiny_run.build("1ep", callbacks=[first])
    trainer.fit()
    state = first.state_dict()
    trainer.close()
    second = Throughput(None, "fp32")
    second.load_state_dict(state)
    trainer = tiny_run.build("1ep", callbacks=[second])
    trainer.fit()
    trainer.close()
    assert second.images == 2 * first.images == 4 * tiny_run.BATCH
    assert second.warmup_images == 2 * first.warmup_images
    assert second.seconds > first.seconds > 0
    assert second.wall_seconds > state["wall_seconds"] > 0
    assert second.peak_memory_bytes is None


def test_a_run_within_the_warm_up_reports_nothing() -> None:
    throughput = Throughput(lambda step: 1e9, "fp32")
    trainer = tiny_run.build("2ba", callbacks=[throughput], eval_interval=0)
    trainer.fit()
    trainer.close()
    assert throughput.images_per_sec is throughput.data_wait_fraction is throughput.mfu is None
    assert throughput.warmup_seconds > 0
    assert throughput.train_flops == 2 * tiny_run.BATCH * 1e9


def test_flops_are_those_of_each_step(clock: Clock) -> None:
    throughput = Throughput(lambda step: 10**step, "fp32", window=2)
    trainer = tiny_run.build("5ba", callbacks=[throughput], eval_interval=0, seconds_per_step=1)
    trainer.fit()
    trainer.close()
    assert throughput.train_flops == tiny_run.BATCH * 11111
    assert throughput.flops == tiny_run.BATCH * 11100, "two steps of warm-up"
    again = Throughput(lambda step: 10**step, "fp32")
    again.load_state_dict(throughput.state_dict())
    assert again.train_flops == throughput.train_flops
    assert Throughput(None, "fp32").train_flops is None


def test_logged_mfu_weighs_the_steps_of_the_window(clock: Clock) -> None:
    class Peak(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            throughput._peak = 1e3 * tiny_run.BATCH

    throughput = Throughput(lambda step: 10.0 * step, "fp32", window=2)
    trainer = tiny_run.build("5ba", callbacks=[throughput, Peak()], eval_interval=0, seconds_per_step=1)
    captured = Captured().attach(trainer)
    trainer.fit()
    trainer.close()
    assert captured.values("throughput/mfu") == pytest.approx([0.02, 0.025, 0.035])
    assert throughput.mfu == pytest.approx(0.03)
