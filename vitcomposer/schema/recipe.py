"""What every recipe's yaml has, whatever it trains: the type of ``cfg`` where a function serves all recipes."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

from vitcomposer.errors import noting, require, require_within
from vitcomposer.schema.blocks import Augment, Data, Evaluation, Optimizer, Run, Schedule
from vitcomposer.schema.model import Init, Model
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


def require_labels_here(data: Data, key: str, off: str, value: Any) -> None:
    """Refuse what needs the label of every image before the first step, unless they lie on this machine."""
    here = data.source == "mds" and data.remote is None
    require(here, key, f"{off} unless the images lie in data.local alone", value, f"Set {key}={off}.")


def check_balance(data: Data, augment: Augment) -> None:
    """Refuse ``balance`` where it cannot be had, or where its copies and those of repeated augmentation would mix."""
    if data.balance is None:
        return
    require_labels_here(data, "data.balance", "null", data.balance)
    views, rule = augment.repeated_augmentation, "1 with data.balance, which repeats images by itself"
    require(views == 1, "augment.repeated_augmentation", rule, views, "Set one of the two.")


def check_no_balance(data: Data, recipe: str) -> None:
    """Refuse ``balance`` in a recipe that knows no labels in training."""
    require(data.balance is None, "data.balance", f"null in the recipe {recipe}", data.balance, "Leave it out.")
