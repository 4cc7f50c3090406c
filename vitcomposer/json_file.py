"""Reads JSON files of strangers: of bounded size and depth, with one kind of error."""

import json
import math
import stat
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_Block = TypeVar("_Block")

MOST_BYTES = 1 << 28  # an index of 300,000 shards, 20 TB at 64 MB each; Python takes ten times as much memory for it


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """What a file holds.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no file, larger than ``most`` bytes, or no JSON; the message does not name it.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no file")
    with path.open("rb") as file:
        data = file.read(most + 1)
    return parse_json(data, most)


def parse_json(data: bytes, most: int = MOST_BYTES) -> Any:
    """As :func:`read_json`, of what was read: one byte more than ``most`` is enough to tell."""
    if len(data) > most:
        raise ValueError(f"it has more than {most} bytes")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def to_block(kind: type[_Block], values: Any) -> _Block:
    """A dataclass of plain fields from an object of JSON.

    Raises:
        ValueError: A key is missing or unknown, or a value of another type than the field's.
    """
    hints = get_type_hints(kind)
    if not isinstance(values, dict):
        raise ValueError(f"it must be an object, got {values!r}"[:200])
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"it has the key {key!r}, which is not known")
        if not _fits(value, hints[key]):
            raise ValueError(f"{key} has the value {value!r}, which is of another type"[:200])
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (NoneType if hint is None else hint)
