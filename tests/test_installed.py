"""Without Composer or Streaming every command says how they are installed, and nothing else."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from vitcomposer.errors import ConfigError
from vitcomposer.installed import SECOND_STEP, check_installed


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    real = importlib.util.find_spec
    monkeypatch.setattr("vitcomposer.installed.find_spec", lambda name: None if name == "streaming" else real(name))
    with pytest.raises(ConfigError, match=r"^mosaicml-streaming not installed: pip install --no-deps mosaicml==0"):
        check_installed()


HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("composer", "streaming"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
real, importlib = __import__("importlib.util").util.find_spec, __import__("importlib.util")
importlib.util.find_spec = lambda name: None if name in ("composer", "streaming") else real(name)
"""


@pytest.mark.parametrize("command", ["vitcomposer.cli", "vitcomposer.train"])
def test_a_command_without_composer_says_how_to_install_it(command: str, tmp_path: Path) -> None:
    words = ["inspect", "datasets/digits"] if command == "vitcomposer.cli" else ["deit_s"]
    program = f"{HIDDEN}\nfrom {command} import main\nsys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: mosaicml and mosaicml-streaming not installed: ")
    assert SECOND_STEP in done.stderr and "Traceback" not in done.stderr
