"""What several test files share: real photographs as an ImageFolder and as MDS, and runs of train.py."""

import atexit
import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ("astronaut", "chelsea", "china", "coffee", "flower", "hubble_deep_field", "immunohistochemistry", "rocket")
TRAIN_PER_CLASS, VAL_PER_CLASS = 24, 6

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def shared_memory_of_streams_released() -> Iterator[None]:
    """Streaming keeps a data set's shared memory, and a handle on everybody else's, until its process ends.

    A run has two data sets; a test worker makes hundreds, each opening all that there were before.
    """
    yield
    if "streaming" in sys.modules and len(os.listdir("/proc/self/fd")) > 200:
        from streaming.base.shared.memory import SharedMemory

        gc.collect()
        for block in [thing for thing in gc.get_objects() if type(thing) is SharedMemory]:
            atexit.unregister(block.cleanup)
            with suppress(BufferError):  # its memory is still mapped by an array, which frees it later
                block.cleanup()


@pytest.fixture(autouse=True)
def signals_are_heard() -> None:
    """A run that a signal has stopped ignores further ones to its end, which here is not that of the process."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def read_photo(name: str) -> Image.Image:
    from skimage import data
    from sklearn.datasets import load_sample_image

    array = load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(data, name)()
    return Image.fromarray(np.asarray(array))


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of JPEG crops of real photographs: a class is a photograph, val crops come from its right end."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in PHOTOS:
        photo = read_photo(name)
        for split, count, left, right in (("train", TRAIN_PER_CLASS, 0.0, 0.6), ("val", VAL_PER_CLASS, 0.6, 1.0)):
            (folder / split / name).mkdir(parents=True)
            low, high = int(left * photo.width), int(right * photo.width)
            for i in range(count):
                width, height = (int(n) for n in rng.integers(80, 140, size=2))
                x = int(rng.integers(low, max(high - width, low + 1)))
                y = int(rng.integers(0, max(photo.height - height, 1)))
                crop = photo.crop((x, y, x + width, y + height))
                crop.save(folder / split / name / f"{i:03}.jpg", quality=int(rng.integers(80, 96)))
    return folder


@pytest.fixture(scope="session")
def photo_mds(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, converted by the command that users call."""
    out = tmp_path_factory.mktemp("mds") / "photos"
    command = [sys.executable, "-m", "vitcomposer", "convert", "folder", str(photo_folder), str(out), "--workers", "2"]
    subprocess.run([*command, "--shard-size", "100kb"], check=True, cwd=ROOT, timeout=280)  # kernels compile
    return out


def tiny_photo_overrides(mds: Path, runs: Path, name: str) -> list[str]:
    """deit_ti on the photographs at a size that two CPU cores train in seconds; every code path stays."""
    return [
        f"data.local={mds}",
        f"run.folder={runs}",
        f"run.name={name}",
        "data.num_workers=0",
        "precision=fp32",
        f"model.num_classes={len(PHOTOS)}",
        "model.image_size=32",
        "model.patch_size=8",
        "model.depth=2",
        "global_train_batch_size=16",
        "max_duration=2ep",
        "schedule.t_warmup=1ba",
        "run.log_interval=1ba",
    ]


def run_train(argv: list[str]) -> int:
    """train.py in this process: Composer's import is paid once."""
    import train

    return train.main(argv)


def error_of(printed: str) -> str:
    """What a start printed on stderr from its error on; before it stands what it was about to train."""
    return printed[printed.index("error: ") :]


@pytest.fixture(scope="session")
def trained_run(photo_mds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on the photographs, whose raw and averaged weights differ and know something."""
    runs = tmp_path_factory.mktemp("trained")
    more = ["algorithms.EMA={smoothing: 0.95, update_interval: 1ba}", "optimizer.lr=0.02", "max_duration=3ep"]
    # 20 does not divide the 48 images: the last batch of an evaluation is short.
    more += ["run.eval_interval=3ep", "run.progress_bar=false", "evaluation.global_batch_size=20"]
    assert run_train([str(ROOT / "yamls/deit_ti.yaml"), *tiny_photo_overrides(photo_mds, runs, "photos"), *more]) == 0
    return runs / "photos"


Tell = Callable[[str, str, float], None]


@pytest.fixture
def tell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tell:
    """``tell(fault, seen, seconds)``: a row of the table, kept when benchmarks.faults runs the tests.

    ``seen`` is the line that the run printed, or what it did where a fault is mended in silence; ``seconds`` lie
    between the fault and the error or, where the run goes on, the first step after it.
    """

    folders = re.compile(rf"{re.escape(str(tmp_path_factory.getbasetemp()))}/[^/\s'\"`]+")

    def keep(fault: str, seen: str, seconds: float) -> None:
        seen = folders.sub("...", seen)  # a temporary folder says nothing to a reader
        row = {"fault": fault, "seen": seen, "seconds": round(seconds, 2), "test": request.node.nodeid}
        path = os.environ.get("VITCOMPOSER_FAULTS")
        if path:
            with open(path, "a", encoding="utf-8") as file:  # one write, so that rows of several workers stay whole
                file.write(json.dumps(row) + "\n")

    return keep
