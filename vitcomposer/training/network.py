"""Builds the network that training starts from, with its weights."""

import dataclasses
from typing import cast

from composer.utils import dist
from torch import nn

from vitcomposer.errors import ConfigError, require
from vitcomposer.escape import message
from vitcomposer.models import build_model, load_weights
from vitcomposer.models.transformer import ImageTransformer
from vitcomposer.models.trunks import Trunk
from vitcomposer.runs.folder import (
    resumes,
)
from vitcomposer.schema import Init, Model
from vitcomposer.schema.recipe import Recipe


def starting_point(cfg: Recipe) -> Init:
    """``cfg.init``, without its file where a run goes on: a checkpoint holds every weight, and the file may be gone.

    Raises:
        ConfigError: Blocks that do not learn, in a network that starts from nothing.
    """
    init: Init = cfg.init
    remedy = "Set init.weights=FILE, or leave init.train_blocks out."
    rule = "null without init.weights: what does not learn must have been trained"
    starts = init.train_blocks is None or init.weights is not None
    require(starts, "init.train_blocks", rule, init.train_blocks, remedy)
    return dataclasses.replace(init, weights=None) if resumes(cfg) else init


def build_network(model: Model, init: Init) -> nn.Module:
    """The network of the ``model`` block; what the yaml leaves out keeps the published value of the name.

    Raises:
        ConfigError: A name, an option or a size that no network has; weights that cannot be read or do not fit; blocks
            that it does not have.
    """
    try:
        network = build_model(**model.options())
        report = load_weights(network, init.weights, min_matched=init.min_matched) if init.weights else None
        if init.train_blocks is not None:
            _freeze(network, init.train_blocks, model.name)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    if report is not None and dist.get_global_rank() == 0:
        print(message(str(report)))
    return network


def _freeze(network: nn.Module, train_blocks: int, name: str) -> None:
    remedy = "Leave it out, or choose a ViT, DeiT or ConViT."
    rule = f"null for {name}, which has no transformer blocks"
    require(isinstance(network, ImageTransformer | Trunk), "init.train_blocks", rule, train_blocks, remedy)
    cast(ImageTransformer | Trunk, network).freeze_below(train_blocks)
