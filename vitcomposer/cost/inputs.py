"""Holds what a CPU core makes of stored images a second, as it was measured, and what other settings would make.

CPU seconds of an image come from ``input_*.json`` of benchmarks.input.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitcomposer.schema import SelfSupervised, Supervised


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
    found = [
        Change(what, _scaled(now, known[now.kind], _combined([known[k] for k in plus], [known[k] for k in minus])))
        for what, (plus, minus) in fit.items()
    ]
    small = _with_small_images(cfg, now, known) if isinstance(cfg, Supervised) else None
    return found if small is None else [*found, Change("vitcomposer convert --for this yaml", small)]


def _with_small_images(cfg: Supervised, now: Input, known: dict[str, Input]) -> Input | None:
    """``now`` with small views cut from the column ``image_small``, as far as such views were measured.

    Augmentation costs what it does at full size, which is on the slow side.
    """
    small, plain = known.get("ours-small"), known.get("ours-seekable")
    if small is None or plain is None or now is not known.get(now.kind) or not cfg.augment.low_resolution_stages:
        return None
    largest, full = max(small.rates), max(now.rates)
    added = now.seconds(full) - plain.seconds(full)
    cut = {size: 1 / (small.seconds(size) + added) for size in small.rates}
    whole = {size: 1 / now.seconds(size) for size in (largest + 1, *now.rates) if size > largest}
    return replace(now, rates=cut | whole)


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
