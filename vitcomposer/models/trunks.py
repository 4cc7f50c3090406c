"""Builds any network of timm by name, ``timm/<name>``, with what the recipes ask of a network beside timm's interface.

It stays timm's network: parameters have timm's names, so files of weights move both ways.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from vitcomposer.errors import ConfigError, did_you_mean
from vitcomposer.models.layers import Block
from vitcomposer.models.resnet import RESIDUAL_BLOCKS
from vitcomposer.models.transformer import check_classes
from vitcomposer.models.without_storage import meta_copy
from vitcomposer.schema.model import TIMM

# Keys of the block ``model`` that timm calls otherwise.
_RENAMED = {"image_size": "img_size", "pool": "global_pool"}
_RATES = ("drop_rate", "attn_drop_rate", "drop_path_rate")
_REFUSED = re.compile(r"unexpected keyword argument(.*)", re.DOTALL)
_REFUSALS = (RuntimeError, AssertionError, ValueError, IndexError, TypeError)  # what timm's networks raise at images
_WITHOUT_BLOCKS = ("pos_drop", "patch_drop")  # layers before the blocks that have no parameters


@dataclass(frozen=True)
class TrunkFacts:
    """What is known of a network of timm.

    Attributes:
        name: As timm knows it.
        arguments: What timm was called with, the number of classes aside.
        image_size: Side in pixels that it was built for.
        heads: Names of the classifier's layers.
        layers: The number of each parameter's layer by timm's ``group_matcher``: 0 is the stem, the last one the head;
            empty where timm has none for the network.
        blocks: Names of the residual blocks, or of the stages where timm groups no finer: each is called once.
        vit_shaped: It makes tokens (B, P + N, D) of the images, and every block returns tokens of that shape.
    """

    name: str
    arguments: dict[str, Any]
    image_size: int
    heads: tuple[str, ...]
    layers: dict[str, int]
    blocks: tuple[str, ...]
    vit_shaped: bool


class Trunk(nn.Module):
    """A network of timm. ``build_trunk`` makes the class of each: this one and timm's together.

    Attributes:
        of_timm: What is known of it. Networks of timm have attributes of nearly every other name.
        num_frozen_groups: See ``freeze_below``; None where everything learns.
    """

    of_timm: TrunkFacts
    num_frozen_groups: int | None

    @property
    def image_size(self) -> int:
        """Side in pixels that it was built for."""
        return self.of_timm.image_size

    @property
    def num_layer_groups(self) -> int:
        """Stem, blocks and head; 0 where they are not known."""
        return max(self.of_timm.layers.values()) + 1 if self.of_timm.layers else 0

    @property
    def block_list(self) -> list[nn.Module]:
        """The modules of ``of_timm.blocks``."""
        return [self.get_submodule(name) for name in self.of_timm.blocks]

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, by timm's groups."""
        return self.of_timm.layers[name]

    def is_head(self, name: str) -> bool:
        """Whether a parameter belongs to the classifier."""
        return any(name == head or name.startswith(f"{head}.") for head in self.of_timm.heads)

    def no_weight_decay(self) -> set[str]:
        """What timm lists, as far as this network has it."""
        listed = getattr(super(), "no_weight_decay", None)
        names = [name for name, _ in self.named_parameters()]
        found = listed() if listed else ()
        return {name for name in found if any(full == name or full.endswith(f".{name}") for full in names)}

    def freeze_below(self, train_blocks: int) -> None:
        """Let only the last ``train_blocks`` of timm's groups below the head learn, with the head; at 0 the head alone.

        What is frozen stays in evaluation mode, batch norms with the statistics that they have.

        Raises:
            ValueError: More blocks than there are.
        """
        blocks = max(0, self.num_layer_groups - 2)
        if train_blocks > blocks:
            rule = f"at most {blocks}, timm's groups of layers between stem and head of {TIMM}{self.of_timm.name}"
            raise ValueError(f"init.train_blocks must be {rule}, got {train_blocks}; leave it out to train everything")
        self.num_frozen_groups = blocks - train_blocks
        for name, parameter in self.named_parameters():
            frozen = not self.is_head(name) if train_blocks == 0 else self.layer_of(name) <= self.num_frozen_groups
            parameter.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Trunk":
        super().train(mode)
        if self.num_frozen_groups is not None:
            for name, child in self.named_children():
                _rest(child, name)
        return self

    def require_size(self, image_size: int, key: str) -> None:
        """Refuse images that the network cannot take.

        Raises:
            ConfigError: With the key that asks for them.
        """
        try:
            _outputs(meta_copy(self).eval(), image_size)
        except _REFUSALS as error:
            raise ConfigError(
                f"{key} must be a size that {TIMM}{self.of_timm.name} takes, got {image_size}. {_says(error)}"
            ) from error


