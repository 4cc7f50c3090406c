"""Measures the device's part of a training step of a recipe: augmentation, then forward, backward and optimizer.

Images are random numbers; nothing of the data set is read.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vitcomposer import losses, optim
from vitcomposer.cost.gpu_speed import Network, View
from vitcomposer.cost.gpus import peak_flops
from vitcomposer.models import build_model
from vitcomposer.models.transformer import ImageTransformer
from vitcomposer.models.trunks import Trunk
from vitcomposer.schema import Supervised

# Images of a step where the yaml leaves its share of a batch to the run: more make no step on that device much cheaper.
_ON_GPU, _ON_CPU = 256, 8
_WARM_UP = 2  # steps: the first is compiled, the second finds its memory
_LOSSES = {
    "soft_target_cross_entropy": losses.soft_target_cross_entropy,
    "binary_cross_entropy": losses.binary_cross_entropy,
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """A row as benchmarks/gpu.py writes it: ``plan --measured`` reads both. MFU is None on a CPU."""

    who: str = "vitcomposer"
    model: str
    family: str
    width: int | None
    image_size: int
    batch: int
    precision: str
    compiled: bool
    train_flops_per_image: float
    images_per_sec: float
    mfu: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def images_of_step(cfg: Supervised, device: torch.device) -> int:
    """Of one forward and backward pass: the yaml's ``run.device_train_microbatch_size``, or what fits the device."""
    size = cfg.run.device_train_microbatch_size
    usual = size if isinstance(size, int) else _ON_GPU if device.type == "cuda" else _ON_CPU
    return min(usual, cfg.global_train_batch_size)


def measure_step(cfg: Supervised, image_size: int, device: torch.device, seconds: float) -> Step:
    """Steps of the recipe's network, optimizer, precision and compilation, at one image size, over ``seconds``.

    Args:
        cfg: Its precision is not ``auto``.
    """
    model = _build(cfg, device)
    batch = images_of_step(cfg, device)
    compiled = cfg.run.compile and device.type == "cuda"  # on a CPU compiling takes longer than measuring
    take = _step_of(cfg, model, image_size, batch, device, compiled=compiled)
    each = seconds_of(take, device, seconds)
    network, peak = Network(model), peak_flops(_name(device), cfg.precision)
    flops = network.train_flops(View(1, image_size, 1.0))
    return Step(
        model=cfg.model.name,
        family=network.family,
        width=network.width,
        image_size=image_size,
        batch=batch,
        precision=cfg.precision,
        compiled=compiled,
        train_flops_per_image=flops,
        images_per_sec=batch / each,
        mfu=None if peak is None else flops * batch / each / peak,
    )


def _build(cfg: Supervised, device: torch.device) -> torch.nn.Module:
    model = build_model(**cfg.model.options()).to(device).train()
    if cfg.init.train_blocks is not None and isinstance(model, ImageTransformer | Trunk):
        model.freeze_below(cfg.init.train_blocks)
    return model


def _step_of(
    cfg: Supervised, model: torch.nn.Module, image_size: int, batch: int, device: torch.device, *, compiled: bool
) -> Callable[[], None]:
    optimizer: Any = optim.build_optimizer(model, cfg.optimizer, global_train_batch_size=cfg.global_train_batch_size)
    if hasattr(optimizer, "train"):  # those without a schedule
        optimizer.train()
    forward: Callable[[Tensor], Any] = torch.compile(model, dynamic=False) if compiled else model
    loss = _LOSSES[cfg.loss]
    images = torch.randn(batch, 3, image_size, image_size, device=device)  # (B, 3, S, S)
    targets = torch.zeros(batch, cfg.model.num_classes, device=device)  # (B, K)
    targets[:, 0] = 1.0
    kind = {"amp_fp16": torch.float16, "amp_bf16": torch.bfloat16}.get(cfg.precision)

    def take() -> None:
        with torch.autocast(device.type, kind, enabled=kind is not None):
            outputs = forward(images)
            heads = (outputs,) if isinstance(outputs, Tensor) else outputs  # (B, K) each
            total = torch.stack([loss(logits.float(), targets) for logits in heads]).mean()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return take


def measure_transform(transform: Callable[[Any], Any], batch: Any, device: torch.device, seconds: float) -> float:
    """Images a second that the device finishes of a collated batch: colours, normalise, erase, mix."""
    count = len(batch["label"])
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return count / seconds_of(lambda: transform(there), device, seconds)


def seconds_of(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Mean of calls after the first ones, over about ``seconds`` and one at least."""
    began, done = 0.0, -_WARM_UP
    while done < 1 or time.perf_counter() - began < seconds:
        if done == 0:
            began = _now(device)
        call()
        done += 1
    return (_now(device) - began) / done


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
