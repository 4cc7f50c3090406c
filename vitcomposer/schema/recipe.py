"""What every recipe's yaml has, whatever it trains: the type of ``cfg`` where a function serves all recipes."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

from vitcomposer.errors import noting, require_within
from vitcomposer.schema.blocks import Data, Evaluation, Init, Model, Optimizer, Run, Schedule
from vitcomposer.schema.times import check_schedule, check_seed


class Recipe(Protocol):
    """A recipe that trains or measures one network on images."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # it is a dataclass

    @property
    def recipe(self) -> str: ...  # its name in the yaml

    @property
    def seed(self) -> int: ...

    @property
    def max_duration(self) -> str: ...  # Composer time string; 0ba where no step is taken

    @property
    def global_train_batch_size(self) -> int: ...  # images over all devices

    @property
    def precision(self) -> Literal["auto", "fp32", "amp_bf16", "amp_fp16"]: ...  # auto: see vitcomposer.runs.devices

    @property
    def model(self) -> Model: ...

    @property
    def data(self) -> Data: ...

    @property
    def evaluation(self) -> Evaluation: ...

    @property
    def algorithms(self) -> Mapping[str, dict[str, Any]]: ...  # by Composer's names; empty where the yaml has no block

    @property
    def init(self) -> Init: ...

    @property
    def run(self) -> Run: ...


class Trainable(Recipe, Protocol):
    """A recipe whose weights, or heads on them, learn step by step."""

    @property
    def optimizer(self) -> Optimizer: ...

    @property
    def schedule(self) -> Schedule: ...


def check_steps(recipe: Trainable, *, usual: str) -> None:
    """Refuse a seed, a batch, a duration or a warm-up that no run of the recipe can have.

    Args:
        usual: A batch of somebody, for the remedy.
    """
    with noting():
        check_seed("seed", recipe.seed)
    with noting():
        require_within("global_train_batch_size", recipe.global_train_batch_size, 1, 10**7, usual)
    with noting():
        check_schedule(recipe.max_duration, recipe.schedule.t_warmup)
