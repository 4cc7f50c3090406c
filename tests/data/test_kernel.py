"""The cache of compiled kernels: a change in any kernel file is noticed, which numba alone does not do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "vitcomposer"
CALL = "from vitcomposer.data.outer_kernels import outer; print(outer(1))"


def test_a_changed_kernel_is_compiled_again_though_its_caller_did_not_change(tmp_path: Path) -> None:
    data = tmp_path / "vitcomposer" / "data"
    data.mkdir(parents=True)
    for name in ("__init__.py", "data/__init__.py", "data/kernel.py"):
        shutil.copy(PACKAGE / name, tmp_path / "vitcomposer" / name)
    inner = data / "inner_kernels.py"
    head = "from vitcomposer.data.kernel import kernel\n\n\n@kernel\n"
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
