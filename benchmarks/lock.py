"""Write a lock file: every package of the tests with its version, the hashes of its wheels, and what is to be fetched.

    python -m benchmarks.lock constraints.txt torch==2.14.1 torchvision==0.29.1

Called by ``make constraints``, in an environment that has uv and packaging. The first line states how many packages
there are and how large their wheels on Linux x86-64 with Python 3.11: ``make setup`` prints it before it fetches them.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

PYTHON = (3, 11)
PLATFORM = "x86_64-manylinux_2_28"
_NAMES = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)] + ["manylinux2014_x86_64", "linux_x86_64"]
_TAGS = {*cpython_tags(PYTHON, platforms=_NAMES), *compatible_tags(PYTHON, platforms=_NAMES)}
_HEAD = "# {name}: {packages} packages, {size:.1f} GB to fetch where uv or pip has none of them yet ({pins})\n"


def main() -> None:
    out, pins, options = Path(sys.argv[1]), sys.argv[2:4], sys.argv[4:]
    with tempfile.TemporaryDirectory() as folder:
        bounds, pages = Path(folder, "bounds.txt"), Path(folder, "pylock.toml")
        bounds.write_text("\n".join(pins))
        _compile(bounds, out, "--universal", "--fork-strategy", "fewest", "--generate-hashes", *options)
        versions = _versions(out, Path(folder))
        _compile(bounds, pages, "--python-platform", PLATFORM, "--format", "pylock.toml", "--constraint", str(versions))
        packages, size = _to_fetch(tomllib.loads(pages.read_text())["packages"])
    out.write_text(
        _HEAD.format(name=out.name, packages=packages, size=size / 1e9, pins=", ".join(pins)) + out.read_text()
    )
    print(out.read_text().partition("\n")[0])


def _compile(bounds: Path, out: Path, *options: str) -> None:
    command = ["uv", "--quiet", "pip", "compile", "pyproject.toml", "--extra", "test", "--group", "composer"]
    command += ["--python-version", ".".join(map(str, PYTHON)), "--constraint", str(bounds)]
    command += ["--no-annotate", "--no-header", "--no-emit-index-url", "--output-file", str(out), *options]
    subprocess.run(command, check=True)


def _versions(lock: Path, folder: Path) -> Path:
    """The lock's lines without hashes, so that the second resolution is the first one."""
    lines = [line.rstrip(" \\") for line in lock.read_text().splitlines() if line[:1].isalnum()]
    path = folder / "versions.txt"
    path.write_text("\n".join(lines))
    return path


def _to_fetch(packages: list[dict[str, Any]]) -> tuple[int, int]:
    """How many packages this platform takes, and the bytes of their smallest fitting wheels."""
    sizes = [min(wheel["size"] for wheel in package["wheels"] if _fits(wheel["url"])) for package in packages]
    return len(sizes), sum(sizes)


def _fits(url: str) -> bool:
    return bool(parse_wheel_filename(unquote(url.rpartition("/")[2]))[3] & _TAGS)


if __name__ == "__main__":
    main()