def _rest(module: nn.Module, name: str) -> None:
    """Put what is frozen into evaluation mode."""
    parameters = list(module.parameters())
    if (parameters and not any(p.requires_grad for p in parameters)) or name in _WITHOUT_BLOCKS:
        module.eval()
        return
    for below, child in module.named_children():
        _rest(child, below)


@cache
def _class_of(base: type) -> type:
    return type(f"{base.__name__}Trunk", (Trunk, base), {"__module__": __name__})


def build_trunk(
    name: str, *, num_classes: int, image_size: int, most_weights: int | None = None, **options: Any
) -> Trunk:
    """The network ``timm/<name>`` with new weights, as timm starts them.

    Args:
        options: Of the block ``model``: what timm calls by the same name, ``pool`` (its ``global_pool``), and
            ``arguments``, which are timm's own.

    Raises:
        ValueError: A name that timm does not know, an argument that the network does not have, or a value or a size
            that it does not take.
    """
    own = name.removeprefix(TIMM)
    if not timm.is_model(own):
        known = timm.list_models()
        hint = _close(own, known) or " `python -c 'import timm; print(timm.list_models())'` prints them all."
        raise ValueError(f"model.name must be a network that timm {timm.__version__} has, got {name!r}.{hint}")
    check_classes(num_classes)
    given = {key: value for key, value in options.pop("arguments", {}).items() if value is not None}
    given |= {_RENAMED.get(key, key): value for key, value in options.items() if value is not None}
    given = {key: _tuples(value) for key, value in given.items()}
    arguments, probe = _accepted(own, num_classes, given, {"img_size": image_size, "dynamic_img_size": True})
    needed = sum(parameter.numel() for parameter in probe.parameters())
    if most_weights is not None and needed > most_weights:
        raise ValueError(f"{name} with these arguments needs {needed:,} weights, far more than there are")
    network = timm.create_model(own, pretrained=False, num_classes=num_classes, **arguments)
    network.__class__ = _class_of(type(network))
    trunk = cast(Trunk, network)
    trunk.num_frozen_groups = None
    trunk.of_timm = _facts(trunk, probe, own, num_classes, image_size, arguments)
    patches = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    if trunk.of_timm.vit_shaped and patches is not None and not hasattr(trunk, "patch_size"):
        cast(Any, trunk).patch_size = int(patches[0] if isinstance(patches, tuple | list) else patches)
    return trunk


def _close(name: str, known: list[str]) -> str:
    base = name.partition(".")[0]
    hint = did_you_mean(base, known)
    more = [each for each in known if each.startswith(base)][:3] if base else []
    return hint or (f" There are {', '.join(more)}." if more else "")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _accepted(
    name: str, num_classes: int, given: dict[str, Any], extra: dict[str, Any]
) -> tuple[dict[str, Any], nn.Module]:
    """The arguments that this network takes of those given and of what the yaml implies, and it without storage.

    Only what changes nothing may be left out: a rate of 0, and sizes where the network takes every size.
    """
    arguments = {**extra, **given}
    while True:
        try:
            with torch.device("meta"):
                return arguments, timm.create_model(name, pretrained=False, num_classes=num_classes, **arguments)
        except TypeError as error:
            match = _REFUSED.search(str(error))
            refused = {key for key in re.findall(r"'(\w+)'", match[1]) if key in arguments} if match else set()
            if not refused:
                raise ValueError(_refusal(name, given, error)) from error
            for key in refused:
                if key not in extra and not (key in _RATES and not arguments[key]):
                    raise ValueError(_unknown(name, key)) from error
            arguments = {key: value for key, value in arguments.items() if key not in refused}
        except Exception as error:  # timm's constructors raise all kinds
            raise ValueError(_refusal(name, given, error)) from error


def _unknown(name: str, key: str) -> str:
    yaml = {timm_key: ours for ours, timm_key in _RENAMED.items()}.get(key, key)
    return (
        f"model.{yaml} must be left out for {TIMM}{name}, which has no argument {key!r} in timm {timm.__version__}. "
        "Remove it, also from model.arguments."
    )


