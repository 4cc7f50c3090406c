"""What is private to Composer and Streaming is reached in foundations.py alone, and docs/foundations.md lists it."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests import test_foundations
from tests.test_structure import ROOT, SOURCES, module_name
from vitcomposer import foundations

PAGE = (ROOT / "docs/foundations.md").read_text()
THEIRS = ("composer", "streaming")
# Where they say what is for others.
PACKAGES = {"composer", "composer.algorithms", "composer.callbacks", "composer.core", "composer.loggers"}
PACKAGES |= {"composer.models", "composer.utils", "streaming"}


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading of the page."""
    lines = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return [[cell.strip(" |") for cell in row] for row in cells[2:]]


def linked(cell: str) -> list[Path]:
    return [ROOT / "docs" / target for target in re.findall(r"\]\(([^)]+)\)", cell)]


def test_page_lists_every_function_with_its_users_and_its_test() -> None:
    functions = {name for name, value in vars(foundations).items() if inspect.isfunction(value)}
    functions = {name for name in functions if vars(foundations)[name].__module__ == foundations.__name__}
    table = rows("Private things")
    assert [row[0].strip("`") for row in table] == list(dict.fromkeys(row[0].strip("`") for row in table))
    assert {row[0].strip("`") for row in table} == functions and len(functions) > 10
    using: dict[str, set[Path]] = {name: set() for name in functions}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == foundations.__name__:
                for alias in node.names:
                    using[alias.name].add(path)
    for function, _, _, users, test in table:
        assert {path.resolve() for path in linked(users)} == using[function.strip("`")], function
        assert inspect.isfunction(vars(test_foundations)[test.strip("`")])


def test_page_lists_every_name_from_inside() -> None:
    outside = {name for path in SOURCES if path.stem != "foundations" for name in their_names(path)}
    inside = {f"{module}.{name}" for module, name in outside if module not in PACKAGES}
    assert [row[0].strip("`") for row in rows("Names that they do not export")] == sorted(inside)
    assert set(FROM_INSIDE) == inside


def test_page_names_a_test_for_all_that_we_count_on() -> None:
    table = rows("What we count on, and what we go around")
    assert len(table) > 15
    for row in table:
        (path,) = linked(row[2])
        assert path.is_file(), row
        for name in re.findall(r"`(test_\w+)`", row[2]):
            assert f"def {name}(" in path.read_text(), row


# Nobody else reaches for what is private


