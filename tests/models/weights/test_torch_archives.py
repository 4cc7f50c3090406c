"""Torch files as archives: what torch never writes is refused before it is unpacked."""

import io
import re
import struct
import tokenize
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models.weights.test_torch_file import archive, read_bytes, tensor_program
from vitcomposer.models.weights.torch_file import read_torch_file

# Archives


def test_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """Two megabytes that would be two gigabytes."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", tensor_program(1 << 24, 0, (1 << 24,), (1,)))
        file.writestr("a/data/0", bytes(1 << 26))
    tracemalloc.start()
    with pytest.raises(ValueError, match="is compressed or encrypted, which torch.save never does"):
        read_torch_file(tmp_path / "a.pt")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def edited(change: Callable[[bytearray, int, int], None]) -> bytes:
    """An archive of two storages after a change that gets the bytes, and where their directory entries begin."""
    whole = bytearray(archive(b"\x80\x02N.", {"0": b"zero zero", "1": b"one one o"}))
    ends = [place for place in range(len(whole)) if whole[place : place + 4] == b"PK\1\2"]
    change(whole, ends[1], ends[2])
    return bytes(whole)


def overlap(whole: bytearray, first: int, second: int) -> None:
    whole[second + 42 : second + 46] = whole[first + 42 : first + 46]
    place = struct.unpack_from("<I", whole, first + 42)[0]
    name = whole[second + 46 : second + 54]
    whole[place + 30 : place + 38] = name
    whole[first + 46 : first + 54] = name


def another_header(whole: bytearray, first: int, second: int) -> None:
    whole[second + 42 : second + 46] = whole[first + 42 : first + 46]


def twice(whole: bytearray, first: int, second: int) -> None:
    place = struct.unpack_from("<I", whole, second + 42)[0]
    whole[second + 53] = whole[place + 37] = ord("0")


def too_long(whole: bytearray, first: int, second: int) -> None:
    whole[second + 20 : second + 28] = struct.pack("<II", 1 << 30, 1 << 30)


def beyond_the_directory(whole: bytearray, first: int, second: int) -> None:
    whole[second + 20 : second + 28] = struct.pack("<II", 60, 60)


def many(whole: bytearray, first: int, second: int) -> None:
    whole[-14:-10] = b"\xff\xff\xff\xff"


ARCHIVES: dict[str, tuple[bytes, str]] = {
    "two records in one place": (edited(overlap), "called|overlap"),
    "the header of another record": (edited(another_header), "something else than the directory"),
    "two records of one name": (edited(twice), "two of its records"),
    "a record longer than the file": (edited(too_long), "cut short"),
    "a record that runs into the directory": (edited(beyond_the_directory), "overlap with its directory"),
    "65535 records": (edited(many), "too many|not at its end|cut short"),
    "bytes behind the end": (archive(b"\x80\x02N.") + b"x", "cut short"),
    "no data.pkl": (archive(b"\x80\x02N.").replace(b"a/data.pkl", b"a/data.pkm"), "without the record data.pkl"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archive_is_refused(kind: str, tmp_path: Path) -> None:
    whole, why = ARCHIVES[kind]
    with pytest.raises(ValueError, match=why):
        read_bytes(whole, tmp_path)


def test_program_of_torch_jit_names_the_remedy(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"torch.jit\b.*state_dict\(\)"):
        read_torch_file(tmp_path / "a.pt")


def test_no_file_of_the_package_reads_a_pickle_another_way() -> None:
    root = Path(__file__).resolve().parents[2]
    sources = [*root.glob("vitcomposer/**/*.py"), *root.glob("recipes/*.py")]
    calls = re.compile(r"torch\.load\(|pickle\.loads?\(|Unpickler\(|allow_pickle=True|joblib|\bshelve\b")
    found = [path.name for path in sources if any(calls.search(line) for line in code_of(path))]
    assert found == [], found


def code_of(path: Path) -> list[str]:
    """Lines without texts and comments."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return "".join(" " if t.type in (tokenize.STRING, tokenize.COMMENT) else t.string for t in tokens).split("\n")