def _refusal(name: str, given: Mapping[str, Any], error: Exception) -> str:
    return f"model.name={TIMM}{name} must get values that timm accepts, got {dict(given)}. {_says(error)}"


def _says(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return f"It says: {line[:200]}"


def _outputs(network: Any, image_size: int) -> tuple[Tensor, Tensor]:
    """Features and answer for one image, of a network without storage."""
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    with torch.no_grad():
        features = network.forward_features(torch.empty(1, 3, image_size, image_size, dtype=dtype, device="meta"))
        return features, network.forward_head(features)


def _facts(
    trunk: Trunk, probe: nn.Module, name: str, num_classes: int, image_size: int, arguments: dict[str, Any]
) -> TrunkFacts:
    """Heads, layers and blocks; ``probe`` is the same network without storage, of which one pass is made.

    Raises:
        ValueError: A size that the network does not take, or a network that is no classifier.
    """
    layers, calls = _layers(trunk), Counter[str]()
    names = _block_names(trunk, layers)
    shapes: dict[str, Any] = {}
    for block in names:
        probe.get_submodule(block).register_forward_hook(_note(block, calls, shapes))
    try:
        features, answer = _outputs(probe.eval(), image_size)
    except _REFUSALS as error:
        raise ValueError(
            f"model.image_size must be one that {TIMM}{name} takes, got {image_size}. {_says(error)}"
        ) from error
    width = num_classes or pooled_width(trunk)
    if not isinstance(answer, Tensor) or tuple(answer.shape) != (1, width):
        found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(
            f"model.name must be a classifier, but {TIMM}{name} answers an image of {image_size} pixels with {found} "
            f"instead of (1, {width}). Choose another."
        )
    blocks = tuple(block for block in names if calls[block] == 1)
    tokens = isinstance(features, Tensor) and features.ndim == 3 and hasattr(trunk, "num_prefix_tokens")
    heads = getattr(trunk, "pretrained_cfg", {}).get("classifier") or ()
    return TrunkFacts(
        name=name,
        arguments=arguments,
        image_size=image_size,
        heads=(heads,) if isinstance(heads, str) else tuple(heads),
        layers=layers,
        blocks=blocks,
        vit_shaped=tokens and bool(blocks) and all(shapes[block] == features.shape for block in blocks),
    )


def _note(name: str, calls: Counter[str], shapes: dict[str, Any]) -> Callable[..., None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        calls[name] += 1
        shapes[name] = output.shape if isinstance(output, Tensor) else None

    return note


def _layers(trunk: Any) -> dict[str, int]:
    if not hasattr(trunk, "group_matcher"):
        return {}
    found = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
    return cast(dict[str, int], found)


def _block_names(module: nn.Module, layers: dict[str, int], name: str = "") -> list[str]:
    """The largest modules whose parameters are all of one of timm's groups, stem and head aside, and no mere norms."""
    below = {key: layer for key, layer in layers.items() if key.startswith(f"{name}." if name else "")}
    found = set(below.values())
    if not found or found <= {0, max(layers.values())}:
        return []
    if len(found) > 1 or not name or _is_list(module):
        return [
            block
            for child, each in module.named_children()
            for block in _block_names(each, layers, f"{name}.{child}" if name else child)
        ]
    return [name] if any(parameter.ndim > 1 for parameter in module.parameters()) else []


def _is_list(module: nn.Module) -> bool:
    """Whether it may never be called itself, or only hands on to a list of blocks: a stage that timm takes as one."""
    children = list(module.children())
    lists = nn.Sequential | nn.ModuleList
    return isinstance(module, lists) or (len(children) == 1 and isinstance(children[0], lists))


def pooled_width(network: Any) -> int:
    """Width of what a network without classes returns, which in some networks of timm is more than ``num_features``."""
    return int(getattr(network, "head_hidden_size", None) or network.num_features)


def blocks_in(module: nn.Module) -> list[nn.Module]:
    """The residual blocks of every network within a module, ours and timm's, in their order, each once."""
    found = [block for each in module.modules() if isinstance(each, Trunk) for block in each.block_list]
    found += [each for each in module.modules() if isinstance(each, (Block, *RESIDUAL_BLOCKS))]
    return list(dict.fromkeys(found))
