"""The shape of a yaml: frozen dataclasses, one per block and one per recipe.

A field that decides accuracy has no default, so a yaml is the method section of a paper on one page. Mechanics
(workers, logging, caching) have defaults. Ranges of one block are checked in its ``__post_init__``; what needs two
blocks is checked in the recipe's class.
"""

from vitcomposer.schema.blocks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    ConfigError,
    Data,
    Evaluation,
    Mixing,
    Model,
    Optimizer,
    Run,
    Schedule,
    did_you_mean,
    require,
)
from vitcomposer.schema.supervised import Supervised

__all__ = [
    "CONFIGS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augment",
    "ConfigError",
    "Data",
    "Evaluation",
    "Mixing",
    "Model",
    "Optimizer",
    "Run",
    "Schedule",
    "Supervised",
    "did_you_mean",
    "require",
]

CONFIGS: dict[str, type] = {"supervised": Supervised}
