"""Says what is installed: versions, the commit of a checkout, and whether Composer and Streaming are there.

Nothing heavy is imported for it.
"""

import importlib.metadata
import platform
import subprocess
from importlib.util import find_spec
from pathlib import Path

from vitcomposer import __version__
from vitcomposer.errors import ConfigError

# Composer and Streaming are no dependencies of the wheel: pyproject.toml says why.
SECOND_STEP = "pip install --no-deps mosaicml==0.32.1 mosaicml-streaming==0.13.0"
_PACKAGES = {"composer": "mosaicml", "streaming": "mosaicml-streaming"}


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether files differ from it; nulls for an installed package."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        # A package installed somewhere inside another repository must not report that repository's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None, None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def version_of(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_line() -> str:
    """What ``vitcomposer --version`` prints."""
    commit, changed = git_state()
    source = "" if commit is None else f" ({commit[:7]}{', changed' if changed else ''})"
    others = [f"{name} {version_of(name) or 'missing'}" for name in ("torch", "mosaicml")]
    return ", ".join([f"vitcomposer {__version__}{source}", *others, f"Python {platform.python_version()}"])


def check_installed() -> None:
    """Look for Composer and Streaming, in less than a millisecond.

    Raises:
        ConfigError: naming what is missing and the command that installs it.
    """
    missing = [package for module, package in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} not installed: {SECOND_STEP} "
            "(without --no-deps their bounds would bring torch 2.7.0, which has no kernels for Blackwell GPUs)"
        )
