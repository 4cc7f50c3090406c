"""Measures the input pipeline of this machine, stage by stage."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import psutil

from vitcomposer.data.workers import usable_cores
from vitcomposer.schema import Supervised

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

Samples = list[dict[str, Any]]
Collate = Callable[[Samples], dict[str, Any]]
STAGE_IMAGES = 256  # read before the clock starts, and used over and over by the stages
PREFETCH_FACTORS = (1, 2, 4)


@dataclass(frozen=True)
class Speed:
    """One measurement. ``cpu_seconds`` are of all processes and threads that took part."""

    name: str
    images: int
    seconds: float
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        """Images a second by the clock on the wall."""
        return self.images / self.seconds

    @property
    def per_cpu_second(self) -> float:
        """Images a second of one core's time."""
        return self.images / max(self.cpu_seconds, 1e-9)


class _Clock:
    """Seconds on the wall and of the cores since it was made, this process and its children together."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), self._spent()

    def speed(self, name: str, images: int) -> Speed:
        return Speed(name, images, self.seconds(), max(self._spent() - self._cpu, 0.0))

    def seconds(self) -> float:
        return time.perf_counter() - self._wall

    @staticmethod
    def _spent() -> float:
        times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        return time.process_time() + sum(t.user + t.system for t in times)


def measure(cfg: Supervised, *, workers: list[int], seconds: float) -> dict[str, Any]:
    """Every figure of ``vitcomposer bench``, as ``--json`` writes them.

    Args:
        workers: Numbers of loader processes to try; 0 loads in this process.
        seconds: Of each measurement.

    Raises:
        ConfigError: The data cannot be had or do not fit the configuration.
    """
    # Once a run and shard: in seconds of measuring it would look like a cost of every image.
    cfg = replace(cfg, data=replace(cfg.data, validate_hash=None))
    with one_thread():
        return _measure(cfg, workers, seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute in one thread, as it does in a worker."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _measure(cfg: Supervised, workers: list[int], seconds: float) -> dict[str, Any]:
    import torch

    loader = _loader(cfg, num_workers=0)
    collate: Any = loader.collate_fn
    container, bytes_per_image = measure_container(loader.dataset, seconds)
    batches = _read(loader)
    crops, stages = measure_crops(cfg, batches, seconds)
    whole = measure_collate(collate, batches, seconds)
    rest = 1e3 / whole.per_cpu_second - sum(stages.values())
    loaders, starts = measure_loaders(cfg, workers, seconds)
    threads = [measure_collate(collate, batches, seconds, threads=count) for count in workers if count]
    with _busy_interpreter():
        busy = [measure_collate(collate, batches, seconds, threads=1), measure_loaders(cfg, [1], seconds)[0][0]]
    return {
        "data": cfg.data.local if cfg.data.source == "mds" else "synthetic",
        "batch_size": cfg.global_train_batch_size,
        "image_size": cfg.model.image_size,
        "cores": usable_cores(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "bytes_per_image": bytes_per_image,
        "milliseconds": {"read": 1e3 / container.per_cpu_second, **stages, "augment and rest": max(0.0, rest)},
        "speeds": [_facts(speed, bytes_per_image) for speed in (container, crops, whole, *loaders)],
        "threads": [_facts(speed, bytes_per_image) for speed in threads],
        "beside_busy_interpreter": {speed.name: speed.per_second for speed in busy},
        "seconds_to_start_workers": starts,
        "prefetch": measure_prefetch(cfg, max(workers), seconds) if max(workers) else {},
        "copy_to_device_gb_per_second": measure_copies(cfg) if torch.cuda.is_available() else None,
    }


def measure_container(dataset: Iterable[dict[str, Any]], seconds: float) -> tuple[Speed, float]:
    """Samples handed over by the data set with their bytes untouched, and the mean number of these bytes."""
    next(iter(dataset))  # shards are found and mapped
    clock, images, size = _Clock(), 0, 0
    for sample in _forever(dataset):
        images, size = images + 1, size + len(sample["image"])
        if images % 256 == 0 and clock.seconds() >= seconds:
            break
    return clock.speed("container only", images), size / images


def measure_crops(cfg: Supervised, batches: list[Samples], seconds: float) -> tuple[Speed, dict[str, float]]:
    """One random view of each image in a batch, and the milliseconds of its stages: box, decode and resize."""
    from vitcomposer.data.batch_memory import empty_batch
    from vitcomposer.data.boxes import random_resized_box
    from vitcomposer.data.jpeg import decode as jpeg

    augment, rng, now = cfg.augment, random.Random(0), time.process_time
    spent = {"draw box": 0.0, "decode": 0.0, "resize": 0.0}
    jpeg.decode_region(batches[0][0]["image"], (0, 0, 1, 1))  # kernels are compiled or loaded
    clock, images = _Clock(), 0
    for samples in _for_seconds(batches, clock, seconds):
        out = empty_batch(len(samples), cfg.model.image_size)
        for sample, view in zip(samples, out, strict=True):
            begin = now()
            height, width = jpeg.read_size(sample["image"])
            box = random_resized_box(rng, height, width, augment.crop_scale, augment.crop_ratio)
            drawn = now()
            pixels = jpeg.decode_region(sample["image"], box)
            decoded = now()
            jpeg.resize_into(pixels, view, augment.interpolation)
            spent["draw box"] += drawn - begin
            spent["decode"] += decoded - drawn
            spent["resize"] += now() - decoded
        images += len(samples)
    return clock.speed("decode and crop", images), {name: 1e3 * value / images for name, value in spent.items()}


def measure_collate(collate: Collate, batches: list[Samples], seconds: float, threads: int = 0) -> Speed:
    """Whole batches of samples in memory, made by this thread, or by ``threads`` others of this process."""
    collate(batches[0])
    clock, images = _Clock(), 0
    if not threads:
        for samples in _for_seconds(batches, clock, seconds):
            images += len(collate(samples)["label"])
        return clock.speed("whole collate", images)
    with ThreadPoolExecutor(threads) as pool:
        clock, waiting = _Clock(), []
        for samples in _for_seconds(batches, clock, seconds):
            waiting.append(pool.submit(collate, samples))
            if len(waiting) > threads:
                images += len(waiting.pop(0).result()["label"])
        images += sum(len(future.result()["label"]) for future in waiting)
        return clock.speed(_count(threads, "thread"), images)


def measure_loaders(cfg: Supervised, workers: list[int], seconds: float) -> tuple[list[Speed], dict[int, float]]:
    """The loader with each number of workers, and the seconds to start them."""
    speeds, starts = [], {}
    for count in workers:
        loader = _loader(cfg, num_workers=count)
        began = time.perf_counter()
        iter(loader)
        starts[count] = time.perf_counter() - began
        speeds.append(measure_loader(loader, seconds, f"loader, {_count(count, 'worker')}"))
    return speeds, starts


def measure_loader(loader: "DataLoader", seconds: float, name: str) -> Speed:
    """Batches as they come, once all workers are at work; ends the workers."""
    batches = _forever(loader)
    in_step = max(1, loader.num_workers)  # they finish at much the same time
    for _ in islice(batches, in_step):
        pass
    clock, images = _Clock(), 0
    while clock.seconds() < seconds:
        images += sum(len(batch["label"]) for batch in islice(batches, in_step))
    speed = clock.speed(name, images)
    loader._iterator = None  # ends the workers
    return speed


def measure_prefetch(cfg: Supervised, workers: int, seconds: float) -> dict[int, float]:
    """Images a second by the number of batches that each worker prepares ahead."""
    found = {}
    for factor in PREFETCH_FACTORS:
        changed = replace(cfg, data=replace(cfg.data, prefetch_factor=factor))
        found[factor] = measure_loader(_loader(changed, num_workers=workers), seconds, "").per_second
    return found


def measure_copies(cfg: Supervised) -> dict[str, float]:
    """GB/s of a batch's way to the GPU, from pinned and from ordinary memory."""
    import torch

    size = cfg.model.image_size
    found = {}
    for name in ("pinned", "ordinary"):
        batch = torch.zeros(min(cfg.global_train_batch_size, 256), 3, size, size, dtype=torch.uint8)
        batch = batch.pin_memory() if name == "pinned" else batch
        batch.cuda()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            batch.cuda(non_blocking=True)
        torch.cuda.synchronize()
        found[name] = 20 * batch.numel() / 1e9 / (time.perf_counter() - began)
    return found


