"""Finds where weights come from: the run or the exported folder of their file, and the network described there."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from vitcomposer.errors import ConfigError
from vitcomposer.json_file import read_json
from vitcomposer.runs import layout

EXPORTED = ("config.json", "model.safetensors")
# Of the block ``model``: what the weights were trained as. The rest (classes, dropout, size) the new run chooses.
ARCHITECTURE = (
    "name",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "init_values",
    "qkv_bias",
    "class_token",
    "position_embedding",
    "pool",
    "stem",
    "local_up_to_layer",
    "arguments",
)


def weights_file(source: str | PathLike[str]) -> Path:
    """The file that a run folder (its newest checkpoint) or an exported folder stands for; any other path is itself."""
    source = Path(source)
    if (source / layout.CONFIG).is_file():
        return source / layout.LATEST_CHECKPOINT
    if all((source / name).is_file() for name in EXPORTED):
        return source / EXPORTED[1]
    return source


def page_of(source: str | PathLike[str]) -> Path | None:
    """The config.yaml of the run, or the config.json of the exported folder, that weights lie in."""
    file = weights_file(source)
    if file.parent.name in (layout.CHECKPOINTS, layout.BEST) and (page := file.parent.parent / layout.CONFIG).is_file():
        return page
    page = file.parent / EXPORTED[0]
    return page if file.name == EXPORTED[1] and page.is_file() else None


def recorded_page(source: str | PathLike[str]) -> dict[str, Any]:
    """What is written on :func:`page_of`, empty where there is none.

    Raises:
        ConfigError: A page that cannot be read.
    """
    page = page_of(source)
    if page is None:
        return {}
    try:
        content = read_json(page) if page.suffix == ".json" else yaml.safe_load(page.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"{page} must say what the weights beside it are, but cannot be read: {line}.") from error
    return content if isinstance(content, dict) else {}


def recorded_model(source: str | PathLike[str]) -> dict[str, Any]:
    """The block ``model`` that the weights were trained with by us, empty where nothing says it."""
    content = recorded_page(source)
    ours = content.get("vitcomposer", content)
    model = ours.get("model") if isinstance(ours, Mapping) else None
    return dict(model) if isinstance(model, Mapping) and isinstance(model.get("name"), str) else {}


def recorded_statistics(source: str | PathLike[str]) -> dict[str, Any]:
    """``mean`` and ``std`` of the images that the weights were trained on by us, empty where nothing says them."""
    content = recorded_page(source)
    ours = content.get("vitcomposer", content)
    blocks = [ours, *(ours.get(key) for key in ("augment", "crops"))] if isinstance(ours, Mapping) else []
    for block in blocks:
        found = {key: block.get(key) for key in ("mean", "std")} if isinstance(block, Mapping) else {}
        if found and all(isinstance(values, list) and len(values) == 3 for values in found.values()):
            return found
    return {}


def take_over(model: Mapping[str, Any], recorded: Mapping[str, Any], *, size: bool) -> dict[str, Any]:
    """The block ``model`` of a start from these weights: their architecture, and the rest as it is.

    A plain and a distilled network of one size keep their name: either's weights start the other.

    Args:
        size: Also in the size of their images, where nothing is trained on others.
    """
    plain = [str(block.get("name")).replace("_distilled", "") for block in (model, recorded)]
    taken = [key for key in ARCHITECTURE if key != "name" or plain[0] != plain[1]]
    found = {key: value for key, value in model.items() if key not in taken}
    found |= {key: recorded[key] for key in taken if recorded.get(key) is not None}
    if size and isinstance(recorded.get("image_size"), int):
        found["image_size"] = recorded["image_size"]
    return found
