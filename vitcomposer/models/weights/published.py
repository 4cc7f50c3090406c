"""Has a run give its network the images that published weights were trained on, unless its yaml says otherwise."""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from vitcomposer.origins import recorded_page, weights_file
from vitcomposer.runs import layout
from vitcomposer.schema import Augment, Crops, Neighbors, Probe, SelfSupervised, Supervised
from vitcomposer.schema.model import FOLLOWED
from vitcomposer.schema.recipe import Recipe
from vitcomposer.stores.hub import fetch_from_hub, is_on_hub

_Recipe = TypeVar("_Recipe", bound=Recipe)


def local_weights(source: str | PathLike[str]) -> Path:
    """The file of ``init.weights``: one of a hub is fetched, a folder stands for a file in it.

    Raises:
        ValueError: Weights of a hub that cannot be had.
    """
    return fetch_from_hub(str(source)).file if is_on_hub(source) else weights_file(source)


def follow_weights(cfg: _Recipe) -> tuple[_Recipe, str | None]:
    """The configuration with what ``init.follow`` lists taken from the weights, and a line that says so.

    A run that goes on takes it from its own page: the weights may be gone.

    Raises:
        ValueError: Weights that cannot be had.
    """
    source, keys = cfg.init.weights, cfg.init.follow
    if source is None or not is_on_hub(source) or keys is None:
        return cfg, None
    recorded = _recorded(cfg)
    found = fetch_from_hub(source).input if recorded is None else recorded
    taken = {key: found[key] for key in keys if key in found}
    said = "; ".join(f"{key} {_text(taken[key])}" for key in FOLLOWED if key in taken) or "nothing"
    own = {key: found[key] for key in FOLLOWED if key in found and key not in taken and found[key] != _given(cfg)[key]}
    other = "".join(f"; the yaml's {key} {_text(_given(cfg)[key])}, not {_text(own[key])}" for key in own)
    return _with(cfg, taken), f"{source}: of the weights: {said}{other}"


def _recorded(cfg: Recipe) -> dict[str, Any] | None:
    """What the run of this folder began with, if it began with these weights."""
    page = recorded_page(Path(cfg.run.folder, cfg.run.name) / layout.LATEST_CHECKPOINT)
    init = page.get("init")
    if not isinstance(init, dict) or init.get("weights") != cfg.init.weights:
        return None
    block = page if cfg.recipe == "knn" else page.get("crops") or page.get("augment")
    evaluation = page.get("evaluation")
    if not isinstance(block, dict) or not isinstance(evaluation, dict):
        return None
    found = {key: tuple(block[key]) for key in ("mean", "std") if isinstance(block.get(key), list)}
    return found | {key: evaluation[key] for key in ("crop_ratio", "interpolation") if key in evaluation}


def _colors(cfg: Recipe) -> Neighbors | Crops | Augment:
    if isinstance(cfg, Neighbors):
        return cfg
    if isinstance(cfg, SelfSupervised):
        return cfg.crops
    assert isinstance(cfg, Supervised | Probe)
    return cfg.augment


def _given(cfg: Recipe) -> dict[str, Any]:
    colors, evaluation = _colors(cfg), cfg.evaluation
    return {
        "mean": tuple(colors.mean),
        "std": tuple(colors.std),
        "crop_ratio": evaluation.crop_ratio,
        "interpolation": evaluation.interpolation,
    }


def _with(cfg: _Recipe, taken: dict[str, Any]) -> _Recipe:
    """``taken`` in its place; ``follow`` is then empty, so that config.yaml says what the run had."""
    colors = {key: taken[key] for key in ("mean", "std") if key in taken}
    evaluation = {key: taken[key] for key in ("crop_ratio", "interpolation") if key in taken}
    blocks: dict[str, Any] = colors
    if not isinstance(cfg, Neighbors):
        blocks = {"crops" if isinstance(cfg, SelfSupervised) else "augment": replace(_colors(cfg), **colors)}
    return replace(cfg, init=replace(cfg.init, follow=[]), evaluation=replace(cfg.evaluation, **evaluation), **blocks)


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
