"""The plain training loop in which networks are timed in turn: one step, its seconds and its peak memory."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

CLASSES, PIXELS = 1000, 224
# Our name and timm's.
MODELS = {
    "vit_ti": ("vit_tiny_patch16", "vit_tiny_patch16_224"),
    "vit_s": ("vit_small_patch16", "vit_small_patch16_224"),
    "vit_b": ("vit_base_patch16", "vit_base_patch16_224"),
    "deit_s": ("deit_small_patch16", "deit_small_patch16_224"),
    "convit_ti": ("convit_tiny", "convit_tiny"),
    "convit_s": ("convit_small", "convit_small"),
    "convit_b": ("convit_base", "convit_base"),
}
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Step = Callable[[], None]


class TrainingStep:
    """Model, optimizer and one batch in memory; calling it trains one step.

    Args:
        loss: Scalar of the model, the images (batch, 3, pixels, pixels) and the labels (batch,).
    """

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, *, device: torch.device, compiled: bool
    ) -> None:
        self.batch, self._data, self._loss, self._device = len(images), (images, labels), loss, device
        self._model = model.to(device).train()
        self._forward = torch.compile(self._model, dynamic=False) if compiled else self._model
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def __call__(self) -> None:
        with torch.autocast("cuda", torch.bfloat16) if self._device.type == "cuda" else nullcontext():
            loss = self._loss(self._forward, *self._data)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def held_bytes(self) -> int:
        """Weights and the state of the optimizer."""
        state = (value for group in self._optimizer.state.values() for value in group.values())
        return sum(t.nbytes for t in (*self._model.parameters(), *state) if isinstance(t, Tensor))


def classify(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def seconds_of(step: Step, device: torch.device) -> float:
    """CPU seconds of this process on a CPU, where other processes disturb; elapsed seconds on a GPU."""
    if device.type != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def take_turns(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every candidate and round, after one step each to warm up. Each round begins with another one."""
    for step in steps.values():
        seconds_of(step, device)
    names, seconds = list(steps), {name: [] for name in steps}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(steps[name], device))
    return seconds


def peak_bytes(step: TrainingStep, device: torch.device) -> int:
    """Largest memory at once of a step, weights and optimizer included, whatever else is on the device excluded."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return step.held_bytes() + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is freed
        peak = max(peak, held)
    return step.held_bytes() + peak


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(seconds: dict[str, list[float]], baseline: str, candidate: str, batch: int) -> dict[str, Any]:
    ratios = [slow / fast for slow, fast in zip(seconds[baseline], seconds[candidate], strict=True)]
    return {
        "baseline": baseline,
        "candidate": candidate,
        "images_per_second": {name: spread([batch / s for s in seconds[name]]) for name in (baseline, candidate)},
        "ratio": spread(ratios),
        "seconds": {name: seconds[name] for name in (baseline, candidate)},
    }


def random_batch(batch: int, device: torch.device, pixels: int = PIXELS) -> tuple[Tensor, Tensor]:
    images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(CLASSES, (batch,))
    return images.to(device), labels.to(device)
