"""Weights from files of others and of our own into a model: names mapped, positions resized, everything reported.

Read are flat state dicts (timm, ConViT), ``{"model": ...}`` (DeiT, DeiT III), ``{"state_dict": ...}`` (timm training,
MoCo-v3), ``{"teacher": ...}`` (DINO) and Composer checkpoints (``{"state": {"model": ...}}``) of classifiers and of
pre-training, as .safetensors or as torch files without code in them. Of pre-training the trunk that is meant to be used
is taken: DINO's teacher, MoCo's encoder (not its momentum encoder), SwAV's and SimCLR's trunk.
"""

import argparse
import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitcomposer.models.positions import resize_positions
from vitcomposer.models.vit import ImageTransformer

_WRAPPER_PREFIX = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+")
# DeiT III's own names of what timm calls LayerScale.
_RENAMED = ((re.compile(r"\.gamma_([12])$"), r".ls\1.gamma"),)
_HEAD = re.compile(r"^(head(_dist)?|fc)\.")
# Where pre-training keeps the trunk, the first that occurs: ours, then MoCo-v3's and DINO's own.
_TRUNKS = ("teacher_trunk.", "trunk.", "base_encoder.", "backbone.")


@dataclass(frozen=True)
class LoadReport:
    """What ``load_weights`` did, by parameter name.

    Attributes:
        source: The file, or ``state dict``.
        loaded: Filled from the source, the resized ones included.
        resized: Position embedding whose rows had to be fitted to the model.
        replaced_heads: Heads with another number of classes in the source; they keep their initial values.
        missing: In the model but not in the source; they keep their initial values.
        unexpected: In the source but not in the model.
    """

    source: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    replaced_heads: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def matched(self) -> float:
        """Share of the model's tensors, heads aside, that came from the source; in [0, 1]."""
        loaded = sum(not _HEAD.match(name) for name in self.loaded)
        missing = sum(not _HEAD.match(name) for name in self.missing)
        return loaded / max(1, loaded + missing)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded, {self.matched:.1%} of the model without its head"]
        for title, names in (
            ("resized to the model's grid", self.resized),
            ("left as initialised, other number of classes", self.replaced_heads),
            ("left as initialised, not in the source", self.missing),
            ("in the source but not in the model", self.unexpected),
        ):
            if names:
                lines.append(f"  {title}: {_shorten(names)}")
        return "\n".join(lines)


def load_weights(
    model: nn.Module, source: str | PathLike[str] | Mapping[str, Any], *, min_matched: float = 0.9
) -> LoadReport:
    """Fill ``model`` in place from a checkpoint; nothing is changed when an error is raised.

    Position embeddings of another image size are resized (bicubic), rows of tokens the source does not have are zero,
    and a row of a token that has no position in ``model`` is added to the token, which is the same function. A head
    with another number of classes and biases the source lacks keep their initial values and are reported.

    Args:
        source: File, or what ``torch.load`` made of one. Files are read without running code from them.
        min_matched: Least share of the model's tensors, heads aside, the source has to fill.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not safe or not readable, too little of it matches, or a shape differs that cannot be
            adapted.
    """
    name = "state dict" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else _read(Path(source))
    found, others = _tensors_of_model(_state_dict_in(content))
    wanted = model.state_dict()

    resized = _fit_positions(model, found) if isinstance(model, ImageTransformer) and "pos_embed" in wanted else ()
    replaced = {
        key for key in found.keys() & wanted.keys() if _HEAD.match(key) and found[key].shape != wanted[key].shape
    }
    # Weight and bias of a head stay together: half a head is no head.
    replaced_modules = {key.partition(".")[0] for key in replaced}
    replaced = {key for key in wanted if key.partition(".")[0] in replaced_modules}
    loaded = {key: found[key] for key in wanted if key in found and key not in replaced}
    report = LoadReport(
        source=name,
        loaded=tuple(loaded),
        resized=resized,
        replaced_heads=tuple(sorted(replaced)),
        missing=tuple(key for key in wanted if key not in found and key not in replaced),
        unexpected=tuple(sorted({*(found.keys() - wanted.keys()), *others})),
    )
    _check_shapes(name, loaded, wanted)
    if report.matched < min_matched:
        raise ValueError(
            f"{name} fills {report.matched:.1%} of the model, at least {min_matched:.1%} is required; is it the "
            f"checkpoint of another model? Missing: {_shorten(report.missing)}. "
            f"Not used: {_shorten(report.unexpected)}"
        )
    model.load_state_dict(loaded, strict=False)
    return report


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # only needed for such files

            return load_file(path)
        with torch.serialization.safe_globals(_harmless_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch and safetensors have no exception in common for a file they cannot read
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked is None:
            raise ValueError(f"{path} could not be read, is it a whole checkpoint? {_first_line(error)}") from error
        raise ValueError(
            f"{path} was not loaded: it needs {blocked[1]}, and loading that can run any code. If you trust where it "
            f"comes from, keep its weights alone, once: torch.save(torch.load({str(path)!r}, weights_only=False)"
            "['model'], 'weights.pt'), and load weights.pt"
        ) from error


def _first_line(error: Exception) -> str:
    detail = re.search(r"WeightsUnpickler error: (.+)", str(error))
    return detail[1].strip() if detail else f"{type(error).__name__}: {error}".split("\n")[0]


def _harmless_types() -> list[Any]:
    """Types without side effects that Composer (clock, random state) and DeiT (arguments) store beside the weights."""
    import numpy as np  # Composer needs numpy; a machine without it has no such files

    reconstruct = np.empty(0).__reduce__()[0]  # its module has two names, by numpy version
    numpy_types = [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in ("u4", "i8", "f4", "f8")}]
    renamed = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return [*numpy_types, *renamed, datetime.timedelta, type(torch.__version__), argparse.Namespace]


