"""The cache of compiled kernels: a change in any kernel file is noticed, which numba alone does not do."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vitcomposer.data.jpeg import kernel

PACKAGE = Path(__file__).resolve().parents[3] / "vitcomposer"
CALL = "from vitcomposer.data.outer_kernels import outer; print(outer(1))"


def test_a_changed_kernel_is_compiled_again_though_its_caller_did_not_change(tmp_path: Path) -> None:
    data = tmp_path / "vitcomposer" / "data"
    (data / "jpeg").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "data/__init__.py", "data/jpeg/__init__.py", "data/jpeg/kernel.py"):
        shutil.copy(PACKAGE / name, tmp_path / "vitcomposer" / name)
    inner = data / "inner_kernels.py"
    head = "from vitcomposer.data.jpeg.kernel import kernel\n\n\n@kernel\n"
    inner.write_text(head + "def inner(x):\n    return x + 1\n")
    imports = head.replace("\n\n\n@", "\nfrom vitcomposer.data.inner_kernels import inner\n\n\n@")
    (data / "outer_kernels.py").write_text(imports + "def outer(x):\n    return inner(x) * 10\n")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)

    def call() -> str:
        done = subprocess.run([sys.executable, "-c", CALL], cwd=tmp_path, env=environment, capture_output=True)
        return (done.stdout + done.stderr).decode().strip()

    assert call() == "20"
    compiled = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nbc")}
    assert compiled
    assert call() == "20"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nbc")} == compiled, "loaded"
    inner.write_text(head + "def inner(x):\n    return x + 4\n")
    assert call() == "50"


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
    kernel._folder.cache_clear()
    yield [tmp_path / name / f"vitcomposer-kernels-{os.getuid()}" for name in ("home", "temporary")]
    kernel._folder.cache_clear()


def test_the_cache_is_in_a_folder_of_the_user_alone(caches: list[Path]) -> None:
    folder = Path(kernel._folder())
    assert folder.parent == caches[0]
    assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder)] == [0o700, 0o700]


@pytest.mark.parametrize("plant", [linked, open_to_all, a_file])
def test_a_folder_that_others_can_reach_is_not_read(plant: Callable[[Path], None], caches: list[Path]) -> None:
    """What numba finds in its cache is unpickled, so a planted file would run as this user."""
    plant(caches[0])
    assert Path(kernel._folder()).parent == caches[1]
    kernel._folder.cache_clear()
    shutil.rmtree(caches[1])
    plant(caches[1])
    assert kernel._folder() == "", "no cache where no place is safe"
    assert kernel.kernel(lambda x: x + 1)(1) == 2


def test_a_folder_of_another_user_is_not_read(caches: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    Path(kernel._folder())
    kernel._folder.cache_clear()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    for planted in caches:
        planted.with_name(f"vitcomposer-kernels-{user + 1}").mkdir(mode=0o700)  # made by this user
    assert kernel._folder() == ""
