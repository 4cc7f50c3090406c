"""Loads weights from files of others and of our own into a model: positions resized, heads replaced, all reported."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from vitcomposer.models.positions import resize_positions
from vitcomposer.models.transformer import ImageTransformer
from vitcomposer.models.trunks import Trunk
from vitcomposer.models.weights.architecture import check_same, declared, fixed_positions, notes_on
from vitcomposer.models.weights.formats import check_harmless, model_tensors, read_checkpoint
from vitcomposer.models.weights.timm_files import fit_to_trunk, lost_from
from vitcomposer.origins import weights_file
from vitcomposer.stores.hub import OnHub, fetch_from_hub, is_on_hub

__all__ = ["LoadReport", "check_harmless", "load_weights", "read_checkpoint"]

_HEAD = re.compile(r"^(head(_dist)?|fc)\.")
_ATTENTION_BIAS = re.compile(r"\.attn\.(qkv|qk|v)\.bias$")
# What a network computes with. Without it the rest is another function; the distillation token and heads may go.
_NEEDED = re.compile(
    r"^(pos_embed|cls_token|reg_token)$|^(patch_embed|blocks|conv1|bn1|layer\d|norm|norm_pre|fc_norm)\."
)
_REMEDIES = (
    (_ATTENTION_BIAS, "set model.qkv_bias=true"),
    (re.compile(r"\.ls[12]\.gamma$"), "set model.init_values=1e-4, or another value above 0"),
    (re.compile(r"^pos_embed$"), "set model.position_embedding=learned"),
    (re.compile(r"^cls_token$"), "set model.class_token=true"),
    (re.compile(""), "choose the model.name and options it was made with"),
)
# What a source may be without, and then the model has to be too.
_WITHOUT = {
    "pos_embed": "set model.position_embedding=sincos, or sincos_moco3 for weights of MoCo-v3",
    "cls_token": "set model.class_token=false model.pool=avg",
}


@dataclass(frozen=True)
class LoadReport:
    """What ``load_weights`` did, by parameter name.

    Attributes:
        source: The file, or ``state dict``.
        loaded: Filled from the source, the resized and the zero ones included.
        resized: Position embedding whose rows had to be fitted to the model.
        zeroed: Biases of queries, keys and values, which the source was trained without: zero is the same function.
        replaced_heads: Heads with another number of classes in the source; they keep their initial values.
        missing: In the model but not in the source; they keep their initial values.
        unexpected: In the source but not in the model.
        notes: What the source says about its network, what had to be assumed, which of several weights were taken.
        heads: What of the model is a classifier.
    """

    source: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    zeroed: tuple[str, ...]
    replaced_heads: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    notes: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def matched(self) -> float:
        """Share of the model's tensors, heads aside, that came from the source; in [0, 1]."""
        loaded = len(set(self.loaded) - set(self.heads))
        missing = len(set(self.missing) - set(self.heads))
        return loaded / max(1, loaded + missing)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded, {self.matched:.1%} of the model without its head"]
        for title, names in (
            ("resized to the model's grid", self.resized),
            ("zero, trained without", self.zeroed),
            ("left as initialised, other number of classes", self.replaced_heads),
            ("left as initialised, not in the source", self.missing),
            ("left out, in the source but not in the model", self.unexpected),
        ):
            if names:
                lines.append(f"  {title}: {_shorten(names)}")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    source: str | PathLike[str] | Mapping[str, Any],
    *,
    min_matched: float = 0.9,
    origin: str | PathLike[str] | None = None,
) -> LoadReport:
    """Fill ``model`` in place from a checkpoint; nothing is changed when an error is raised.

    Position embeddings of another image size are resized (bicubic), rows of tokens the source does not have are zero,
    and a row of a token that has no position in ``model`` is added to the token, which is the same function. A head
    with another number of classes and what the source lacks keep their initial values and are reported: into a
    distilled model from a plain one, the distillation token and its head.

    Args:
        source: ``timm:NAME.TAG`` or ``hf:OWNER/NAME`` on the Hugging Face hub.
            Or a file, run folder (its newest checkpoint) or exported folder, or what ``torch.load`` made of a file.
            Files are read without running code from them.
        min_matched: Least share of the model's tensors, heads aside, the source has to fill.
        origin: The file that a given state dict was read from, which what lies beside it may say more about.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not safe or not readable, too little of it matches, a shape differs that cannot be
            adapted, the source has more blocks, biases or scales than the model, or it says that it is of another
            architecture: see ``models.weights.architecture``.
    """
    path = origin if isinstance(source, Mapping) else source
    name = str(path) if path is not None else "state dict"
    on_hub = fetch_from_hub(source) if isinstance(source, str) and is_on_hub(source) else None
    path = on_hub.file if on_hub else path
    content = (
        source if isinstance(source, Mapping) else read_checkpoint(weights_file(on_hub.file if on_hub else source))
    )
    of_timm = isinstance(model, Trunk)
    found, others = model_tensors(content, as_ours=not of_timm)
    wanted = model.state_dict()
    said = declared(path, content, found)
    check_same(model, said, name)
    _drop_computed_positions(model, found)

    resized: tuple[str, ...] = ()
    if isinstance(model, ImageTransformer) and "pos_embed" in wanted:
        resized = _fit_positions(model, found, name)
    elif isinstance(model, Trunk):
        found, resized = fit_to_trunk(model, found, name)
    zeroed = _add_missing_biases(found, wanted)
    is_head = _heads_of(model)
    replaced = {key for key in found.keys() & wanted.keys() if is_head(key) and found[key].shape != wanted[key].shape}
    # Weight and bias of a head stay together: half a head is no head.
    replaced_modules = {key.rpartition(".")[0] for key in replaced}
    replaced = {key for key in wanted if key.rpartition(".")[0] in replaced_modules}
    loaded = {key: found[key] for key in wanted if key in found and key not in replaced}
    report = LoadReport(
        source=name,
        loaded=tuple(loaded),
        resized=resized,
        zeroed=zeroed,
        replaced_heads=tuple(sorted(replaced)),
        missing=tuple(key for key in wanted if key not in found and key not in replaced),
        unexpected=tuple(sorted({*(found.keys() - wanted.keys()), *others})),
        notes=(*_notes_on_hub(on_hub), *notes_on(model, said, content)),
        heads=tuple(key for key in wanted if is_head(key)),
    )
    _check_shapes(name, loaded, wanted)
    _check_matched(report, min_matched)
    lost = lost_from(model, found) if isinstance(model, Trunk) else _lost(found, wanted)
    _check_nothing_lost(name, lost)
    _check_nothing_random(report)
    model.load_state_dict(loaded, strict=False)
    return report


