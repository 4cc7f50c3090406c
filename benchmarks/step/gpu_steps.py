"""Compiled bf16 training steps of our networks and timm's in one and the same loop, for benchmarks.step.gpu."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.step.plain_loop import CLASSES, TrainingStep, classify, peak_bytes
from benchmarks.step.plain_loop import MODELS as SMALLER
from vitcomposer.cost.flops import TRAIN_FACTOR, multi_crop_flops
from vitcomposer.cost.gpus import peak_flops
from vitcomposer.models import build_model

PRECISION = "amp_bf16"


@dataclass(frozen=True)
class Scale:
    """How large everything is: as on a GPU, or tiny, to see on a CPU that the code runs."""

    device: torch.device
    image_size: int
    sizes: tuple[int, ...]  # of the curriculum's stages
    batch: int
    stage_batch: int  # images on one of 8 GPUs at a global batch of 4096
    batches: tuple[int, ...]
    crops: tuple[tuple[int, int], ...]  # (count, size)
    crops_batch: int
    seconds: float  # of one measurement
    rounds: int
    backend: str  # of torch.compile
    tiny: bool

    @property
    def peak(self) -> float | None:
        return peak_flops(device_name(self.device), PRECISION)


def full_scale() -> Scale:
    return Scale(
        device=torch.device("cuda"),
        image_size=224,
        sizes=(224, 96, 160, 192, 128),
        batch=256,
        stage_batch=512,
        batches=(64, 128, 256, 512, 1024),
        crops=((2, 224), (6, 96)),
        crops_batch=64,
        seconds=1.5,
        rounds=3,
        backend="inductor",
        tiny=False,
    )


def tiny_scale(device: torch.device) -> Scale:
    return Scale(
        device=device,
        image_size=64,
        sizes=(64, 32),
        batch=2,
        stage_batch=2,
        batches=(1,),
        crops=((2, 64), (6, 32)),
        crops_batch=1,
        seconds=0.02,
        rounds=2,
        backend="eager",
        tiny=True,
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


MODELS = {**SMALLER, "vit_l": ("vit_large_patch16", "vit_large_patch16_224")}
# Stochastic depth of the recipe, by these names, in the order of interest: a budget that ends leaves out the last.
NETWORKS = {"vit_s": 0.0, "convit_s": 0.1, "vit_b": 0.0, "vit_l": 0.0, "deit_s": 0.1, "convit_b": 0.1}
WHOLE = ("vit_s", "convit_s")  # of which the whole forward pass is compiled, on both sides; of the others one block


def build(name: str, who: str, scale: Scale, *, num_classes: int = CLASSES) -> nn.Module:
    """The network of that name, ours or timm's."""
    ours, theirs = MODELS[name]
    convit = name.startswith("convit")
    options: dict[str, Any] = {"drop_path_rate": NETWORKS[name]}
    if scale.tiny:
        options |= {"depth": 2, "embed_dim": 48, "num_heads": 4 if convit else 3}
        options |= {"local_up_to_layer": 1} if convit else {}
    if who == "timm":
        if scale.tiny and convit:
            options["embed_dim"] //= options["num_heads"]  # timm's ConViT multiplies
        return timm.create_model(theirs, num_classes=num_classes, img_size=scale.image_size, **options)
    return build_model(ours, num_classes=num_classes, image_size=scale.image_size, **options)


@dataclass(frozen=True)
class Candidate:
    """A training step of step.py with what its speed is divided by."""

    run: TrainingStep
    batch: int
    flops: int  # forward and backward of one image


def candidate(
    model: nn.Module, scale: Scale, *, crops: Sequence[tuple[int, int]], batch: int, whole: bool
) -> Candidate:
    """A step on synthetic images that stay on the device.

    Args:
        crops: (count, size) of every group of views of one image; one group of one is ordinary training.
        whole: Compile the whole forward pass, as `run.compile` does; else one block for all, a tenth of the time.
    """
    flops = TRAIN_FACTOR * multi_crop_flops(model, [size for count, size in crops for _ in range(count)])
    if not whole:
        compile_blocks(model, scale)
    compiled: Any = torch.compile(model, dynamic=False, backend=scale.backend) if whole else model
    images = [torch.randn(count * batch, 3, size, size, device=scale.device) for count, size in crops]
    labels = torch.randint(CLASSES, (batch,), device=scale.device)
    views = len(crops) > 1

    def all_crops(model: nn.Module, *_: Tensor) -> Tensor:
        return torch.stack([model(group).float().square().mean() for group in images]).sum()

    loss = all_crops if views else classify
    run = TrainingStep(compiled, images[0], labels, loss, device=scale.device, compiled=False)
    return Candidate(run, batch, flops)