def _state_dict_in(content: Any) -> Mapping[str, Any]:
    """The state dict inside a checkpoint, under whichever wrapper."""
    for key in ("state", "model", "state_dict", "teacher"):
        inner = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping):
            return _state_dict_in(inner)
    return content if isinstance(content, Mapping) else {}


def _tensors_of_model(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by the names of a model, those of the trunk where there is one, and the names of the others."""
    found = {_WRAPPER_PREFIX.sub("", key): value for key, value in state.items() if isinstance(value, Tensor)}
    trunk = next((prefix for prefix in _TRUNKS if any(key.startswith(prefix) for key in found)), "")
    chosen = {key: value for key, value in found.items() if key.startswith(trunk)}
    # A head of pre-training is none of the model, also where it has the same name.
    others = [key for key in found if key not in chosen]
    return {_model_name(key.removeprefix(trunk)): value for key, value in chosen.items()}, others


def _model_name(key: str) -> str:
    key = _WRAPPER_PREFIX.sub("", key)
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    return key


def _fit_positions(model: ImageTransformer, found: dict[str, Tensor]) -> tuple[str, ...]:
    """Bring ``found["pos_embed"]`` to the rows of the model; returns the names that were changed."""
    positions, own = found.get("pos_embed"), model.pos_embed
    if positions is None or positions.shape == own.shape or positions.ndim != 3:
        return ()
    rows = positions.shape[1]
    # Two squares are never 1 or 2 apart beyond a grid of one patch, so the token count names the prefix rows.
    prefix_rows = next(
        (prefix for prefix in (1, 0, 2) if math.isqrt(max(0, rows - prefix)) ** 2 == rows - prefix), None
    )
    if prefix_rows is None:
        return ()
    side = math.isqrt(rows - prefix_rows)
    prefix, patches = positions[:, :prefix_rows], positions[:, prefix_rows:]
    patches = resize_positions(patches, old_grid=(side, side), new_grid=model.grid_size, num_prefix_rows=0)

    own_prefix = patches.new_zeros(1, model.num_position_rows, positions.shape[2])
    shared = min(prefix_rows, model.num_position_rows)
    own_prefix[:, :shared] = prefix[:, :shared]
    found["pos_embed"] = torch.cat((own_prefix, patches), dim=1)
    if model.num_position_rows == 0:
        for index, token in enumerate(("cls_token", "dist_token")[:prefix_rows]):
            if token in found:
                found[token] = found[token] + prefix[:, index : index + 1]
    return ("pos_embed",)


def _check_shapes(name: str, loaded: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    different = [key for key in loaded if loaded[key].shape != wanted[key].shape]
    if different:
        shapes = ", ".join(f"{key} {tuple(loaded[key].shape)} for {tuple(wanted[key].shape)}" for key in different[:3])
        raise ValueError(
            f"{name} is of another architecture: {len(different)} of {len(loaded)} tensors have another shape "
            f"({shapes}); choose the model.name and options it was made with"
        )


def _shorten(names: tuple[str, ...], limit: int = 6) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
