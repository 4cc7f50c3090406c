"""The cache of compiled kernels: by content and not by path, for this user alone, whole files whoever writes them."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vitcomposer.data.jpeg import kernel

PACKAGE = Path(__file__).resolve().parents[3] / "vitcomposer"
CALL = "from vitcomposer.data.outer_kernels import outer; print(outer(1))"
OUTER = """from vitcomposer.data.inner_kernels import inner
from vitcomposer.data.jpeg.kernel import kernel


@kernel
def outer(x):
    return inner(x, 1) * 10 + 0 * inner(x, x)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Callable[..., Path]:
    """Makes a small package with a kernel, in a folder of a given name."""

    def make(name: str) -> Path:
        data = tmp_path / name / "vitcomposer" / "data"
        (data / "jpeg").mkdir(parents=True)
        for file in ("__init__.py", "data/__init__.py", "data/jpeg/__init__.py", "data/jpeg/kernel.py", "errors.py"):
            shutil.copy(PACKAGE / file, tmp_path / name / "vitcomposer" / file)
        write(data, 1)
        (data / "outer_kernels.py").write_text(OUTER)
        return tmp_path / name

    return make


def write(data: Path, added: int) -> None:
    source = f"from vitcomposer.data.jpeg.kernel import part\n\n\n@part\ndef inner(x, y):\n    return x + y * {added}\n"
    (data / "inner_kernels.py").write_text(source)


def start(clone: Path, cache: Path, code: str = CALL, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(clone)}
    environment.pop("NUMBA_CACHE_DIR", None)
    environment |= variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=clone, env=environment, **pipes)


def call(clone: Path, cache: Path, **variables: str) -> tuple[str, bool]:
    """What the kernel gives, and whether it was compiled for that, as a line on stderr says."""
    out, said = start(clone, cache, **variables).communicate(timeout=100)
    assert said == "" or re.fullmatch(r"compiling image kernels, about 10 s of a core, once\n", said), said
    return out.strip(), said != ""


def test_a_clone_elsewhere_finds_what_another_compiled(clone: Callable[..., Path], tmp_path: Path) -> None:
    assert call(clone("one"), tmp_path / "cache") == ("20", True)
    compiled = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nbc")}
    assert [path.name.split(".")[:2] for path in compiled] == [["outer_kernels", "outer"]], "a file for a kernel"
    shutil.move(tmp_path / "one", tmp_path / "moved")
    for again in (tmp_path / "moved", clone("two")):
        assert call(again, tmp_path / "cache") == ("20", False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nbc")} == compiled


def test_a_changed_part_is_compiled_again_though_its_caller_did_not_change(
    clone: Callable[..., Path], tmp_path: Path
) -> None:
    one = clone("one")
    assert call(one, tmp_path / "cache") == ("20", True)
    write(one / "vitcomposer/data", 4)
    assert call(one, tmp_path / "cache") == ("50", True)


def test_a_damaged_file_is_compiled_again(clone: Callable[..., Path], tmp_path: Path) -> None:
    one = clone("one")
    assert call(one, tmp_path / "cache") == ("20", True)
    (file,) = (tmp_path / "cache").rglob("*.nbc")
    for content in (b"", file.read_bytes()[:-100], b"no pickle"):
        file.write_bytes(content)
        assert call(one, tmp_path / "cache") == ("20", True)
    assert call(one, tmp_path / "cache") == ("20", False)


def test_many_processes_at_once_leave_one_whole_file(clone: Callable[..., Path], tmp_path: Path) -> None:
    clones = [clone(name) for name in ("one", "two", "three", "four")]
    running = [start(each, tmp_path / "cache") for each in clones]
    assert [process.communicate(timeout=100)[0].strip() for process in running] == ["20"] * 4
    assert len(list((tmp_path / "cache").rglob("*.nbc*"))) == 1, "and nothing half written"
    assert call(clones[0], tmp_path / "cache") == ("20", False)


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "NUMBA_CACHE_DIR"])
def test_what_was_not_used_for_90_days_goes_when_something_is_compiled(
    clone: Callable[..., Path], tmp_path: Path, variable: str
) -> None:
    one, cache = clone("one"), tmp_path / "cache"
    environment = {variable: str(cache)}
    assert call(one, cache, **environment)[1]
    (used,) = cache.rglob("*.nbc")
    folder, now, day = used.parent, time.time(), 24 * 3600
    digest = folder.name[-16:]
    others = {days: folder.with_name(folder.name.replace(digest, f"{days:016x}")) for days in (89, 91)}
    for days, other in others.items():
        other.mkdir()
        (other / "old.nbc").touch()
        os.utime(other, (now - days * day,) * 2)
    os.utime(folder, (now - 100 * day,) * 2)
    (cache / "a" / "stranger").mkdir(parents=True)
    os.utime(cache / "a", (now - 100 * day,) * 2)
    assert call(one, cache, **environment) == ("20", False) and all(other.exists() for other in others.values())
    assert folder.stat().st_mtime > now - day, "a start that only reads is a use"
    write(one / "vitcomposer/data", 4)
    assert call(one, cache, **environment) == ("50", True)
    assert used.exists() and others[89].exists() and not others[91].exists() and (cache / "a" / "stranger").exists()


