"""The reader of torch files: what torch reads, bit for bit, and nothing of what a file should not be able to do."""

import argparse
import builtins
import datetime
import io
import os
import pickle
import pickletools
import random
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import Tell
from vitcomposer.models.weights.torch_file import FileSlice, read_torch_file, read_torch_slice

MARGIN = 1 << 25  # bytes that reading the smallest file may take


def everything() -> dict[str, Any]:
    """What checkpoints of ours and of others hold."""
    base = torch.arange(24.0)
    numbers = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return {
        "model": network.state_dict(),  # with versions of its layers
        "numbers": [torch.ones(3, dtype=dtype) for dtype in numbers],
        "new numbers": [torch.ones(3).to(dtype) for dtype in (torch.float8_e4m3fn, torch.uint16)],
        "views": [base, base.view(4, 6).t(), base[5:9], base[::2], torch.zeros(0, 3), torch.tensor(2.5)],
        "parameter": nn.Parameter(torch.ones(2)),
        "numpy": [np.arange(6, dtype="u4").reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.float32(0.5)],
        "random": np.random.get_state(),
        "args": argparse.Namespace(lr=1e-3, names=["a"], device=torch.device("cuda", 1), arch="vit_small"),
        "clock": datetime.timedelta(days=1, seconds=2),
        "torch": torch.__version__,
        "rest": [None, True, -1, 70000, 1 << 70, 0.1, "é", "\u20ac\U0001f600", b"\xff\0", (), (1, (2,)), {3: "x"}],
        "more": [OrderedDict(a=1), torch.Size((2, 3)), torch.float16, {"set", "of"}],
    }


def same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        ends = getattr(first, "_metadata", None) == getattr(second, "_metadata", None)
        return ends and list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Tensor):
        layout = first.dtype == second.dtype and first.shape == second.shape and first.stride() == second.stride()
        return layout and bytes_of(first) == bytes_of(second) and first.requires_grad == second.requires_grad
    if isinstance(first, np.ndarray | np.generic):
        return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
    return bool(first == second)


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


SAVED: dict[str, dict[str, Any]] = {
    "zip": {},
    "zip with a pickle of protocol 4": {"pickle_protocol": 4},
    "before torch 1.6": {"_use_new_zipfile_serialization": False},
}


@pytest.mark.parametrize("kind", SAVED)
def test_file_is_read_as_torch_reads_it(kind: str, tmp_path: Path) -> None:
    content = everything()
    if kind == "before torch 1.6":
        del content["new numbers"]  # which it cannot hold
    torch.save(content, tmp_path / "a.pt", **SAVED[kind])
    found = read_torch_file(tmp_path / "a.pt")
    assert same(found, torch.load(tmp_path / "a.pt", weights_only=False)) and same(found, content)
    base, transposed = found["views"][:2]
    assert base.untyped_storage().data_ptr() == transposed.untyped_storage().data_ptr(), "storages stay shared"
    shapes = read_torch_file(tmp_path / "a.pt", tensors=False)
    assert shapes["views"][1].is_meta and shapes["views"][1].shape == (6, 4) and shapes["clock"] == content["clock"]


def test_memory_is_about_the_files_size(tmp_path: Path) -> None:
    torch.save({f"{i}": torch.randn(1 << 18) for i in range(20)}, tmp_path / "a.pt")  # 20 MB
    tracemalloc.start()
    read_torch_file(tmp_path / "a.pt")  # its tensors are not counted: they are as many bytes as the storages
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


# Damage


def small_file(**options: Any) -> tuple[bytes, dict[str, Any]]:
    content = {"state": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}, "lr": 0.5, "rng": np.arange(3)}
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue(), content


PATTERNS: dict[str, Callable[[int], int]] = {"flipped": lambda b: b ^ 0xFF, "zero": lambda _: 0, "ones": lambda _: 0xFF}