def _notes_on_hub(found: OnHub | None) -> tuple[str, ...]:
    return () if found is None else (f"{found.repository}, licence: {found.licence or 'not stated'}",)


def _heads_of(model: nn.Module) -> Callable[[str], bool]:
    return model.is_head if isinstance(model, Trunk) else lambda key: _HEAD.match(key) is not None


def _drop_computed_positions(model: nn.Module, found: dict[str, Tensor]) -> None:
    """A file that keeps fixed positions, as MoCo-v3's do, has nothing that a model which computes them lacks."""
    config = getattr(model, "config", None)
    kind = getattr(config, "position_embedding", "learned")
    if isinstance(model, ImageTransformer) and kind != "learned" and fixed_positions(found.get("pos_embed")) == kind:
        del found["pos_embed"]


def _fit_positions(model: ImageTransformer, found: dict[str, Tensor], name: str) -> tuple[str, ...]:
    """Bring ``found["pos_embed"]`` to the rows of the model; returns the names that were changed."""
    positions, own = found.get("pos_embed"), model.pos_embed
    if positions is None or positions.shape == own.shape or positions.ndim != 3:
        return ()
    rows = positions.shape[1]
    # Two squares are never 1 or 2 apart beyond a grid of one patch, so the token count names the prefix rows.
    prefix_rows = next((p for p in (1, 0, 2) if rows > p and math.isqrt(rows - p) ** 2 == rows - p), None)
    if prefix_rows is None:
        raise ValueError(
            f"{name} has {rows} rows of positions, which are no square grid of patches with up to two tokens before "
            "it: resize its pos_embed to a square grid first (timm.layers.resample_abs_pos_embed)"
        )
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


def _add_missing_biases(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Zeros where the source has a projection to queries, keys or values without bias; returns their names."""
    names = [
        key
        for key in wanted
        if _ATTENTION_BIAS.search(key) and key not in found and f"{key.removesuffix('bias')}weight" in found
    ]
    found.update({key: torch.zeros_like(wanted[key]) for key in names})
    return tuple(names)


def _check_shapes(name: str, loaded: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    different = [key for key in loaded if loaded[key].shape != wanted[key].shape]
    if different:
        shapes = ", ".join(f"{key} {tuple(loaded[key].shape)} for {tuple(wanted[key].shape)}" for key in different[:3])
        raise ValueError(
            f"{name} is of another architecture: {len(different)} of {len(loaded)} tensors have another shape "
            f"({shapes}); choose the model.name and options it was made with"
        )


def _check_matched(report: LoadReport, min_matched: float) -> None:
    if report.matched < min_matched:
        raise ValueError(
            f"{report.source} fills {report.matched:.1%} of the model, at least {min_matched:.1%} is required; is it "
            f"the checkpoint of another model? Missing: {_shorten(report.missing)}. "
            f"Not used: {_shorten(report.unexpected)}"
        )


def _lost(found: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What the source computes with and the model does not have; biases of zero compute nothing."""
    return [
        key
        for key in found
        if key not in wanted and _NEEDED.match(key) and not (key.endswith(".bias") and not found[key].any())
    ]


def _check_nothing_lost(name: str, lost: list[str]) -> None:
    """Refuse to drop what the source computes with."""
    if lost:
        remedy = next(remedy for pattern, remedy in _REMEDIES if all(pattern.search(key) for key in lost))
        raise ValueError(f"{name} is of another architecture: the model has no {_shorten(tuple(lost), 3)}; {remedy}")


def _check_nothing_random(report: LoadReport) -> None:
    """Refuse a model whose positions, class token or scales no source fills: it would compute with random ones."""
    absent = [key for key in report.missing if key in _WITHOUT or key.endswith(".gamma")]
    if absent:
        remedy = _WITHOUT.get(absent[0], "set model.init_values=0")
        raise ValueError(
            f"{report.source} is of another architecture: it has no {_shorten(tuple(absent), 3)}; {remedy}"
        )


def _shorten(names: tuple[str, ...], limit: int = 6) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
