"""Makes one data set on several machines that have nothing in common but the place it is written to.

A part is every n-th chunk of the one plan (conversion.plan). Whoever makes a part writes its marker last, and the
merge needs nothing but markers. Their folder has the name that parts had at first, so that older ones are found::

    OUT/.convert/train/shares/00003-of-00016.json
"""

import re
from pathlib import Path
from typing import Any

from vitcomposer.data.conversion.left_out import MAX_BAD_FRACTION, bad_images, check_bad, check_fraction
from vitcomposer.data.conversion.plan import (
    STATE,
    done_marker,
    plan_difference,
    plan_hash,
    read_json,
    read_plan,
    to_json,
)
from vitcomposer.data.conversion.sources import Source, check_same_classes
from vitcomposer.data.conversion.write import Progress, begin, finish, finished_splits, make, read_markers, write_new
from vitcomposer.stores.objects import Store, open_store


def convert_part(
    source: Source,
    out: str | Path,
    index: int,
    count: int,
    *,
    workers: int | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    on_progress: Progress | None = None,
    **plan: Any,
) -> int:
    """Write part ``index`` of ``count``, from 0. :func:`merge` makes a data set of all of them.

    Parts may be made at the same time, anywhere, in any order, and more than once: after a crash the same call makes
    the shards that are missing. The other arguments are those of :func:`vitcomposer.data.convert`; ``plan`` is its
    ``shard_size``, ``seed`` and ``stored``.

    Returns:
        The number of images that are left out of this part.

    Raises:
        ValueError: As ``convert`` does; a part has too many bad images when they alone are more than the whole split
            may have.
    """
    check_part(index, count)
    check_fraction(max_bad_fraction)
    with open_store(out).one_writer(f".{index:05}.{count:05}"):
        return _make_part(source, out, index, count, max_bad_fraction, plan, workers=workers, on_progress=on_progress)


def _make_part(  # noqa: PLR0913, PLR0917
    source: Source, out: str | Path, index: int, count: int, max_bad_fraction: float, plan: dict[str, Any], **how: Any
) -> int:
    store, chunks = begin(source, out, **plan)
    mine = chunks[index::count]
    done = make(source, store, mine, **how)
    bad = {split: bad_images([done[chunk.marker] for chunk in mine if chunk.split == split]) for split in source.splits}
    images = {split: sum(len(chunk.items) for chunk in chunks if chunk.split == split) for split in source.splits}
    check_bad(bad, images, max_bad_fraction, " Other parts may have more.")
    for split in source.splits:
        recorded = read_plan(store, split)
        if plan_hash(recorded or {}) != next(chunk.plan for chunk in chunks if chunk.split == split):
            raise ValueError(
                f"{store.url}/{split} was begun with other input at the same moment. Call again to see the difference."
            )
        numbers = [chunk.number for chunk in mine if chunk.split == split]
        part = {"plan": recorded, "numbers": numbers, "max_bad_fraction": max_bad_fraction}
        write_new(store, _marker_name(split, index, count), to_json(part))
    return sum(map(len, bad.values()))


def check_part(index: int, count: int) -> None:
    """Raise ValueError unless there is such a part."""
    if count < 1:
        raise ValueError(f"--parts must be 1 or more, got {count}. Give the number of calls that share the work.")
    if not 0 <= index < count:
        raise ValueError(
            f"--part must be from 0 to {count - 1} with --parts {count}, got {index}. Count the parts from 0."
        )


def merge(out: str | Path, max_bad_fraction: float | None = None) -> dict[str, Any]:
    """Make one data set of parts: the files that :func:`vitcomposer.data.convert` had written, to the byte.

    Args:
        out: Where they are.
        max_bad_fraction: Of the images of a split; None is the largest that a part was made with.

    Returns:
        What ``summary.json`` holds for the splits that were made in parts.

    Raises:
        ValueError: Parts that are missing or do not belong together, which the message names, or have more bad images
            than may be left out.
    """
    if max_bad_fraction is not None:
        check_fraction(max_bad_fraction)
    store = open_store(out)
    with store.one_writer():
        return _merge(store, max_bad_fraction)


def _merge(store: Store, max_bad_fraction: float | None) -> dict[str, Any]:
    counts = {split: _complete(split, found) for split, found in _find_parts(store).items()}
    if not counts:
        raise ValueError(
            f"{store.url} must hold parts of a conversion, it holds none that is done. Make them with --part and "
            "--parts first, into the same place."
        )
    class_names: dict[str, list[str]] = {}
    markers: dict[str, list[dict[str, Any]]] = {}
    allowed = []
    for split, count in counts.items():
        parts = [read_json(store, _marker_name(split, index, count)) for index in range(count)]
        class_names[split], markers[split] = _read_split(store, split, parts)
        allowed += [part.get("max_bad_fraction", MAX_BAD_FRACTION) for part in parts]
    first = next(iter(class_names))
    for other, names in {**finished_splits(store), **class_names}.items():
        check_same_classes(class_names[first], names, f"{store.url}/{first}", f"{store.url}/{other}")
    return finish(store, class_names, markers, max(allowed) if max_bad_fraction is None else max_bad_fraction)


def _read_split(store: Store, split: str, parts: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Class names, and the done-markers in order, after a check that all are of the plan on record."""
    plan = read_plan(store, split) or {}
    names = [[done_marker(split, number) for number in part["numbers"]] for part in parts]
    done = read_markers(store, dict.fromkeys(sorted(sum(names, [])), plan_hash(plan)))
    # chunks of another plan may have been written over those of a good part
    odd = [i for i, part in enumerate(parts) if part["plan"] != plan or not done.keys() >= set(names[i])]
    if odd:
        other = next((parts[i]["plan"] for i in odd if parts[i]["plan"] != plan), None)
        found = other and plan_difference(plan, other) or "other images or classes, or shards written over"
        raise ValueError(
            f"All parts of the split {split} must be of the plan on record in {store.url}, part {_numbers(odd)} of "
            f"{len(parts)} is not: {found}. Make it again with the input on record, or all in an empty place."
        )
    return plan["class_names"], list(done.values())


def _marker_name(split: str, index: int, count: int) -> str:
    return f"{STATE}/{split}/shares/{index:05}-of-{count:05}.json"


def _find_parts(store: Store) -> dict[str, dict[int, set[int]]]:
    """For every split and number of parts the parts that are done."""
    found: dict[str, dict[int, set[int]]] = {}
    for name in sorted(store.sizes(f"{STATE}/")):
        match = re.fullmatch(rf"{re.escape(STATE)}/([^/]+)/shares/(\d+)-of-(\d+)\.json", name)
        if match:
            found.setdefault(match[1], {}).setdefault(int(match[3]), set()).add(int(match[2]))
    return found


def _complete(split: str, found: dict[int, set[int]]) -> int:
    """A number of parts of which all are done."""
    missing = {count: sorted(set(range(count)) - done) for count, done in sorted(found.items())}
    whole = [count for count, numbers in missing.items() if not numbers]
    if whole:
        return whole[0]
    listed = " and ".join(f"{_numbers(numbers)} of {count}" for count, numbers in missing.items())
    mixed = " It was begun with different --parts: finish one of them." if len(missing) > 1 else ""
    raise ValueError(
        f"All parts of the split {split} must be done before the merge, missing is part {listed}.{mixed} Make what is "
        "missing with the same command, then merge again."
    )


def _numbers(numbers: list[int]) -> str:
    more = f" and {len(numbers) - 20} more" if len(numbers) > 20 else ""
    return ", ".join(map(str, numbers[:20])) + more
