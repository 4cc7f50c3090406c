"""The keys of a yaml of the recipe ``moco`` (MoCo-v3)."""

from dataclasses import dataclass
from typing import Literal

from vitcomposer.errors import require, require_within
from vitcomposer.schema.self_supervised import (
    SelfSupervised,
    check_dims,
    require_pair,
)


@dataclass(frozen=True, kw_only=True)
class MoCoHead:
    """Projector after the trunk and predictor after that, both with batch norm (arXiv:2104.02057, section 4)."""

    projector_dims: list[int]  # [384, 4096, 4096, 256]
    predictor_dims: list[int]  # [256, 4096, 256]

    def __post_init__(self) -> None:
        check_dims("head.projector_dims", self.projector_dims)
        check_dims("head.predictor_dims", self.predictor_dims)
        out = self.projector_dims[-1]
        fits = self.predictor_dims[0] == self.predictor_dims[-1] == out
        rule = f"from and to {out}, the end of head.projector_dims"
        require(fits, "head.predictor_dims", rule, self.predictor_dims, f"Use [{out}, 4096, {out}].")


@dataclass(frozen=True, kw_only=True)
class MoCoObjective:
    """Contrast with the keys of a momentum encoder."""

    temperature: float
    momentum: float  # of the momentum encoder at the first step; a cosine takes it to 1
    freeze_patch_projection: bool

    def __post_init__(self) -> None:
        require_within("loss.temperature", self.temperature, 0.001, 1000, "MoCo-v3 uses 0.2.")
        require_within("loss.momentum", self.momentum, 0, 1, "MoCo-v3 uses 0.99.")


@dataclass(frozen=True, kw_only=True)
class MoCo(SelfSupervised):
    """Momentum contrast, version 3 (arXiv:2104.02057)."""

    recipe: Literal["moco"]
    head: MoCoHead
    loss: MoCoObjective

    def __post_init__(self) -> None:
        super().__post_init__()
        require_pair(self)
