"""The k-NN monitor leaves training as it was, and the samples it takes are drawn once each."""

from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Callback, DataSpec, State
from composer.loggers import Logger, LoggerDestination
from torch import Tensor
from torch.utils.data import DataLoader

from tests.callbacks import tiny_run
from tests.callbacks.test_throughput import Clock
from vitcomposer.callbacks import KNNMonitor, Throughput
from vitcomposer.callbacks import throughput as throughput_module
from vitcomposer.data.evaluation import ChosenSamples, choose_samples
from vitcomposer.data.synthetic import SyntheticImages
from vitcomposer.evaluation.knn import knn_accuracy


class _Task(tiny_run.TinyTask):
    """The tiny classifier with features, dropout and a module that stays in evaluation mode on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model.insert(3, torch.nn.Dropout(0.5))
        self.model.append(torch.nn.BatchNorm1d(2))
        self.still = torch.nn.Dropout(0.5)

    def train(self, mode: bool = True) -> "_Task":
        super().train(mode)
        self.still.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        assert not self.model.training
        return self.model[:3](images)


class _Curve(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.modes: list[tuple[bool, ...]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, Tensor)
        self.losses.append(float(state.loss))
        self.modes.append(tuple(module.training for module in state.model.modules()))


class _Log(LoggerDestination):
    def __init__(self) -> None:
        self.seen: list[tuple[int | None, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "knn/top1" in metrics:
            assert metrics["knn/top1"] == max(metrics["knn/top1_k1"], metrics["knn/top1_k3"])
            self.seen.append((step, metrics["knn/top1"]))


class _Stop(Callback):
    """Ends training as a signal does."""

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 5:
            state.stop_training()


class _Slow(Callback):
    """Two seconds a step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def before_forward(self, state: State, logger: Logger) -> None:
        self.clock.sleep(2)


def tiny_training(monitored: bool, *first: Callback) -> tuple[_Curve, _Log]:
    """Eight steps whose dropout draws from the global generator, in order: no seed per step hides a draw too many."""
    task, curve, log = _Task(), _Curve(), _Log()
    split = DataSpec(DataLoader(tiny_run.Images(), batch_size=6, generator=torch.Generator()))
    monitor = KNNMonitor(task, split, split, k=[1, 3], temperature=0.07, interval="3ba")
    trainer = Trainer(
        model=task,
        train_dataloader=DataLoader(tiny_run.Images(), batch_size=tiny_run.BATCH, generator=torch.Generator()),
        optimizers=torch.optim.AdamW(task.parameters(), lr=1e-2),
        callbacks=[*first, *([monitor] if monitored else []), curve],
        loggers=[log],
        max_duration="2ep",
        device="cpu",
        seed=0,
        progress_bar=False,
    )
    trainer.fit()
    trainer.close()
    return curve, log


def test_monitor_leaves_the_loss_curve_bitwise_unchanged() -> None:
    (without, nothing), (with_it, log) = tiny_training(False), tiny_training(True)
    assert with_it.losses == without.losses and len(set(without.losses)) == 8
    assert with_it.modes == without.modes and True in with_it.modes[-1] and False in with_it.modes[-1]
    assert nothing.seen == [] and [step for step, _ in log.seen] == [0, 3, 6, 8]
    assert log.seen[-1][1] == 1.0, "every image is its own nearest neighbour"


def test_monitor_takes_no_time_of_a_run_that_a_signal_ends() -> None:
    curve, log = tiny_training(True, _Stop())
    assert len(curve.losses) == 5 and [step for step, _ in log.seen] == [0, 3]


def test_its_seconds_are_those_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, throughput = Clock(), Throughput(None, "fp32")
    monkeypatch.setattr(throughput_module, "time", clock)

    def slow(*args: Any, **options: Any) -> dict[str, float]:
        clock.sleep(7)
        return knn_accuracy(*args, **options)

    monkeypatch.setattr("vitcomposer.callbacks.knn.knn_accuracy", slow)
    tiny_training(True, throughput, _Slow(clock))
    assert throughput.evaluation_seconds == 4 * 7 and throughput.wall_seconds == 4 * 7 + 8 * 2
    assert throughput.seconds + throughput.warmup_seconds == 8 * 2


def test_samples_are_drawn_once_each_and_shared_by_seed() -> None:
    ids = choose_samples(1000, 100, seed=3)
    assert len(set(ids.tolist())) == 100 and ids.min() >= 0 and ids.max() < 1000
    assert ids.tolist() == sorted(ids.tolist()) == choose_samples(1000, 100, seed=3).tolist()
    assert ids.tolist() != choose_samples(1000, 100, seed=4).tolist()
    assert choose_samples(10, None, seed=0).tolist() == choose_samples(10, 99, seed=0).tolist() == list(range(10))


def test_chosen_samples_do_not_move_the_epochs_on() -> None:
    def epoch(images: SyntheticImages) -> list[int]:
        return [sample["sample_id"] for sample in images]

    first, second = (
        SyntheticImages(num_samples=20, num_classes=4, batch_size=4, shuffle=True, seed=0) for _ in range(2)
    )
    chosen = ChosenSamples(second, choose_samples(20, 6, seed=0), batch_size=4)
    assert epoch(first) == epoch(second)
    assert [sample["sample_id"] for sample in chosen] == choose_samples(20, 6, seed=0).tolist()
    assert epoch(first) == epoch(second)
