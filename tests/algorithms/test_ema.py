"""The moving average: measured beside the raw weights, in every checkpoint, and never left in the model."""

import copy

import pytest
import torch
from composer import Callback, Evaluator, Trainer

from tests.algorithms.algorithm_runs import Task, assert_equal, build, checkpointed, data_spec, fit, weights
from vitcomposer.algorithms import (
    EMA_LABEL,
    averaged_weights,
)


def evaluators() -> list[Evaluator]:
    return [Evaluator(label=label, dataloader=data_spec(), metric_names=["weight"]) for label in ("eval", EMA_LABEL)]


class Measured(Callback):
    """What each evaluation saw: (label, batch, sum of the head's weights)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float]] = []

    def eval_end(self, state, logger):
        label = state.dataloader_label
        self.seen.append((label, int(state.timestamp.batch), float(state.eval_metrics[label]["weight"].compute())))


def head_sum(values: dict[str, torch.Tensor]) -> float:
    return values["model.head.weight"].sum().item()


def test_ema_evaluates_the_average_under_its_label_and_raw_weights_elsewhere(tmp_path):
    """Evaluation and a checkpoint after every batch: the order in which Composer's own EMA leaves weights swapped."""
    plain, _, _ = fit([], "6ba")
    measured = Measured()
    (ema,) = build("EMA", half_life="2ba", update_interval="1ba")
    trainer, _, record = fit(
        [ema],
        "6ba",
        eval_dataloader=evaluators(),
        eval_interval="1ba",
        callbacks=[measured],
        **checkpointed(tmp_path),
    )
    assert_equal(weights(plain), weights(trainer))  # training never saw the average, nor is it left in the model

    smoothing = 2**-0.5
    average = {name: value.double() for name, value in record.weights[0].items()}
    averages = [average]
    for raw in record.weights[1:]:
        average = {name: smoothing * average[name] + (1 - smoothing) * raw[name] for name in raw}
        averages.append(average)
    for name, value in ema.ema_model.named_parameters_dict.items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
    expected = {"eval": record.weights, EMA_LABEL: averages}
    assert {(label, batch) for label, batch, _ in measured.seen} == {(lb, b) for lb in expected for b in range(1, 7)}
    for label, batch, value in measured.seen:
        assert value == pytest.approx(head_sum(expected[label][batch - 1]), rel=1e-4, abs=1e-6), (label, batch)

    checkpoint = torch.load(tmp_path / "ba4.pt", weights_only=False)
    raw = checkpoint["state"]["model"]
    assert all(torch.equal(raw[name], value) for name, value in record.weights[3].items())
    averaged = averaged_weights(checkpoint)
    assert averaged.keys() == raw.keys()
    for name, value in averages[3].items():
        torch.testing.assert_close(averaged[name].double(), value, rtol=1e-5, atol=1e-7)
    Task().load_state_dict(averaged)


def test_ema_copies_integer_buffers():
    """Composer's EMA averages them in floating point and cuts: at 0.9 it gets 280 of these 1000 constants wrong."""
    trainer, task, _ = fit(build("EMA", smoothing=0.9, update_interval="1ba"), "6ba")
    buffers = trainer.state.algorithms[0].ema_model.named_buffers_dict
    assert torch.equal(buffers["positions"], torch.arange(1000))
    assert buffers["steps"] == 6 == task.steps


def test_ema_updates_at_its_interval_after_its_start():
    trainer, _, record = fit(build("EMA", smoothing=0.5, update_interval="2ba", ema_start="3ba"), "6ba")
    third, fourth, sixth = (record.weights[i]["model.head.weight"] for i in (2, 3, 5))
    average = trainer.state.algorithms[0].ema_model.named_parameters_dict["model.head.weight"]
    torch.testing.assert_close(average, 0.5 * (0.5 * third + 0.5 * fourth) + 0.5 * sixth)


class Begins(Callback):
    """The step after which there is an average."""

    def __init__(self) -> None:
        self.step: int | None = None

    def batch_end(self, state, logger):
        if self.step is None and state.algorithms[0].ema_started:
            self.step = int(state.timestamp.batch)

    epoch_end = batch_end


@pytest.mark.parametrize(
    ("ema_start", "update_interval", "duration", "longer"),
    [
        ("0.5dur", "1ba", "6ba", "12ba"),
        ("0.5dur", "1ba", "6ba", "11ba"),
        ("0.5dur", "1ba", "6ba", "30ba"),
        ("0.25dur", "1ba", "2ep", "5ep"),
        ("0.5dur", "1ep", "2ep", "4ep"),
        ("0.75dur", "1ep", "2ep", "4ep"),
        ("0.5dur", "1ba", "24sp", "48sp"),
        ("4ba", "1ba", "6ba", "12ba"),
        ("1ep", "1ba", "6ba", "12ba"),
    ],
)
def test_ema_of_a_longer_run_starts_where_that_of_its_length_does(
    ema_start, update_interval, duration, longer, tmp_path
):
    """Three steps an epoch; six are trained before the run is made longer."""

    def run(max_duration, **options):
        begins = Begins()
        algorithms = build("EMA", smoothing=0.5, update_interval=update_interval, ema_start=ema_start)
        trainer, _, record = fit(algorithms, max_duration, callbacks=[begins], **options)
        return begins.step, record, trainer.state.algorithms[0]

    start, *_ = run(longer)
    run(duration, **checkpointed(tmp_path))
    again, record, ema = run(longer, load_path=str(tmp_path / "ba6.pt"))
    assert start is not None and again == max(6, start)
    if start >= 6 and update_interval == "1ba":
        raw = torch.load(tmp_path / "ba6.pt", weights_only=False)["state"]["model"]["model.head.weight"]
        weights_after = {6: raw, **{6 + n: kept["model.head.weight"] for n, kept in enumerate(record.weights, 1)}}
        average = weights_after[start]
        for step in range(start + 1, max(weights_after) + 1):
            average = 0.5 * average + 0.5 * weights_after[step]
        torch.testing.assert_close(ema.ema_model.named_parameters_dict["model.head.weight"], average)


