"""The keys of a yaml of the recipe ``simclr``."""

from dataclasses import dataclass
from typing import Literal

from vitcomposer.errors import require_within
from vitcomposer.schema.self_supervised import SelfSupervised, check_dims, require_pair


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Multi-layer perceptron over the features of the trunk."""

    dims: list[int]  # input, hidden ..., output widths: [768, 3072, 128]
    batch_norm: bool

    def __post_init__(self) -> None:
        check_dims("head.dims", self.dims)


@dataclass(frozen=True, kw_only=True)
class InfoNCE:
    """Which of the other images' views is the partner (arXiv:2002.05709, section 2.1)."""

    temperature: float

    def __post_init__(self) -> None:
        require_within("loss.temperature", self.temperature, 0.001, 1000, "SimCLR uses 0.1.")


@dataclass(frozen=True, kw_only=True)
class SimCLR(SelfSupervised):
    """A simple framework for contrastive learning (arXiv:2002.05709)."""

    recipe: Literal["simclr"]
    head: Projection
    loss: InfoNCE

    def __post_init__(self) -> None:
        super().__post_init__()
        require_pair(self)