def their_names(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of all that a file imports from them, for its types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in THEIRS:
            yield from ((node.module, alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            assert not [alias for alias in node.names if alias.name.split(".")[0] in THEIRS], f"{path}: from ... import"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


OTHERS = [path for path in SOURCES if path.stem != "foundations"]


def test_no_other_module_imports_a_private_name_of_theirs() -> None:
    for path in OTHERS:
        for module, name in their_names(path):
            assert not [part for part in (*module.split("."), name) if is_private(part)], path


def private_attributes() -> set[str]:
    """Every private attribute that Composer's or Streaming's sources set or define."""
    found: set[str] = set()
    for name in THEIRS:
        file = importlib.import_module(name).__file__
        assert file is not None
        for path in Path(file).parent.rglob("*.py"):
            found |= set(
                re.findall(r"(?:\bself\.|\bdef |^)(_[a-z]\w*)\b(?=\(|\s*(?::[^=\n]*)?=[^=])", path.read_text(), re.M)
            )
    return {name for name in found if is_private(name)}


# Of Python, torch and ourselves, whose names theirs are too.
NOT_THEIRS = re.compile(r"torch\.|os\._exit|(loader|iterator)\._(iterator|shutdown_workers)|p\._|_Program\._|module\._")


def test_no_other_module_touches_a_private_attribute_of_theirs() -> None:
    theirs = private_attributes()
    assert {"_shard_states", "_save_checkpoint", "_close", "_download_file"} <= theirs
    for path in OTHERS:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in theirs
                and ast.unparse(node.value) not in ("self", "cls")
            ):
                assert NOT_THEIRS.search(ast.unparse(node)), f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_no_subclass_has_a_private_name_of_its_base() -> None:
    """Neither to replace a method, nor by chance."""
    checked = set()
    for path in OTHERS:
        if not any(True for _ in their_names(path)):
            continue
        module = importlib.import_module(module_name(path))
        for cls in [value for value in vars(module).values() if inspect.isclass(value)]:
            bases = [base for base in cls.__mro__[1:] if base.__module__.split(".")[0] in THEIRS]
            if cls.__module__ != module.__name__ or not bases:
                continue
            checked.add(cls.__name__)
            of_bases = set().union(*(names_of(base) for base in bases))
            assert not {name for name in names_of(cls) & of_bases if is_private(name)}, cls
    assert {"ImageStream", "ShardStream", "Checkpoints", "EvaluationEMA", "ResumableSAM"} <= checked


def names_of(cls: type) -> set[str]:
    source = inspect.getsource(cls)
    return set(re.findall(r"\bself\.(\w+)", source)) | set(re.findall(r"\bdef (\w+)", source))


def test_nothing_of_what_composer_patches_is_imported() -> None:
    """Its FSDP1, its patches by torch's version, and SpeedMonitor, which has not kept up with cards."""
    patched = re.compile(
        r"composer\.(distributed|trainer\.mosaic_fsdp|trainer\._|utils\.fsdp)|torch\.distributed\.fsdp\._"
    )
    names = re.compile(r"^(FSDPConfig|SpeedMonitor|FullyShardedDataParallel|FlatParamHandle|StateDictType)$")
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not patched.match(f"{node.module}."), path
                assert not [alias.name for alias in node.names if names.match(alias.name)], path


# What they do not export


FROM_INSIDE: dict[str, str | None] = {
    "composer.algorithms.sam.SAMOptimizer": None,
    "composer.cli.launcher.main": "()",
    "streaming.base.constant.BARRIER_FILELOCK": None,
    "streaming.base.constant.CACHE_FILELOCK": None,
    "streaming.base.constant.LOCALS": None,
    "streaming.base.constant.SHM_TO_CLEAN": None,
    "streaming.base.constant.TICK": None,
    "streaming.base.distributed.barrier": "() -> None",
    "streaming.base.distributed.get_local_rank": "() -> int",
    "streaming.base.distributed.maybe_init_dist": "() -> bool",
    "streaming.base.format.FileInfo": None,
    "streaming.base.format.Reader": None,
    "streaming.base.format.mds.reader.MDSReader": None,
    "streaming.base.hashing.get_hashes": "() -> set[str]",
    "streaming.base.hashing.is_hash": "(algo: str) -> bool",
    "streaming.base.partition.get_partitions": None,
    "streaming.base.shuffle.get_shuffle": None,
    "streaming.base.storage.CloudDownloader": None,
    "streaming.base.util.wait_for_file_to_exist": (
        "(filename: str, poll_interval: float, timeout: float, err_msg: str) -> None"
    ),
    "streaming.base.world.World": None,
}


def test_names_from_inside() -> None:
    found = {}
    for name, signature in FROM_INSIDE.items():
        module, _, attribute = name.rpartition(".")
        found[name] = getattr(importlib.import_module(module), attribute)
        assert signature is None or str(inspect.signature(found[name])) == signature, name
    base = "streaming.base."
    assert found[f"{base}constant.LOCALS"] in found[f"{base}constant.SHM_TO_CLEAN"]
    assert 0 < found[f"{base}constant.TICK"] < 0.1
    partitions = found[f"{base}partition.get_partitions"]("relaxed", 8, 1, 1, 2, 1, 2, 0, None)
    assert partitions.tolist() == [[[[[0, 2], [4, 6]]], [[[1, 3], [5, 7]]]]]
    order = found[f"{base}shuffle.get_shuffle"]("py1e", np.array([3, 5]), 1, 0, 0, 4)
    assert sorted(order.tolist()) == list(range(8))
    info = found[f"{base}format.FileInfo"]("shard.mds", 3, {"xxh64": "0"})
    assert (info.basename, info.bytes, info.hashes) == ("shard.mds", 3, {"xxh64": "0"})
    assert issubclass(found[f"{base}format.mds.reader.MDSReader"], found[f"{base}format.Reader"])
    downloader = found[f"{base}storage.CloudDownloader"].get(None)
    assert callable(downloader.download) and callable(downloader.clean_up)
    world = found[f"{base}world.World"].detect()
    assert {"num_nodes", "ranks_per_node", "workers_per_rank", "is_local_leader"} <= set(dir(world))
    sam = found["composer.algorithms.sam.SAMOptimizer"](torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1))
    assert sam.global_step == 0 and isinstance(sam.base_optimizer, torch.optim.SGD)
    assert all(callable(getattr(sam, step)) for step in ("first_step", "second_step", "sub_e_w"))
