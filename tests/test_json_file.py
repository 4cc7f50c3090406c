"""JSON files of strangers: no size, depth, type or kind of file does more than give one error."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from vitcomposer.json_file import parse_json, read_json, to_block


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "Expecting property name"),
        (b'["\x80"]', "can't decode"),
        (b"[" * 100_000 + b"]" * 100_000, "it nests too deep"),
        (b" " * 1001, "it has more than 1000 bytes"),
    ],
)
def test_file_is_refused(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=why):
        read_json(tmp_path / "a.json", 1000 if why.startswith("it has") else 1 << 20)


@pytest.mark.timeout(20)
def test_what_never_ends_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(ValueError, match="it is no file"):
            read_json(tmp_path / name)
    assert parse_json(b'{"a": [1]}') == {"a": [1]}


@dataclass(frozen=True)
class Block:
    size: int
    ratio: float = 1.0
    pool: Literal["avg", "token"] | None = None
    flag: bool | None = None


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([], "must be an object"),
        ({}, "missing 1 required"),
        ({"size": 1, "sice": 2}, "the key 'sice', which is not known"),
        ({"size": "1"}, "size has the value '1'"),
        ({"size": True}, "size has the value True"),
        ({"size": 1e9}, "size has the value 1000000000.0"),
        ({"size": 1, "ratio": float("nan")}, "ratio has the value nan"),
        ({"size": 1, "ratio": float("inf")}, "ratio has the value inf"),
        ({"size": 1, "pool": "max"}, "pool has the value 'max'"),
        ({"size": 1, "flag": 1}, "flag has the value 1"),
    ],
)
def test_value_of_another_type_is_named(values: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        to_block(Block, values)


def test_values_that_fit_are_taken() -> None:
    assert to_block(Block, {"size": 3, "ratio": 2, "pool": None, "flag": False}) == Block(3, 2, None, False)