def test_ema_before_its_start_evaluates_raw_weights():
    measured = Measured()
    (ema,) = build("EMA", half_life="2ba", update_interval="1ba", ema_start="5ba")
    task = Task()
    trainer = Trainer(
        model=task,
        eval_dataloader=evaluators(),
        algorithms=[ema],
        callbacks=[measured],
        device="cpu",
        progress_bar=False,
    )
    trainer.eval()
    trainer.close()
    assert [value for _, _, value in measured.seen] == [task.model.head.weight.sum().item()] * 2


def test_ema_of_a_loaded_checkpoint_is_evaluated_without_training(tmp_path):
    trained, _, _ = fit(build("EMA", half_life="2ba", update_interval="1ba"), "4ba", **checkpointed(tmp_path))
    measured = Measured()
    trainer = Trainer(
        model=Task(),
        eval_dataloader=evaluators(),
        algorithms=build("EMA", half_life="2ba", update_interval="1ba"),
        callbacks=[measured],
        load_path=str(tmp_path / "ba4.pt"),
        device="cpu",
        progress_bar=False,
    )
    trainer.eval()
    trainer.close()
    raw, averaged = (value for _, _, value in measured.seen)
    average = trained.state.algorithms[0].ema_model.named_parameters_dict
    assert raw == pytest.approx(head_sum(weights(trained)), rel=1e-5)
    assert averaged == pytest.approx(head_sum(average), rel=1e-5)
    assert raw != pytest.approx(averaged, rel=1e-3)
    assert_equal(weights(trained), weights(trainer))


@pytest.mark.parametrize(
    ("arguments", "duration", "says"),
    [
        ({"smoothing": 0.9, "update_interval": "1ba"}, "30ba", None),
        ({"smoothing": 0.9, "update_interval": "1ba"}, "29ba", "averages 10 steps of 29: too long, it lags behind. "),
        ({"smoothing": 0.9, "update_interval": "1ba"}, "29ba", "EMA={smoothing: 0.6552, update_interval: 1ba}"),
        ({"smoothing": 0.5, "update_interval": "5ba"}, "29ba", "Leave it out."),
        ({"half_life": "2ep"}, "8ep", "averages 3 epochs of 8: "),
        ({"half_life": "2ep"}, "33ba", None),  # 11 epochs
        ({"half_life": "0.07dur", "update_interval": "1ba"}, "100ba", None),
        ({"half_life": "0.5dur", "update_interval": "1ep"}, "10ep", "averages 8 epochs of 10: "),
    ],
)
def test_window_longer_than_a_third_of_the_run_is_said_at_the_start(arguments, duration, says, caplog):
    class Stop(Callback):
        def batch_end(self, state, logger):
            state.stop_training()

    with caplog.at_level("WARNING", logger="vitcomposer"):
        fit(build("EMA", **arguments), duration, callbacks=[Stop()])
    assert (says in caplog.text) if says else not caplog.text


@pytest.mark.parametrize(("interval", "half_life"), [("1ba", 3.0), ("1ep", 1.0)])
def test_half_life_as_a_share_of_the_run_follows_its_length(interval, half_life):
    for epochs in (2, 4):
        (share,) = build(
            "EMA", half_life=f"{half_life / (3 if interval == '1ba' else 1) / epochs}dur", update_interval=interval
        )
        (plain,) = build("EMA", half_life=f"{half_life:.0f}{interval[1:]}", update_interval=interval)
        trained, _, _ = fit([share], f"{epochs}ep")
        other, _, _ = fit([plain], f"{epochs}ep")
        assert share.smoothing == pytest.approx(plain.smoothing, rel=1e-9)
        for name, value in share.ema_model.named_parameters_dict.items():
            torch.testing.assert_close(value, plain.ema_model.named_parameters_dict[name])
        assert_equal(weights(trained), weights(other))


def test_averaged_weights_need_a_started_average(tmp_path):
    fit(build("EMA", half_life="2ba", update_interval="1ba", ema_start="5ba"), "1ba", **checkpointed(tmp_path))
    checkpoint = torch.load(tmp_path / "ba1.pt", weights_only=False)
    with pytest.raises(ValueError, match="saved before ema_start"):
        averaged_weights(checkpoint)
    without = copy.copy(checkpoint)
    without["state"] = {**checkpoint["state"], "algorithms": [("SAM", {})]}
    with pytest.raises(ValueError, match=r"holds \['SAM'\]"):
        averaged_weights(without)