@contextmanager
def _busy_interpreter() -> Iterator[None]:
    """Beside a thread that dispatches small operations as fast as it can, as a training loop does for a GPU."""
    import torch

    done, value = threading.Event(), torch.zeros(8)

    def dispatch() -> None:
        while not done.is_set():
            value.add_(1)

    thread = threading.Thread(target=dispatch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _loader(cfg: Supervised, num_workers: int) -> Any:
    from vitcomposer.data.loader import build_dataspec

    cfg = replace(cfg, data=replace(cfg.data, num_workers=num_workers))
    return build_dataspec(cfg, "train", seed=cfg.seed, device_batch_size=cfg.global_train_batch_size).dataloader


def _read(loader: Any) -> list[Samples]:
    """Whole batches of about STAGE_IMAGES samples, in memory, or as many as an epoch has."""
    size = loader.batch_size
    wanted = size * max(1, STAGE_IMAGES // size)
    samples = [{**s, "image": bytes(s["image"])} for s in islice(iter(loader.dataset), wanted)]
    return [samples[at : at + size] for at in range(0, len(samples) - size + 1, size)]


def _forever(source: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from source


def _for_seconds(batches: list[Samples], clock: _Clock, seconds: float) -> Iterator[Samples]:
    for samples in cycle(batches):
        yield samples
        if clock.seconds() >= seconds:
            return


def _facts(speed: Speed, bytes_per_image: float) -> dict[str, Any]:
    return {
        "name": speed.name,
        "images": speed.images,
        "images_per_second": speed.per_second,
        "images_per_cpu_second": speed.per_cpu_second,
        "read_mb_per_second": speed.per_second * bytes_per_image / 1e6,
    }


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def mechanics(found: dict[str, Any], prefetch_factor: int) -> list[str]:
    """What the loader is made of, each choice with its measurement, from the figures of :func:`measure`."""
    rates = {speed["name"]: speed["images_per_second"] for speed in (*found["speeds"], *found["threads"])}
    workers = [count for count in found["seconds_to_start_workers"] if count]
    names = [(f"loader, {_count(count, 'worker')}", _count(count, "thread")) for count in workers]
    pairs = "; ".join(
        f"{loader} {rates[loader]:,.0f} images/s, {thread} {rates[thread]:,.0f}" for loader, thread in names
    )
    busy = ", ".join(f"{name} {rate:,.0f}" for name, rate in found["beside_busy_interpreter"].items())
    lines = [f"processes, not threads: {pairs or 'not compared'}; beside a busy interpreter {busy}"]
    if workers:
        start = found["seconds_to_start_workers"][workers[-1]]
        lines.append(f"persistent: to start {_count(workers[-1], 'worker')} takes {start:.2f} s, once and not an epoch")
    if found["prefetch"]:
        by_factor = ", ".join(f"{factor}: {rate:,.0f}" for factor, rate in found["prefetch"].items())
        lines.append(f"prefetch_factor {prefetch_factor}: of {by_factor} images/s")
    copies = found["copy_to_device_gb_per_second"]
    if copies:
        lines.append(f"pinned memory: {copies['pinned']:.1f} GB/s to the GPU, {copies['ordinary']:.1f} without")
    else:
        lines.append("pinned memory: no, there is no GPU to copy to")
    return lines


def cores_for(found: dict[str, Any], target: float) -> int:
    """Cores that give ``target`` images a second, by the loader with the most workers."""
    return math.ceil(target / found["speeds"][-1]["images_per_cpu_second"])