def outcomes(whole: bytes, path: Path) -> list[tuple[int, str, Any]]:
    """What reading gives for each byte of a file and each pattern, where the byte changes: a value or an error."""
    path.write_bytes(whole)
    found = []
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(whole):
            for kind, change in PATTERNS.items():
                if change(byte) == byte:
                    continue
                os.pwrite(file.fileno(), bytes([change(byte)]), place)
                try:
                    found.append((place, kind, read_torch_slice(FileSlice(file))))
                except ValueError as error:  # and no other
                    found.append((place, kind, error))
            os.pwrite(file.fileno(), bytes([byte]), place)
    return found


def test_every_damaged_byte_is_refused_or_changes_nothing(tmp_path: Path, tell: Tell) -> None:
    began = time.perf_counter()
    whole, content = small_file()
    found = outcomes(whole, tmp_path / "a.pt")
    assert len(found) > 2 * len(whole) > 4000
    refused = [place for place, _, value in found if isinstance(value, ValueError)]
    assert all(same(value, content) for *_, value in found if not isinstance(value, ValueError))
    assert len(refused) > len(found) // 2
    seen = f"{len(found):,} tried: {len(refused):,} refused, {len(found) - len(refused):,} with the weights as saved"
    tell("each byte of a torch file in three patterns", seen, time.perf_counter() - began)


def test_every_damaged_byte_of_an_older_file_is_an_error_or_a_value(tmp_path: Path) -> None:
    """Such files have no checksums: numbers may be others, but nothing else happens."""
    whole, content = small_file(_use_new_zipfile_serialization=False)
    found = outcomes(whole, tmp_path / "a.pt")
    shapes = {name: value.shape for name, value in content["state"].items()}
    for *_, value in found:
        if not isinstance(value, ValueError) and "state" in value and value["state"].keys() == shapes.keys():
            assert all(isinstance(tensor, Tensor) for tensor in value["state"].values())


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    for options in SAVED.values():
        whole, _ = small_file(**options)
        for length in range(0, len(whole), 7):
            (tmp_path / "a.pt").write_bytes(whole[:length])
            with pytest.raises(ValueError):
                read_torch_file(tmp_path / "a.pt")


# Programs


