"""The Dockerfile, as far as it can be looked at without building it: its Python, its user, its files, its commands."""

import fnmatch
import re
import subprocess

import pytest

from tests.test_structure import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
LEFT_OUT = (ROOT / ".dockerignore").read_text().split()


def test_the_image_has_a_python_that_make_setup_takes_and_no_root() -> None:
    found = re.findall(r"^FROM python:3\.(\d+)-slim$", DOCKERFILE, re.M)
    bounds = re.search(r"\(3, (\d+)\) <= sys.version_info < \(3, (\d+)\)", (ROOT / "Makefile").read_text())
    assert bounds is not None and len(found) == 1 and int(bounds[1]) <= int(found[0]) < int(bounds[2])
    steps = [line.split()[0] for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    assert steps.index("USER") < steps.index("COPY") < steps.index("CMD") and steps.count("USER") == 1
    assert "USER $UID" in DOCKERFILE and "ARG UID=1000" in DOCKERFILE
    assert "RUN make -C /vitcomposer setup " in DOCKERFILE and "ENV PATH=/vitcomposer/.venv/bin:$PATH" in DOCKERFILE


def test_the_image_has_every_file_of_the_checkout_and_nothing_that_git_ignores() -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout of git")
    tracked = {part for path in listed.stdout.splitlines() for part in (path, path.split("/")[0])}
    assert [path for path in sorted(tracked) if any(fnmatch.fnmatchcase(path, rule) for rule in LEFT_OUT)] == []
    ignored = {rule.strip("/") for rule in (ROOT / ".gitignore").read_text().split()}
    assert ignored <= {rule.removeprefix("**/") for rule in LEFT_OUT}


def test_the_commands_of_the_page_are_those_of_the_file() -> None:
    commands = re.findall(r"^#   (docker .+)$", DOCKERFILE, re.M)
    page = (ROOT / "docs/set_up.md").read_text()
    assert len(commands) == 2 and all(re.search(rf"^{re.escape(command)}", page, re.M) for command in commands)
