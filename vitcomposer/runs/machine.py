"""Finds out what this machine and its Python have, in milliseconds: torch is not imported for it."""

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vitcomposer.installed import version_of

_QUERY = "name,memory.total,driver_version,compute_cap"
_BF16_SINCE = 8.0  # compute capability: Ampere
# The oldest driver that runs programs of a CUDA: NVIDIA's "CUDA Compatibility", minor version compatibility.
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi says of one.

    Attributes:
        memory_bytes: As the driver counts it.
        capability: Such as 9.0 of an H100; 0 where the driver is too old to say.
    """

    name: str
    memory_bytes: int
    driver: str
    capability: float

    @property
    def has_bf16(self) -> bool:
        """Whether its tensor cores know the format."""
        return self.capability >= _BF16_SINCE


def gpus() -> list[Gpu]:
    """Those of NVIDIA in this machine, in use or not; none where nvidia-smi is not there.

    Raises:
        RuntimeError: It is there and fails, with what it says.
    """
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except OSError:
        return []
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("nvidia-smi gives no answer in 30 s") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip().partition("\n")[0]
        raise RuntimeError(said or f"nvidia-smi ends with {done.returncode}")
    return [_parse(line) for line in done.stdout.splitlines() if line.count(",") >= 3]


def _parse(line: str) -> Gpu:
    name, memory, driver, capability = (word.strip() for word in line.rsplit(",", 3))
    return Gpu(name, int(_number(memory)) << 20, driver, _number(capability))


def _number(text: str) -> float:
    with suppress(ValueError):
        return float(text)
    return 0.0  # [N/A]


def driver_of_gpus() -> str | None:
    """Its version, where there is one."""
    with suppress(RuntimeError):
        return next((gpu.driver for gpu in gpus()), None)
    return None


def cuda_of_torch() -> str | None:
    """The CUDA that the installed torch was built for, such as ``12.6``; None of a torch for CPUs, or without one."""
    spec = importlib.util.find_spec("torch")  # does not import it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        with suppress(OSError):
            found = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", Path(folder, "version.py").read_text(), re.M)
            return found[1] if found else None
    return None


def oldest_driver(cuda: str) -> int | None:
    """The oldest driver (its first number) for programs of a CUDA version, where that is known."""
    return _OLDEST_DRIVER.get(int(cuda.partition(".")[0]))


def unmet_requirements(distribution: str) -> list[str]:
    """What a distribution needs and does not find, such as ``torch>=2.7 (2.6.0 is installed)``; extras are left out."""
    from packaging.requirements import Requirement

    found = []
    for text in importlib.metadata.requires(distribution) or []:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        version = version_of(need.name)
        if version is None or not need.specifier.contains(version, prereleases=True):
            found.append(f"{need.name}{need.specifier} ({version or 'none'} is installed)")
    return found


def extras(distribution: str) -> dict[str, bool]:
    """Whether all packages of each extra are installed, by its name."""
    from packaging.requirements import Requirement

    names = importlib.metadata.metadata(distribution).get_all("Provides-Extra") or []
    needs = [Requirement(text) for text in importlib.metadata.requires(distribution) or []]
    found = {}
    for name in names:
        own = [need for need in needs if need.marker and need.marker.evaluate({"extra": name})]
        own = [need for need in own if need.marker and not need.marker.evaluate({"extra": ""})]
        found[name] = all(version_of(need.name) is not None for need in own)
    return found


def cpu_model() -> str | None:
    """Its name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None
