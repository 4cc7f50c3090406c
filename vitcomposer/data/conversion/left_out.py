"""Lists the images that a conversion leaves out as they cannot be decoded, and bounds their number.

The list is one file for all splits, so that a later call for another split keeps what it finds there::

    OUT/left_out.csv    split,path,reason
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomposer.errors import require
from vitcomposer.stores.objects import Store

LEFT_OUT = "left_out.csv"
MAX_BAD_FRACTION = 0.01

_COLUMNS = ("split", "path", "reason")
_NAMED = 5  # images in the error

Bad = dict[str, str]  # file and reason, as a done-marker holds them


def check_fraction(max_bad_fraction: float) -> None:
    """Raise ConfigError, which is a ValueError, unless it is a share."""
    remedy = "0.01 leaves out one image of a hundred; --strict none."
    require(0 <= max_bad_fraction <= 1, "--max-bad-fraction", "in [0, 1]", max_bad_fraction, remedy)


def bad_images(markers: Sequence[Mapping[str, Any]]) -> list[Bad]:
    """Those of done-markers, by name."""
    return sorted((entry for marker in markers for entry in marker["bad"]), key=lambda entry: entry["file"])


def count_images(markers: Sequence[Mapping[str, Any]]) -> int:
    """What done-markers were made of: images that are stored and images that are not."""
    return sum(sum(marker["formats"].values()) + len(marker["bad"]) for marker in markers)


def check_bad(bad: Mapping[str, Sequence[Bad]], images: Mapping[str, int], max_bad_fraction: float, where: str) -> None:
    """Refuse splits that have more bad images than they may.

    Args:
        bad: By split.
        images: Of the whole split, good and bad.
        where: What the user can do to see them all.

    Raises:
        ValueError: The first few, and what to do about them.
    """
    over = [split for split, found in bad.items() if len(found) > max_bad_fraction * images[split]]
    if not over:
        return
    counts = " and ".join(f"{len(bad[split])} of {images[split]:,} in the split {split}" for split in over)
    least = max(len(bad[split]) / images[split] for split in over)
    found = [entry for split in over for entry in bad[split]]
    named = ", ".join(f"{entry['file']} ({entry['reason']})" for entry in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    given = "0 (--strict)" if max_bad_fraction == 0 else f"{max_bad_fraction:g}"
    raise ValueError(
        f"--max-bad-fraction must be at least the share of images that cannot be decoded, {counts}, got {given}. They "
        f"are {named}{more}.{where} Mend or remove them and convert into an empty place, or call again with "
        f"--max-bad-fraction {math.ceil(least * 1000) / 1000:g} to leave them out: what is done is kept."
    )


def write_list(store: Store, bad: Mapping[str, Sequence[Bad]]) -> None:
    """Bring the list up to date for these splits; there is none where nothing was ever left out."""
    old = store.read(LEFT_OUT)
    rows = [row for row in _read_rows(old or b"") if row[0] not in bad]
    rows += [(split, entry["file"], entry["reason"]) for split, found in bad.items() for entry in found]
    if not rows and old is None:
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_COLUMNS, *sorted(rows)])
    data = text.getvalue().encode("utf-8", "surrogateescape")  # names as they are, which need not be text
    if data != old:
        store.write(LEFT_OUT, data)


def _read_rows(data: bytes) -> list[tuple[str, ...]]:
    lines = io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")
    return [tuple(row) for row in csv.reader(lines) if len(row) == len(_COLUMNS) and tuple(row) != _COLUMNS]