def archive(program: bytes, records: dict[str, bytes] | None = None) -> bytes:
    """A torch file of a pickle and storages, with the checksums that belong to them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in {"a/data.pkl": program, **{f"a/data/{k}": v for k, v in (records or {}).items()}}.items():
            file.writestr(name, content)
    return buffer.getvalue()


def read_bytes(whole: bytes, tmp_path: Path) -> Any:
    (tmp_path / "a.pt").write_bytes(whole)
    return read_torch_file(tmp_path / "a.pt")


def test_generated_programs_never_crash_hang_or_fill_the_memory(tmp_path: Path, tell: Tell) -> None:
    """1,000 pickles made from a real one: opcodes left out, doubled, exchanged, and put in with any argument."""
    content = everything()
    del content["model"], content["random"]  # more of what the rest has
    torch.save(content, tmp_path / "real.pt")
    with zipfile.ZipFile(tmp_path / "real.pt") as file:
        real = file.read("real/data.pkl")
        records = {Path(n).name: file.read(n) for n in file.namelist() if "/data/" in n}
    places = [place for _, _, place in pickletools.genops(real)] + [len(real)]
    opcodes = [real[a:b] for a, b in zip(places, places[1:], strict=False)]
    rng, read, slowest = random.Random(5), 0, 0.0
    for number in range(1000):
        program = list(opcodes)
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            at, other = rng.randrange(1, len(program) - 1), rng.choice(opcodes[1:-1])
            anything = bytes([rng.randrange(256)]) + rng.randbytes(rng.choice((0, 1, 4, 8)))
            program[at : at + rng.choice((0, 1, 1, 3))] = rng.choice(([], [other], [program[at]] * 2, [anything]))
        whole = archive(b"".join(program), records)
        if number % 5 == 0:  # looking makes it slow
            tracemalloc.start()
        began = time.perf_counter()
        try:
            read_bytes(whole, tmp_path)
            read += 1
        except ValueError:
            pass
        slowest = max(slowest, time.perf_counter() - began)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(whole) + MARGIN
        tracemalloc.stop()
    assert 50 < read < 950 and slowest < 5, "some are sound, most are not, none takes long"
    tell(
        "1,000 generated pickles", f"{read} read as data, {1000 - read} refused, none ran or filled the memory", slowest
    )


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def pickled(value: Any) -> bytes:
    return pickle.dumps(value, 2)


REBUILD = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu"
)


def tensor_program(count: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], times: int = 1) -> bytes:
    """A list of tensors over the storage "0", which has ``count`` numbers as it says."""

    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    one = REBUILD + number(count) + b"tQ" + number(offset) + numbers(size) + numbers(stride) + b"\x89NtR"
    return b"\x80\x02](" + one * times + b"e."


def array_state(shape: Any, dtype: Any, content: bytes) -> Any:
    empty = np.empty(0).__reduce__()[0]
    return Call(empty, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, content))


def laughs() -> bytes:
    """Sixty lists, each of which holds the one before twice: 2**60 places."""
    return b"\x80\x02]q\0" + b"0]h\0ah\0aq\0" * 60 + b"."


def side_by_side() -> bytes:
    """A list of 200 lists, of which each holds the one before."""
    return b"\x80\x02]]q\0a" + b"".join(b"]q%ch%caa" % (i, i - 1) for i in range(1, 200)) + b"."


def of_one_hash() -> bytes:
    """A dict whose keys are multiples of 2**61 - 1, which is the hash 0."""
    keys = (((1 << 61) - 1) * n for n in range(1, 20000))
    return b"\x80\x02}(" + b"".join(b"\x8a\x0a" + key.to_bytes(10, "little") + b"N" for key in keys) + b"u."


PROGRAMS: dict[str, tuple[bytes, str]] = {
    "os.system": (pickled(Call(os.system, "echo ran")), r"(posix|nt)\.system"),
    "eval": (pickled(Call(builtins.eval, "1")), r"builtin\w*\.eval"),
    "getattr": (pickled(Call(getattr, "text", "upper")), r"builtin\w*\.getattr"),
    "a name with an escape": (b"\x80\x02c\x1b[31mos\nsystem\n.", r"'\\x1b\[31mos.system'"),
    "numpy.ndarray over bytes": (
        pickled(Call(np.ndarray, (1,), np.dtype("O"), b"\x41" * 8)),
        r"no type of numbers|calls what",
    ),
    "numpy.ndarray over numbers": (pickled(Call(np.ndarray, (1,), np.dtype("u8"), b"\x41" * 8)), "calls numpy.ndarray"),
    "an array of objects": (pickled(array_state((1,), np.dtype("O"), b"\x41" * 8)), r"no type of numbers"),
    "an array that becomes one of objects": (
        pickled(
            array_state((1,), Call(np.dtype, "u8", False, True, state=(3, "|", None, None, None, -1, -1, 63)), b"A" * 8)
        ),
        "another type than numbers",
    ),
    "an array of records": (
        pickled(array_state((1,), Call(np.dtype, "V8", False, True), b"\x41" * 8)),
        r"no type of numbers",
    ),
    "an array larger than its bytes": (pickled(array_state((1 << 40,), np.dtype("u8"), b"\x41" * 8)), "not those of"),
    "an array of negative size": (pickled(array_state((-1, -1), np.dtype("u8"), b"\x41" * 8)), "whole numbers from 0"),
    "a dtype that is called": (b"\x80\x02ctorch\nfloat32\n)R.", "cannot be called"),
    "the result of a call that is called": (
        b"\x80\x02ccollections\nOrderedDict\n)R)R.",
        "cannot be called",
    ),
    "a name as a value": (b"\x80\x02]ccollections\nOrderedDict\na.", "holds collections.OrderedDict itself"),
    "attributes of a dict": (b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsNsb.", "has attributes"),
    "state of a list": (b"\x80\x02]}b.", "a list a state"),
    "a storage that is larger": (tensor_program(4, 0, (4,), (1,)), "another size"),
    "a size beyond the storage": (tensor_program(2, 0, (3,), (1,)), "beyond its 8 bytes"),
    "an offset beyond it": (tensor_program(2, 1, (2,), (1,)), "beyond its 8 bytes"),
    "a stride beyond it": (tensor_program(2, 0, (2,), (2,)), "beyond its 8 bytes"),
    "a negative offset": (tensor_program(2, -1, (2,), (1,)), "whole numbers from 0"),
    "a negative stride": (tensor_program(2, 1, (2,), (-1,)), "whole numbers from 0"),
    "a negative size": (tensor_program(2, 0, (-2,), (1,)), "whole numbers from 0"),
    "sizes whose product is 2**64": (tensor_program(2, 0, (1 << 32, 1 << 32), (0, 0)), "beyond its 8 bytes"),
    "one number a million times": (tensor_program(2, 0, (1 << 20,), (0,)), "beyond its 8 bytes"),
    "too many dimensions": (tensor_program(2, 0, (1,) * 17, (1,) * 17), "16 dimensions"),
    "a storage larger than any memory": (tensor_program(1 << 60, 0, (1,), (1,)), "larger than the file"),
    "two to the sixty places": (laughs(), "if each place had its own"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "in itself"),
    "lists a thousand deep": (b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".", "in more than 64"),
    "lists side by side, each in the next": (side_by_side(), "lie too deep"),
    "keys of one hash": (of_one_hash(), "a key that is a int"),
    "a key that is a tuple": (b"\x80\x02}(K\1K\2t" + b"Ns.", "a key that is a tuple"),
    "a number of a megabyte": (b"\x80\x02\x8b\0\0\x10\0" + bytes(1 << 20) + b".", "opcode"),
    "a text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fabc.", "cut short"),
    "bytes longer than any file": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "more memory"),
    "a million dicts": (b"\x80\x02(" + b"}" * 1_000_000 + b"l.", "more memory"),
    "a place in the memo of 2**31": (b"\x80\x02Nr\xff\xff\xff\x7fj\xff\xff\xff\x7e.", "damaged"),
    "an extension": (b"\x80\x02\x82\1.", "opcode"),
    "an instance": (b"\x80\x02(ios\nsystem\n.", "opcode"),
    "a pickle of protocol 0": (b"(lp0\n.", "opcode|damaged"),
    "nothing on the stack": (b"\x80\x02.", "damaged"),
    "a mark alone": (b"\x80\x02(.", "a mark"),
    "more behind the end": (b"\x80\x02N.N.", "bytes after its end"),
    "a module": (b"\x80\x02(X\x06\0\0\0moduleNNNtQ.", "whole modules"),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_program_is_refused(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program, why = PROGRAMS[kind]
    whole = archive(program, {"0": bytes(8)})
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(ValueError, match=why):
        read_bytes(whole, tmp_path)
    assert time.perf_counter() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 2 * len(whole) + 2 * MARGIN  # what pytest keeps of an error included
    tracemalloc.stop()
    assert "ran" not in capfd.readouterr().out


def test_tensors_that_overlap_have_no_more_than_four_times_the_file(tmp_path: Path) -> None:
    """A network keeps each of them by itself."""
    records = {"0": bytes(1 << 20)}
    assert len(read_bytes(archive(tensor_program(1 << 18, 0, (1 << 18,), (1,), times=3), records), tmp_path)) == 3
    with pytest.raises(ValueError, match="overlap so often"):
        read_bytes(archive(tensor_program(1 << 18, 0, (1 << 18,), (1,), times=5), records), tmp_path)


def test_truth_values_are_zero_or_one(tmp_path: Path) -> None:
    program = tensor_program(8, 0, (8,), (1,)).replace(b"FloatStorage", b"BoolStorage")
    assert read_bytes(archive(program, {"0": b"\0\1" * 4}), tmp_path)[0].tolist() == [False, True] * 4
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        read_bytes(archive(program, {"0": b"\0\2" * 4}), tmp_path)
