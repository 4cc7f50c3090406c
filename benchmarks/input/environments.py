"""What the candidates need before they start: an environment for each peer, and the photos in each peer's own form."""

import json
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks import ROOT
from benchmarks.input.candidates import STORES
from benchmarks.input.turns import CandidateError, last_line

_PEERS = Path(__file__).parent / "peers"
_INSTALL_SECONDS = 1200
_WRITE_SECONDS = 1200
_BESIDE = "# beside ours"

T = TypeVar("T")


class Workshop:
    """Environments and stores in one folder, made once and kept."""

    def __init__(self, folder: Path, *, install: bool) -> None:
        self._folder = folder
        self._install = install
        self._failed: dict[str, str] = {}
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def python(self, peer: str | None) -> Path:
        """The interpreter of a peer, installed where it is not yet. Raises CandidateError with the reason."""
        if peer is None:
            return Path(sys.executable)
        return self._once(peer, lambda: self._environment(peer))

    def _environment(self, peer: str) -> Path:
        requirements = _PEERS / f"{peer}.txt"
        folder = self._folder / "venvs" / peer
        python, finished = folder / "bin" / "python", folder / "installed.txt"
        if finished.exists() and finished.read_text() == requirements.read_text():
            return python
        if not self._install:
            raise CandidateError("not installed: --no-install")
        print(f"  install {peer}", file=sys.stderr, flush=True)
        venv.create(folder, clear=True)
        # Packages that a peer shares are those of this interpreter: no second torch of several gigabytes.
        beside = requirements.read_text().startswith(_BESIDE)
        if beside:
            (path,) = folder.glob("lib/python*/site-packages")
            (path / "beside.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "-r", requirements]
        self._run([*command, *(["--no-deps"] if beside else [])], f"install-{peer}", _INSTALL_SECONDS, "not installed")
        shutil.copy(requirements, finished)
        return python

    def store(self, name: str, photos: Path) -> Path:
        """The folder that a candidate reads, written where it is not yet. Raises CandidateError with the reason."""
        if name == "photos":
            return photos
        folder = photos.parent / name
        if not folder.exists():
            self._once(name, lambda: self._write(name, photos, folder))
        return folder

    def _write(self, name: str, photos: Path, folder: Path) -> None:
        made = STORES[name]
        unfinished = folder.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        python = self.python(made.peer)
        print(f"  write {name}", file=sys.stderr, flush=True)
        job = {"module": made.module, "photos": str(photos), "store": str(unfinished), "options": made.options}
        command = [python, "-m", "benchmarks.input.serve", json.dumps(job)]
        self._run(command, f"write-{name}", _WRITE_SECONDS, "its data could not be written")
        unfinished.rename(folder)

    def _once(self, name: str, make: Callable[[], T]) -> T:
        """What has failed is not tried again: several candidates may need it."""
        if name in self._failed:
            raise CandidateError(self._failed[name])
        try:
            return make()
        except CandidateError as error:
            self._failed[name] = str(error)
            raise

    def _run(self, command: list, log_name: str, seconds: float, failure: str) -> None:
        log = self.logs / f"{log_name}.log"
        try:
            with log.open("wb") as out:
                subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, timeout=seconds, check=True)
        except subprocess.TimeoutExpired:
            raise CandidateError(f"{failure}: not done after {seconds:.0f} s") from None
        except subprocess.CalledProcessError:
            raise CandidateError(f"{failure}: {last_line(log)}") from None


def stored_bytes(store: Path, images: int) -> float:
    """Bytes on disk for each image."""
    return sum(file.stat().st_size for file in store.rglob("*") if file.is_file()) / images