def compile_blocks(trunk: nn.Module, scale: Scale) -> None:
    """Compile the blocks of a network in place: they share one graph."""
    for block in trunk.get_submodule("blocks").children():
        block.compile(dynamic=False, backend=scale.backend)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_each(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Mean seconds of a call that has been warmed up, over about ``seconds``."""
    synchronize(device)
    began, done, ahead = time.perf_counter(), 0, 1
    while (spent := time.perf_counter() - began) < seconds:
        # Queue about a tenth of the measurement before waiting, so that waiting costs nothing.
        ahead = max(1, min(200, int(0.1 * seconds * done / spent))) if done else 1
        for _ in range(ahead):
            call()
        done += ahead
        synchronize(device)
    return (time.perf_counter() - began) / done


def measure(candidates: dict[str, Candidate], scale: Scale) -> dict[str, dict[str, Any]]:
    """Images a second, MFU and peak memory of every candidate, in turn over the rounds, after their compilation."""
    compiling = {}
    for name, one in candidates.items():
        began = time.perf_counter()
        for _ in range(3):
            one.run()
        synchronize(scale.device)
        compiling[name] = time.perf_counter() - began
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(scale.rounds):
        for name, one in candidates.items():
            rates[name].append(one.batch / seconds_each(one.run, scale.device, scale.seconds))
    return {
        name: {
            "batch": one.batch,
            "train_flops_per_image": one.flops,
            "images_per_sec": (rate := statistics.median(rates[name])),
            "images_per_sec_rounds": rates[name],
            "mfu": rate * one.flops / scale.peak if scale.peak else None,
            "peak_memory_bytes": peak_bytes(one.run, scale.device),
            "first_steps_seconds": compiling[name],
        }
        for name, one in candidates.items()
    }


def forget(scale: Scale) -> None:
    """Free what a candidate held, its graphs too."""
    torch._dynamo.reset()
    gc.collect()
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()


Rows = list[dict[str, Any]]


def training(scale: Scale) -> Iterator[Rows]:
    """Every network, ours and timm's side by side, compiled in the same way."""
    for name in list(NETWORKS)[: 3 if scale.tiny else None]:
        models = {who: build(name, who, scale) for who in ("vitcomposer", "timm")}
        facts = {"model": name, **_kind(name, models["vitcomposer"]), "image_size": scale.image_size}
        crops = [(1, scale.image_size)]
        whole = name in WHOLE
        pair = {
            who: candidate(model, scale, crops=crops, batch=scale.batch, whole=whole) for who, model in models.items()
        }
        found = measure(pair, scale)
        del models, pair
        forget(scale)
        compiled = "model" if whole else "block"
        yield [{"who": who, **facts, "compiled": compiled, **row} for who, row in found.items()]


def _kind(name: str, model: nn.Module) -> dict[str, Any]:
    """What `vitcomposer plan` compares with its own network."""
    return {"family": "convit" if name.startswith("convit") else "vit", "width": model.num_features}


def stages(scale: Scale) -> Iterator[Rows]:
    """The sizes of a curriculum, at the batch that one of eight GPUs has."""
    yield from _sweep(scale, [(size, scale.stage_batch) for size in scale.sizes])


def batches(scale: Scale) -> Iterator[Rows]:
    """Images a step on one GPU."""
    yield from _sweep(scale, [(scale.image_size, batch) for batch in scale.batches])


def _sweep(scale: Scale, points: list[tuple[int, int]]) -> Iterator[Rows]:
    for size, batch in points:
        model = build("vit_s", "vitcomposer", scale)
        facts = {"who": "vitcomposer", "model": "vit_s", **_kind("vit_s", model), "image_size": size}
        one = candidate(model, scale, crops=[(1, size)], batch=batch, whole=False)
        row = measure({"": one}, scale)[""]
        del model, one
        forget(scale)
        yield [{**facts, "compiled": "block", **row}]


def multi_crop(scale: Scale) -> Iterator[Rows]:
    """All crops of an image through the trunk, one pass a size, forward and backward; images, not crops, a second."""
    for name in ("vit_s",) if scale.tiny else ("vit_s", "vit_b"):
        trunk = build(name, "vitcomposer", scale, num_classes=0)
        one = candidate(trunk, scale, crops=scale.crops, batch=scale.crops_batch, whole=False)
        row = measure({"": one}, scale)[""]
        del one, trunk
        forget(scale)
        crops = "+".join(f"{count}x{size}" for count, size in scale.crops)
        yield [{"who": "vitcomposer", "model": name, "crops": crops, "compiled": "block", **row}]
