"""The tracks: which images, which target, which clock."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).resolve().parent
Clock = Literal["CPU seconds", "GPU-hours"]


@dataclass(frozen=True)
class Track:
    """What all entries of one table have in common.

    Attributes:
        target: Top-1 as a fraction, which the mean over seeds has to reach with p < ``MAX_P``.
        clock: ``CPU seconds`` of all processes of a run, from its launch to its end, or ``GPU-hours`` of all GPUs.
        images: Training and validation images that the data set has to have.
        command: How the data set is made from its public source; not timed.
    """

    name: str
    title: str
    target: float
    clock: Clock
    hardware: str
    images: tuple[int, int]
    command: str

    @property
    def entries(self) -> Path:
        return FOLDER / "entries" / self.name


_IMAGENET = "vitcomposer convert folder IMAGENET datasets/imagenet --exif keep"
TRACKS = {
    track.name: track
    for track in (
        Track(
            "digits",
            "Handwritten digits to 98 %",
            0.98,
            "CPU seconds",
            "any CPU; name it",
            (1_438, 359),
            "vitcomposer convert digits datasets/digits",
        ),
        Track(
            "cifar10",
            "CIFAR-10 to 80 %, by a transformer",
            0.80,
            "CPU seconds",
            "any CPU; name it",
            (50_000, 10_000),
            "vitcomposer convert torchvision CIFAR10 datasets/cifar10 --root datasets --download",
        ),
        *(
            Track(
                f"imagenet_{name}",
                f"ImageNet-1k to {100 * target:.1f} %",
                target,
                "GPU-hours",
                "H200",
                (1_281_167, 50_000),
                _IMAGENET,
            )
            for name, target in (("77", 0.773), ("80", 0.80), ("82", 0.82))
        ),
    )
}
# Chance that runs whose mean does not reach the target look as if they did: a one-sided t-test over the seeds.
MAX_P = 0.01
MIN_SEEDS = 3
