"""Holds what a CPU core makes of stored images a second, as it was measured, and what other settings would make.

CPU seconds of an image come from ``input_*.json`` of benchmarks.input.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitcomposer.data.conversion.for_recipe import needs_of
from vitcomposer.data.mds.small_column import needed_side
from vitcomposer.schema import SelfSupervised, Supervised

_COLUMN = "small views from image_small"


@dataclass(frozen=True, kw_only=True)
class Input:
    """What one core makes of images that are stored and augmented in one way.

    Attributes:
        kind: A candidate of benchmarks.input, without its size.
        rates: Images per CPU second, by the pixels that are made of an image (of all its crops).
        bytes_per_image: As stored.
    """

    kind: str
    label: str
    source: str
    rates: dict[int, float]
    bytes_per_image: float

    def seconds(self, pixels: int) -> float:
        """CPU seconds of an image: linear in the pixels between measured sizes.

        Below the smallest measured size they are that size's, above the largest they grow with the pixels: both are on
        the slow side.
        """
        sizes = sorted(self.rates)
        spent = float(np.interp(pixels, sizes, [1 / self.rates[size] for size in sizes]))
        return spent * max(1.0, pixels / sizes[-1])


def kind_of(cfg: Supervised | SelfSupervised, *, gpu: bool = True) -> str:
    """The candidate of benchmarks.input that does what the workers of a recipe do, from JPEGs that ``convert`` wrote.

    Args:
        gpu: Whether the run has one, for ``data.augment_on: auto``.
    """
    where = cfg.data.augment_on
    if isinstance(cfg, SelfSupervised):
        return "ours-device" if where == "device" or (where == "auto" and gpu) else "ours"
    augment = cfg.augment
    if augment.rand_augment is not None and where != "device":
        return "ours-ra"
    if augment.three_augment and (where == "worker" or (where == "auto" and not gpu)):
        return "ours-3a"
    return "ours-repeated" if augment.shared_decodes and augment.repeated_augmentation == 3 else "ours-seekable"


def measured_inputs(results: Path, cfg: Supervised | SelfSupervised) -> dict[str, Input]:
    """What benchmarks.input measured of this project, by kind; nothing where the folder has no such file."""
    sets = ("multicrop_full",) if isinstance(cfg, SelfSupervised) else ("full", "small_full")
    paths = [path for path in (results / f"input_{each}.json" for each in sets) if path.is_file()]
    rows = [(path, row) for path in paths for row in json.loads(path.read_text("utf-8"))["candidates"].items()]
    found: dict[str, Input] = {}
    for path, (name, row) in rows:
        if not name.startswith("ours") or "images_per_cpu_second" not in row:
            continue
        kind = re.sub(r"-\d+$", "", name)
        rate = {sum(h * w for _, h, w in row["shapes"]): row["images_per_cpu_second"]["median"]}
        earlier = found[kind].rates if kind in found else {}
        found[kind] = Input(
            kind=kind,
            label=row["label"],
            source=path.name,
            rates=earlier | rate,
            bytes_per_image=row["stored_bytes"],
        )
    return found


def at_small_sizes(cfg: Supervised | SelfSupervised, now: Input, known: dict[str, Input], *, column: bool) -> Input:
    """``now``, measured at full size, with what small views of one crop were measured to cost.

    They are scaled by what the same crop at full size took in either measurement: two machines may have made them.
    Augmentation costs what it does at full size, which is on the slow side.

    Args:
        column: Whether the data set has the column ``image_small`` that ``convert --for`` stores for this recipe.
    """
    plain, own = known.get("ours-seekable"), known.get(now.kind)
    whole, small = known.get("ours-whole"), known.get("ours-small")
    if plain is None or own is None or whole is None or small is None or now.kind in ("ours-raw", "ours-repeated"):
        return now
    full = max(plain.rates)
    if full not in whole.rates or not isinstance(cfg, Supervised):
        return now
    slower, augmentation = plain.seconds(full) / whole.seconds(full), own.seconds(full) - plain.seconds(full)
    cut = needs_of(cfg, "").cut_small if column else []
    spent = {size: whole.seconds(size) for size in whole.rates if size < full}
    spent |= {size: small.seconds(size) for size in small.rates if cut and size <= cut[-1] ** 2}
    rates = {size: 1 / (slower * seconds + augmentation) for size, seconds in spent.items()} | now.rates
    if not cut:
        return replace(now, rates=rates)
    # The column was measured with the side that the largest of the measured views needs.
    side = needed_side(cut[-1]) / needed_side(math.isqrt(max(small.rates)))
    stored = (small.bytes_per_image - whole.bytes_per_image) * side**2
    return replace(now, rates=rates, bytes_per_image=now.bytes_per_image + stored, label=f"{now.label}, {_COLUMN}")


class Change(NamedTuple):
    """Something that a user can change, and the input that it gives."""

    what: str
    given: Input


def changes(cfg: Supervised | SelfSupervised, now: Input, known: dict[str, Input]) -> list[Change]:
    """What makes the input cheaper than ``now`` and was measured.

    The measured differences of ``known`` are scaled to the speed of ``now``, which may come from another machine.
    """
    if isinstance(cfg, SelfSupervised):
        parts = {"data.augment_on=device": (["ours-device"], [])} if now.kind == "ours" else {}
    else:
        parts = _changes_of_crops(cfg, now.kind)
    named = {what: [*plus, *minus, now.kind] for what, (plus, minus) in parts.items()}
    fit = {what: part for what, part in parts.items() if all(kind in known for kind in named[what])}
    return [
        Change(what, _scaled(now, known[now.kind], _combined([known[k] for k in plus], [known[k] for k in minus])))
        for what, (plus, minus) in fit.items()
    ]


def _changes_of_crops(cfg: Supervised, kind: str) -> dict[str, tuple[list[str], list[str]]]:
    """By what is changed, the kinds whose CPU seconds are added, and those whose are taken away."""
    raw = "vitcomposer convert --raw-fraction 1"
    if kind == "ours-repeated":
        return {raw: (["ours-raw"], [])}
    augmented = kind in ("ours-ra", "ours-3a")
    found = {raw: (["ours-raw", kind], ["ours-seekable"])}
    if augmented:
        found["data.augment_on=device"] = ["ours-seekable"], []
    if cfg.augment.repeated_augmentation == 3:
        found["augment.shared_decodes=true"] = ["ours-repeated", kind], ["ours-seekable"]
    return found


def _combined(plus: list[Input], minus: list[Input]) -> Input:
    """The input whose CPU seconds are ``plus`` less ``minus``, stored as the first of ``plus``."""
    sizes = sorted({size for part in (*plus, *minus) for size in part.rates})
    spent = {s: sum(p.seconds(s) for p in plus) - sum(m.seconds(s) for m in minus) for s in sizes}
    return replace(plus[0], rates={size: 1 / seconds for size, seconds in spent.items()})


def _scaled(now: Input, measured: Input, changed: Input) -> Input:
    """``changed`` on the machine of ``now``, whose own measurement is ``measured``."""
    sizes = sorted({*changed.rates, *now.rates})
    rates = {size: measured.seconds(size) / (now.seconds(size) * changed.seconds(size)) for size in sizes}
    # Only another way of storing changes the bytes.
    same = changed.bytes_per_image == measured.bytes_per_image
    return replace(changed, rates=rates, bytes_per_image=now.bytes_per_image if same else changed.bytes_per_image)
