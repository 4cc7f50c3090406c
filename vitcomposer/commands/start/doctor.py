"""``vitcomposer doctor``: whether this machine is ready to train, and what to do where it is not.

Nothing heavy is imported without ``--measure``, so that the answer comes in less than two seconds.
"""

import argparse
import os
import resource
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vitcomposer.data.mds import worker_room
from vitcomposer.data.workers import planned_workers, usable_cores
from vitcomposer.escape import message
from vitcomposer.installed import version_line, version_of
from vitcomposer.runs import machine
from vitcomposer.schema import Data
from vitcomposer.stores.weights import FOLDER, PUBLISHED, find_published

_BATCH = 256 * 3 * 224**2  # bytes of the images of a usual batch on one GPU
_LEAST_DISK = 5e9  # bytes: the checkpoints of a ViT-B


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        subject: What.
        text: What was found.
        remedy: What to do; empty where all is well.
    """

    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n      {self.remedy}" if self.remedy else ""
        return f"{'do' if self.remedy else 'good':<6}{self.subject:<9} {message(self.text)}{remedy}"


def add_command(commands: Any) -> None:
    """Add ``doctor`` to the subcommands of a parser."""
    parser = commands.add_parser("doctor", help="is this machine ready", description=_run.__doc__)
    parser.add_argument("--measure", action="store_true", help="also images decoded a second, and training steps")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Look at Python, GPU, shared memory, files, JPEG, disk, extras and weights. Exit code 1 if a line says do."""
    gpus = _find_gpus()
    count = 0 if isinstance(gpus, str) else len(gpus)
    asked = [partial(_gpu, gpus), partial(_shared_memory, count), partial(_open_files, count)]
    looks = [_python, *asked, _jpeg, _disk, _extras, _weights]
    if args.measure:
        looks += [_decode_rate, _step]
    things = 0
    for look in looks:
        line = look()
        print(line, flush=True)
        things += bool(line.remedy)
    done = f"{things} thing{'s' * (things != 1)} to do" if things else "Nothing to do"
    print(f"{done}. Next: vitcomposer new my_photos")
    return 1 if things else 0


def _python() -> Line:
    *others, python = version_line().split(", Python ")
    text = ", ".join([python, *others])
    unmet = machine.unmet_requirements("vitcomposer")
    return Line("Python", text, f"missing: {', '.join(unmet)}: pip install -U vitcomposer" if unmet else "")


def _find_gpus() -> list[machine.Gpu] | str:
    """Those of this machine, or what the driver says where it fails."""
    try:
        return machine.gpus()
    except RuntimeError as error:
        return str(error)


def _gpu(found: list[machine.Gpu] | str) -> Line:
    if isinstance(found, str):
        return Line("GPU", f"the driver fails: {found}", "install NVIDIA's driver again, or start the machine again")
    if not found:
        return Line("GPU", "none that nvidia-smi knows: training runs on the CPU, which is for small images")
    count = Counter(f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in found)
    bf16 = all(gpu.has_bf16 for gpu in found)
    text = ", ".join(f"{number} x {name}" for name, number in count.items())
    text += f", driver {found[0].driver}, bf16 {'yes' if bf16 else 'no (precision=amp_fp16)'}"
    return Line("GPU", text, _gpu_remedy(found[0].driver))


def _gpu_remedy(driver: str) -> str:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides it: unset it"
    cuda = machine.cuda_of_torch()
    if cuda is None:
        return "the torch that is installed is for CPUs: pip install torch from https://pytorch.org/get-started"
    oldest, number = machine.oldest_driver(cuda), driver.partition(".")[0]
    if oldest is not None and number.isdecimal() and int(number) < oldest:
        return f"torch is for CUDA {cuda}, which needs driver {oldest} or newer: renew it, or install another torch"
    return ""