def test_python_calls_no_part() -> None:
    """A part has no wrapper for Python: the call would end the process."""
    parts: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*_kernels.py"):
        parts[path.stem] = set(re.findall(r"^@part\ndef (\w+)\(", path.read_text(), re.M))
    assert sum(map(len, parts.values())) > 50
    others = [
        path
        for folder in (PACKAGE, PACKAGE.parent / "tests", PACKAGE.parent / "benchmarks")
        for path in folder.rglob("*.py")
    ]
    for path in others:
        if path.stem.endswith("_kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = (node.module or "").rpartition(".")[2] if isinstance(node, ast.ImportFrom) else ""
            if isinstance(node, ast.ImportFrom):
                assert not parts.get(module, set()) & {alias.name for alias in node.names}, path
                for alias in node.names:
                    called = re.findall(rf"\b{alias.asname or alias.name}\.(\w+)", path.read_text())
                    assert not parts.get(alias.name, set()) & set(called), path


def linked(folder: Path) -> None:
    folder.with_name("elsewhere").mkdir(mode=0o700, exist_ok=True)
    folder.symlink_to(folder.with_name("elsewhere"))


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def a_file(folder: Path) -> None:
    folder.touch(mode=0o700)


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The two places where the folder of the cache may be, none of them there yet."""
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    kernel._place.cache_clear()
    yield [tmp_path / name / f"vitcomposer-kernels-{os.getuid()}" for name in ("home", "temporary")]
    kernel._place.cache_clear()


def test_the_cache_is_in_a_folder_of_the_user_alone(caches: list[Path]) -> None:
    folder = Path(kernel._place().folder)
    assert folder.parent == caches[0]
    assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder)] == [0o700, 0o700]


@pytest.mark.parametrize("plant", [linked, open_to_all, a_file])
def test_a_folder_that_others_can_reach_is_not_read(plant: Callable[[Path], None], caches: list[Path]) -> None:
    """What numba finds in its cache is unpickled, so a planted file would run as this user."""
    plant(caches[0])
    place = kernel._place()
    assert Path(place.folder).parent == caches[1]
    assert place.why == f"kept in {caches[1]}, since {caches[0]} is not a folder of this user alone"
    kernel._place.cache_clear()
    shutil.rmtree(caches[1])
    plant(caches[1])
    assert kernel._place().folder == "", "no cache where no place is safe"
    assert kernel.kernel(lambda x: x + 1)(1) == 2


def test_a_folder_of_another_user_is_not_read(caches: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    Path(kernel._place().folder)
    kernel._place.cache_clear()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    for planted in caches:
        planted.with_name(f"vitcomposer-kernels-{user + 1}").mkdir(mode=0o700)  # made by this user
    assert kernel._place().folder == ""
