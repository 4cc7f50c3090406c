"""Reads checkpoint files of others and of our own, without running code in them, and names tensors as a model does.

Layouts are flat state dicts (timm, ConViT, SwAV), ``{"model": ...}`` (DeiT, DeiT III), ``{"state_dict": ...}`` (timm
training, MoCo-v3), ``{"teacher": ..., "student": ...}`` (DINO), ``{"classy_state_dict": ...}`` (VISSL) and Composer's
``{"state": {"model": ...}}``, as .safetensors or as torch files.
"""

import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from vitcomposer.models.weights.plain_pickle import UnsafeError
from vitcomposer.models.weights.sharded import read_shares
from vitcomposer.models.weights.torch_file import read_torch_file
from vitcomposer.stores.weights import how_to_get

_WRAPPERS = ("state", "classy_state_dict", "base_model", "model", "state_dict", "teacher", "student")
_LARGEST_HEADER = 1 << 20  # bytes, of a safetensors file with few tensors
_WRAPPER_PREFIX = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+")
# Where pre-training keeps the trunk, the first that occurs: ours and VISSL's, then MoCo-v3's and DINO's own.
_TRUNKS = ("teacher_trunk.", "trunk.", "base_encoder.", "backbone.")
# DeiT III's names of what timm calls LayerScale; VISSL's of a ResNet and of a ConViT.
_RENAMED = (
    (re.compile(r"\.gamma_([12])$"), r".ls\1.gamma"),
    (re.compile(r"^_feature_blocks\."), ""),
    (re.compile(r"^class_token$"), "cls_token"),
    (re.compile(r"^pos_embedding$"), "pos_embed"),
    (re.compile(r"\.attn\.alpha$"), ".attn.gating_param"),
    (re.compile(r"\.mlp\.linear_([12])\."), r".mlp.fc\1."),
)


def read_checkpoint(path: str | PathLike[str]) -> Any:
    """The content of a .safetensors or torch file, or a folder of shares, read without running code from it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not safe or not readable.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}. {how_to_get(str(path))}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return _load(path, tensors=True)
    except UnsafeError as error:
        raise ValueError(
            f"{path} was not loaded: it needs {error}, and loading that can run any code. If you trust where it comes "
            f"from, keep its weights alone, once: torch.save(torch.load({str(path)!r}, weights_only=False)['model'], "
            "'weights.pt') with the key that they are under, and load weights.pt"
        ) from error


def check_harmless(path: str | PathLike[str]) -> Any:
    """The content of a torch file, or an error if it would run code when unpickled as a whole; no tensor is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It would, or it is no file that ``torch.save`` writes.
    """
    try:
        return _load(Path(path), tensors=False)
    except UnsafeError as error:
        raise ValueError(f"{path} needs {error}, and loading that can run any code") from error


def _load(path: Path, *, tensors: bool) -> Any:
    try:
        return read_shares(path, tensors=tensors) if path.is_dir() else read_torch_file(path, tensors=tensors)
    except (FileNotFoundError, UnsafeError):
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} could not be read, is it a whole checkpoint? {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file  # only needed for such files

    try:
        with path.open("rb") as file:  # before a header takes ten times its size of memory
            size, header = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if header > min(size, _LARGEST_HEADER + size // 8):
            raise ValueError(f"its header has {header} bytes of the file's {size}")
        return load_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors has no exception of its own that is public
        line = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{path} could not be read, is it a whole checkpoint? {line}") from error


def model_tensors(content: Any, *, as_ours: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of a checkpoint's content by the names of a model, and the names of those that are none of the model.

    Args:
        as_ours: By the names of our own networks; those of timm's others have rules of their own.

    Of pre-training the trunk that is meant to be used is taken: DINO's teacher, MoCo's encoder (not its momentum
    encoder), SwAV's and SimCLR's trunk.
    """
    state = _state_dict_in(content)
    found = {_WRAPPER_PREFIX.sub("", key): value for key, value in state.items() if isinstance(value, Tensor)}
    trunk = next((prefix for prefix in _TRUNKS if any(key.startswith(prefix) for key in found)), "")
    chosen = {key: value for key, value in found.items() if key.startswith(trunk)}
    # A head of pre-training is none of the model, also where it has the same name.
    others = [key for key in found if key not in chosen]
    if not as_ours:
        return {_WRAPPER_PREFIX.sub("", key.removeprefix(trunk)): value for key, value in chosen.items()}, others
    named = ((_model_name(key.removeprefix(trunk)), value) for key, value in chosen.items())
    return {name: _as_ours(name, value) for name, value in named}, others


def _state_dict_in(content: Any) -> Mapping[str, Any]:
    """The state dict inside a checkpoint, under whichever wrapper."""
    if not isinstance(content, Mapping):
        return {}
    inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
    if inner is not None:
        return _state_dict_in(inner)
    # VISSL keeps a dict for each part, trunk and heads.
    parts = [
        (part, inner) for part, inner in content.items() if part in ("trunk", "heads") and isinstance(inner, Mapping)
    ]
    return {f"{part}.{key}": value for part, inner in parts for key, value in inner.items()} or content


def _model_name(key: str) -> str:
    key = _WRAPPER_PREFIX.sub("", key)
    for pattern, replacement in _RENAMED:
        key = pattern.sub(replacement, key)
    return key


def _as_ours(name: str, value: Tensor) -> Tensor:
    """VISSL's ConViT has gates of shape (1, h, 1, 1), and repeats each relative position n times and divides by n."""
    if name.endswith(".attn.gating_param"):
        return value.flatten()
    if name.endswith(".attn.pos_proj.weight") and value.ndim == 2 and value.shape[1] > 3 and value.shape[1] % 3 == 0:
        return value.unflatten(1, (-1, 3)).mean(dim=1)
    return value