def _shared_memory(gpus: int) -> Line:
    workers, ahead = max(1, gpus) * _workers(gpus), Data.prefetch_factor
    needed = worker_room.bytes_needed(workers, ahead, _BATCH)
    said = f"{_count(workers)} about {needed / 1e6:,.0f} MB"
    if not worker_room.MEMORY.is_dir():
        return Line("/dev/shm", f"not there; {said} wherever this system has it")
    free = worker_room.free_bytes()
    text = f"{free / 1e6:,.0f} MB free; {said}"
    gigabytes = -(-needed // 10**9) + 1
    remedy = f"docker run --shm-size={gigabytes}g ...      or data.num_workers=0 (slow)"
    return Line("/dev/shm", text, remedy if free < needed else "")


def _workers(gpus: int) -> int:
    """Loader workers of each rank of a run on all GPUs of this machine, or on its CPU."""
    return planned_workers(usable_cores(), max(1, gpus), gpu=gpus > 0)


def _count(workers: int) -> str:
    return f"{workers} loader worker{'s need' if workers != 1 else ' needs'}"


def _open_files(gpus: int) -> Line:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    workers = _workers(gpus)
    needed = worker_room.files_needed(workers)
    low = hard != resource.RLIM_INFINITY and hard < needed
    shown = "no limit" if hard == resource.RLIM_INFINITY else f"{soft:,}, up to {hard:,}"
    remedy = f"ulimit -n {needed}, docker run --ulimit nofile={needed}, or data.num_workers=0"
    return Line("files", f"{shown} open at a time; {_count(workers)} {needed}", remedy if low else "")


def _jpeg() -> Line:
    missing = [name for name in ("simplejpeg", "numba") if version_of(name) is None]
    count = usable_cores()
    cores = f"{count} core{'s' * (count != 1)}"
    if missing:
        return Line("JPEG", f"{' and '.join(missing)} missing; {cores}", f"pip install {' '.join(missing)}")
    return Line("JPEG", f"seekable region decode; {cores} (decode rate: --measure)")


def _disk() -> Line:
    free, here = shutil.disk_usage(".").free, Path.cwd()
    if not os.access(".", os.W_OK):
        return Line("disk", f"{here} cannot be written", "cd to a folder of yours, or set run.folder and data.local")
    remedy = f"make room, or cd to another disk: checkpoints take {_LEAST_DISK / 1e9:.0f} GB and more"
    return Line("disk", f"{free / 1e9:,.0f} GB free in .", remedy if free < _LEAST_DISK else "")


def _extras() -> Line:
    found = {name: there for name, there in machine.extras("vitcomposer").items() if name != "test"}
    there, missing = ([name for name, has in found.items() if has is wanted] for wanted in (True, False))
    text = ", ".join(there) or "none"
    text += f"       missing: {', '.join(missing)} (pip install 'vitcomposer[{missing[-1]}]')" if missing else ""
    return Line("extras", text)


def _weights() -> Line:
    folder = Path(FOLDER)
    names = sorted(path.name for path in folder.glob("*") if path.is_file() and path.name[0] != ".")
    sizes = {name: (folder / name).stat().st_size for name in names}
    for name, size in sizes.items():
        known = find_published(name)
        if known is not None and known.name == name and size < known.least_bytes:
            text = f"{folder / name} is not whole: {size / 1e6:,.1f} of {known.least_bytes / 1e6:,.1f} MB"
            return Line("weights", text, f"rm {folder / name}; vitcomposer weights {known.short}")
    if not names:
        return Line("weights", f"none in {folder}/ (vitcomposer weights {PUBLISHED[0].short} brings a start)")
    return Line("weights", ", ".join(names))


def _decode_rate() -> Line:
    from vitcomposer.cost.quick import decode_rate

    rate = decode_rate()
    return Line("decode", f"{rate:,.0f} photos/s and core (500 x 375, seekable, random crops to 224 px)")


def _step() -> Line:
    from vitcomposer.cost.quick import measure_step

    found = measure_step()
    rate = found.images / found.seconds
    text = f"DeiT-S, {found.images} images of 224 px: {found.seconds:.2f} s, {rate:,.{0 if rate > 10 else 1}f} images/s"
    return Line("step", f"{text} on {found.device}, {found.precision}")
