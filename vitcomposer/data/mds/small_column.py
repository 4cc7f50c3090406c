"""Says which training crops are cut from the smaller image that a data set stores beside each one, by one rule.

``vitcomposer convert --raw-below C`` stores ``image_small``, each image with a shorter side of C pixels, and C in
``index.json``. Crops are cut from it where they become views of at most 3/5 C pixels. So a small view has at least the
pixels to be made of that a view of 224 has in ImageNet's photographs, whose shorter side is 375 (375 / 224 = 1.67):
as few crops are enlarged as in the papers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOW_RESOLUTION_COLUMN = "image_small"
_SIDE, _VIEW = 5, 3  # pixels of the shorter side for so many pixels of a view
_MOST = 1 << 16  # pixels of a side


def largest_view(short_side: int) -> int:
    """Pixels of the largest view that is cut from a small image with this shorter side."""
    return short_side * _VIEW // _SIDE


def needed_side(view: int) -> int:
    """The least shorter side of a small image that views of so many pixels are cut from."""
    return -(-view * _SIDE // _VIEW)


def listed(sizes: Sequence[int]) -> str:
    """Numbers as words: 160, 192 and 224."""
    *most, last = map(str, sizes)
    return f"{', '.join(most)} and {last}" if most else last


def small_side(index: Any) -> int | None:
    """The shorter side of ``image_small`` that an ``index.json`` names; None where it names none."""
    side = index.get(LOW_RESOLUTION_COLUMN) if isinstance(index, dict) else None
    return side if isinstance(side, int) and not isinstance(side, bool) and 0 < side < _MOST else None


def read_small_side(index: Path) -> int | None:
    """What :func:`small_side` says of a file that was found to be an index."""
    return small_side(json.loads(index.read_bytes()))
