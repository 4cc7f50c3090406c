"""What changes along a run is a function of the step and of the present configuration, also of a run made longer."""

from pathlib import Path
from typing import Any

import pytest
from composer import Callback
from torch import Tensor

from recipes import RECIPES
from tests.faults.small_run import DEIT, tiny
from tests.self_supervised.test_self_supervised import page
from tests.self_supervised.test_self_supervised import tiny as tiny_pretraining
from vitcomposer import config
from vitcomposer.errors import ConfigError
from vitcomposer.training.fit import fit

HALF, WHOLE = 6, 12


class Watch(Callback):
    """What each step trains with, by its number from 1."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Any]] = {}
        self._before: tuple[Tensor, Tensor] | None = None

    def after_train_batch(self, state: Any, logger: Any) -> None:
        """The optimizer is about to step."""
        task, groups = state.model, state.optimizers[0].param_groups
        now: dict[str, Any] = {key: [group[key] for group in groups] for key in ("lr", "weight_decay")}
        for name in ("_temperature", "_hard", "_use_queue"):
            if hasattr(task, name):
                now[name] = getattr(task, name)
        if hasattr(task, "model"):
            now["size"] = tuple(state.batch["image"].shape[-2:])
            now["patches"] = getattr(task.model, "num_patches_kept", None)
        self.seen[state.timestamp.batch.value + 1] = now
        if (average := average_of(task)) is not None:
            self._before = average.detach().clone(), average

    def batch_end(self, state: Any, logger: Any) -> None:
        if self._before is not None:
            old, new = self._before
            way = source_of(state.model).detach() - old
            moved = (new.detach() - old).double() @ way.double() / (way.double() @ way.double())
            self.seen[state.timestamp.batch.value]["rate of average"] = float(moved)


def average_of(task: Any) -> Tensor | None:
    """A row of the network that follows, where a method has one."""
    trunk = getattr(task, "teacher_trunk", None)
    return None if trunk is None else trunk.blocks[0].mlp.fc1.weight.view(-1)


def source_of(task: Any) -> Tensor:
    return task.trunk.blocks[0].mlp.fc1.weight.view(-1)


def train(argv: list[str], steps: int) -> dict[int, dict[str, Any]]:
    cfg = config.load(argv[0], [*argv[1:], f"max_duration={steps}ba"])
    trainer, watch = RECIPES[cfg.recipe].build(cfg), Watch()
    trainer.state.callbacks.append(watch)
    assert fit(trainer, cfg) == 0
    return watch.seen


def supervised(*more: str) -> Any:
    rates = ["optimizer.lr=0.02", "schedule.t_warmup=0.25dur", "schedule.alpha_f=0.0"]
    return lambda runs, name: [DEIT, *tiny(runs, name), *rates, *more]


def pretraining(method: str, *more: str) -> Any:
    data = ["data.local=null", "data.source=synthetic", "data.synthetic_samples=48", "schedule.t_warmup=0.25dur"]
    return lambda runs, name: [page(method), *tiny_pretraining(method, Path("unused"), runs, name), *data, *more]


CURRICULUM = "algorithms.Curriculum={image_sizes: [16, 32], compute: [0.5, 0.5]}"
KINDS = {
    "rates of layers": (supervised("optimizer.layer_decay=0.5"), ("lr",)),
    "rate by compute": (supervised(CURRICULUM, "schedule.progress=compute"), ("lr", "size")),
    "patch dropout": (
        supervised("algorithms.PatchDropout={keep_rates: [0.25, 0.5, 1.0], until: [0.3, 0.6, 1.0]}"),
        ("lr", "patches"),
    ),
    "dino": (
        pretraining("dino", "loss.teacher_temperature=0.04", "loss.teacher_temperature_warmup_epochs=3"),
        ("lr", "weight_decay", "_temperature", "rate of average"),
    ),
    "swav": (
        pretraining("swav", "loss.hard_assignment_epochs=3", "loss.queue_start_epoch=3"),
        ("lr", "_hard", "_use_queue"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_longer_run_trains_as_one_of_that_length_from_the_next_step_on(kind: str, tmp_path: Path) -> None:
    argv, keys = KINDS[kind]
    unbroken = train(argv(tmp_path, "unbroken"), WHOLE)
    first = train(argv(tmp_path, "resumed"), HALF)
    second = train(argv(tmp_path, "resumed"), WHOLE)
    assert list(first) == list(range(1, HALF + 1)) and list(second) == list(range(HALF + 1, WHOLE + 1))
    for step, found in second.items():
        for key in keys:
            # What moved is measured in float32.
            value = unbroken[step][key]
            assert found[key] == (pytest.approx(value, rel=1e-3, abs=1e-6) if "average" in key else value), (step, key)
    for key in keys:
        assert len({str(found[key]) for found in unbroken.values()}) > 1, f"{key} does not change"
        by_epoch = key.startswith("_")  # whatever the length of the run
        assert by_epoch or first[HALF][key] != unbroken[HALF][key], key


def test_shorter_than_what_is_done_is_refused_by_its_steps(tmp_path: Path) -> None:
    argv = supervised()(tmp_path, "run")
    train(argv, HALF)
    for given, steps in (("5ba", 5), ("2ep", 4), ("64sp", 4)):
        cfg = config.load(argv[0], [*argv[1:], f"max_duration={given}"])
        rule = rf"max_duration must be at least the 6 steps that .*/run has trained, got '{given}, {steps} steps'"
        with pytest.raises(ConfigError, match=rule):
            RECIPES[cfg.recipe].build(cfg)
