"""Schedule-free AdamW: what is measured and saved is the average, and nothing but training changes training."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from composer import Callback, Evaluator, Trainer
from schedulefree import AdamWScheduleFree

from tests.algorithms.algorithm_runs import Record, Task, assert_equal, checkpointed, data_spec, weights
from tests.conftest import ROOT, run_train, tiny_photo_overrides
from tests.training.test_train import losses
from vitcomposer.algorithms.schedule_free import ScheduleFreeWeights
from vitcomposer.errors import ConfigError
from vitcomposer.optim import build_optimizer
from vitcomposer.schema import Optimizer

CONFIG = Optimizer(name="adamw_schedulefree", lr=1e-2, lr_batch_size=4, lr_scaling="none", weight_decay=0.1)
DEIT = ROOT / "yamls/deit_ti.yaml"
OPTIONS = {"device": "cpu", "seed": 1, "progress_bar": False}


class Measured(Callback):
    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def eval_end(self, state, logger):
        self.seen[int(state.timestamp.batch)] = float(state.eval_metrics["eval"]["weight"].compute())


class ViTTask(Task):
    def no_weight_decay(self) -> set[str]:
        return {"model.pos_embed"}


def optimizer_of(task: ViTTask) -> AdamWScheduleFree:
    optimizer = build_optimizer(task, CONFIG, global_train_batch_size=4)
    assert isinstance(optimizer, AdamWScheduleFree)
    return optimizer


def fit(max_duration: str = "6ba", **options) -> tuple[Trainer, Record]:
    task, record = ViTTask(), Record()
    trainer = Trainer(
        model=task,
        train_dataloader=data_spec(),
        max_duration=max_duration,
        optimizers=optimizer_of(task),
        algorithms=[ScheduleFreeWeights()],
        **OPTIONS,
        **{**options, "callbacks": [record, *options.get("callbacks", [])]},
    )
    trainer.fit()
    trainer.close()
    return trainer, record


def train_as_published(steps: int) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """The optimizer's own loop: the weights it trains, and their average, after every step."""
    task = ViTTask()
    optimizer = optimizer_of(task)
    trained, averaged = [], []
    optimizer.train()
    spec = data_spec()
    batches = list(spec.dataloader)
    for step in range(steps):
        batch = spec.microbatch_transforms(batches[step % len(batches)])
        optimizer.zero_grad()
        task.loss(task(batch), batch).backward()
        optimizer.step()
        trained.append({name: p.detach().clone() for name, p in task.named_parameters()})
        optimizer.eval()
        averaged.append({name: p.detach().clone() for name, p in task.named_parameters()})
        optimizer.train()
        for name, p in task.named_parameters():
            p.data.copy_(trained[-1][name])
    return trained, averaged


def test_evaluations_and_checkpoints_hold_the_average_and_do_not_change_the_training(tmp_path: Path) -> None:
    trained, averaged = train_as_published(6)
    plain, record = fit()
    measured = Measured()
    evaluator = Evaluator(label="eval", dataloader=data_spec(), metric_names=["weight"])
    options = {"eval_dataloader": evaluator, "eval_interval": "2ba", "callbacks": [measured]}
    watched, watched_record = fit(**options, **checkpointed(tmp_path, "3ba"))
    for ours in (record, watched_record):
        for step in range(6):
            assert_equal(ours.weights[step], trained[step])
    for trainer in (plain, watched):  # the model after fit
        assert_equal(weights(trainer), averaged[5])
    assert set(measured.seen) == {2, 4, 6}
    for batch, value in measured.seen.items():
        assert value == pytest.approx(averaged[batch - 1]["model.head.weight"].sum().item(), rel=1e-5)
    saved = torch.load(tmp_path / "ba3.pt", weights_only=False)["state"]["model"]
    assert all(torch.equal(saved[name], value) for name, value in averaged[2].items())
    assert not torch.equal(saved["model.head.weight"], trained[2]["model.head.weight"])


@pytest.mark.parametrize("stop", [3, 4])
def test_resumed_training_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    unbroken, record = fit()
    fit(f"{stop}ba", **checkpointed(tmp_path))
    resumed, resumed_record = fit(load_path=str(tmp_path / f"ba{stop}.pt"))
    for ours, theirs in zip(resumed_record.weights, record.weights[stop:], strict=True):
        assert_equal(ours, theirs)
    assert_equal(weights(resumed), weights(unbroken))
    ours, theirs = (trainer.state.optimizers[0].param_groups for trainer in (resumed, unbroken))
    for one, other in zip(ours, theirs, strict=True):
        assert all(one[key] == other[key] for key in ("k", "lr_max", "weight_sum", "train_mode"))


def test_loaded_checkpoint_is_evaluated_as_saved(tmp_path: Path) -> None:
    trained, _ = fit("4ba", **checkpointed(tmp_path))
    task, measured = ViTTask(), Measured()
    evaluator = Evaluator(label="eval", dataloader=data_spec(), metric_names=["weight"])
    trainer = Trainer(
        model=task,
        optimizers=optimizer_of(task),
        eval_dataloader=evaluator,
        algorithms=[ScheduleFreeWeights()],
        callbacks=[measured],
        load_path=str(tmp_path / "ba4.pt"),
        **OPTIONS,
    )
    trainer.eval()
    trainer.close()
    assert_equal(weights(trainer), weights(trained))
    assert list(measured.seen.values()) == [pytest.approx(weights(trained)["model.head.weight"].sum().item(), rel=1e-5)]


def schedule_free(mds: Path, runs: Path, name: str, algorithms: str = "{}") -> list[str]:
    """One line of deit_ti.yaml, and the constant learning rate that it asks for; the EMA has to go."""
    yaml = runs / "deit_ti.yaml"
    text, found = re.subn(r"algorithms:\n(  .*\n)+", f"algorithms: {algorithms}\n", DEIT.read_text())
    assert found == 1
    yaml.write_text(text)
    return [
        str(yaml),
        *tiny_photo_overrides(mds, runs, name),
        "optimizer.name=adamw_schedulefree",
        "optimizer.options={}",
        "schedule.alpha_f=1",
        "max_duration=4ba",
        "run.eval_interval=2ba",
    ]


def test_run_stopped_after_an_evaluation_ends_with_the_losses_of_one(photo_mds: Path, tmp_path: Path) -> None:
    assert run_train([*schedule_free(photo_mds, tmp_path, "whole")]) == 0
    for steps in (2, 4):
        assert run_train([*schedule_free(photo_mds, tmp_path, "parts"), f"max_duration={steps}ba"]) == 0
    assert len(losses(tmp_path / "parts")) == 4
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("algorithms", "override", "message"),
    [
        ("{}", "schedule.alpha_f=0.01", "schedule.alpha_f must be 1 with optimizer.name=adamw_schedulefree"),
        ("{EMA: {half_life: 10ba}}", "seed=0", "algorithms.EMA must be left out with optimizer.name"),
        ("{SAM: {}}", "seed=0", "algorithms.SAM must be left out with optimizer.name"),
        ("{}", "optimizer.options={warmup_steps: 5}", "optimizer.options.warmup_steps is not an option"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    photo_mds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], algorithms: str, override: str, message: str
) -> None:
    assert run_train([*schedule_free(photo_mds, tmp_path, "refused", algorithms), override]) == 2
    assert message in capsys.readouterr().err


def test_its_own_warmup_is_no_option() -> None:
    with pytest.raises(ConfigError, match="the warm-up in schedule"):
        build_optimizer(ViTTask(), replace(CONFIG, options={"warmup_steps": 5}), global_train_batch_size=4)
