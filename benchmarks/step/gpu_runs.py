"""Whole methods and runs on a GPU, for benchmarks.step.gpu: SwAV, Composer's Trainer by precision, a silent rank.

Composer is imported inside the functions: the other sections do without it.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.step.gpu_steps import Candidate, Rows, Scale, compile_blocks, forget, measure
from benchmarks.step.plain_loop import TrainingStep, random_batch
from vitcomposer.cost.flops import TRAIN_FACTOR, multi_crop_flops

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SETTINGS = {  # of deit_s; each row that a device does not have says why
    "fp32": ["precision=fp32"],
    "amp_bf16": ["precision=amp_bf16"],
    "amp_bf16, microbatches auto": ["precision=amp_bf16", "run.device_train_microbatch_size=auto"],
    "amp_bf16, run.compile": ["precision=amp_bf16", "run.compile=true"],
    "fp32, run.compile": ["precision=fp32", "run.compile=true"],
}
AUTO_SHARE = 0.6  # of the memory that the whole batch takes, which `auto` is left with
PATIENCE = 5.0  # seconds that a rank waits for the others
LONGEST = 60.0  # seconds after which no time-out is expected any more


def swav(scale: Scale) -> Iterator[Rows]:
    """A SwAV step with 2 + 6 crops, the recipe's task against timm's trunk in a plain loop of the same method."""
    from benchmarks.step.swav import COUNTS, Sizes, both_sides, loss_itself

    tiny = Sizes(crops=(64, 32), dims=(TINY["embed_dim"], 64, 16), prototypes=20, trunk=TINY)
    sizes = tiny if scale.tiny else Sizes()
    sides, found = both_sides(scale.crops_batch, scale.device, sizes), {}
    crops = [size for count, size in zip(COUNTS, sizes.crops, strict=True) for _ in range(count)]
    for who, side in sides.items():
        trunk = next(module for module in side.modules() if hasattr(module, "blocks"))
        if who == "vitcomposer":
            flops = TRAIN_FACTOR * multi_crop_flops(trunk, crops)
        compile_blocks(trunk, scale)
        nothing = torch.empty(0, device=scale.device)
        found[who] = TrainingStep(side, nothing, nothing, loss_itself, device=scale.device, compiled=False)
    candidates = {who: Candidate(step, scale.crops_batch, flops) for who, step in found.items()}
    rows = measure(candidates, scale)
    del sides, side, found, candidates
    forget(scale)
    shown = "+".join(f"{count}x{size}" for count, size in zip(COUNTS, sizes.crops, strict=True))
    yield [{"who": who, "model": "deit_s", "crops": shown, "compiled": "block", **row} for who, row in rows.items()]


def trainer(scale: Scale) -> Iterator[Rows]:
    """Steps of Composer's Trainer as a recipe builds it, by precision, compilation and microbatches."""
    whole_peak = 0
    for name, changes in SETTINGS.items():
        limit = _memory_limit(scale, whole_peak) if "auto" in name else nullcontext()
        row = _trainer_row(scale, changes, limit)
        whole_peak = row.get("peak_memory_bytes") or whole_peak
        yield [{"setting": name, "model": "deit_s", "batch": scale.batch, "image_size": scale.image_size, **row}]


def _trainer_row(scale: Scale, changes: list[str], limit: AbstractContextManager[Any]) -> dict[str, Any]:
    from benchmarks.step.trainer import TrainerSteps
    from vitcomposer.errors import ConfigError

    images, labels = random_batch(scale.batch, scale.device, scale.image_size)
    more = [*changes, f"model.image_size={scale.image_size}"]
    more += [f"model.{key}={value}" for key, value in TINY.items()] if scale.tiny else []
    # In tiny, the code of a compiled run without the seconds of its compiler.
    stance = torch.compiler.set_stance("force_eager") if scale.tiny else nullcontext()
    on_gpu = scale.device.type == "cuda"
    forget(scale)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(scale.device)
    with tempfile.TemporaryDirectory() as folder, stance, limit:
        try:
            steps = TrainerSteps(ROOT / "yamls/deit_s.yaml", "deit_small_patch16", images, labels, Path(folder), more)
            seconds = steps.run(4 if scale.tiny else 20)
        except (ConfigError, RuntimeError) as error:  # what the device does not have, or its memory
            return {"images_per_sec": None, "why": str(error).partition("\n")[0]}
        steps.close()
    peak = torch.cuda.max_memory_allocated(scale.device) if on_gpu else None
    rate = scale.batch / statistics.median(seconds)
    return {"images_per_sec": rate, "microbatch": steps.microbatch, "peak_memory_bytes": peak, "why": None}


@contextmanager
def _memory_limit(scale: Scale, whole_peak: int) -> Iterator[None]:
    """Within it this process may use so little of the GPU that ``auto`` cannot take the whole batch at once."""
    if scale.device.type != "cuda" or not whole_peak:
        yield
        return
    whole = torch.cuda.get_device_properties(scale.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, AUTO_SHARE * whole_peak / whole), scale.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, scale.device)


def time_out(scale: Scale) -> Iterator[Rows]:
    """How long after its time-out a rank ends that waits for one that says nothing, and how.

    With two GPUs or on a CPU, for another rank; with one GPU, for work on it that is not done in time.
    """
    on_gpu = scale.device.type == "cuda"
    ranks = min(2, torch.cuda.device_count()) if on_gpu else 2
    patience = 2.0 if scale.tiny else PATIENCE
    with tempfile.TemporaryDirectory() as folder:
        options = [str(ranks), str(patience), scale.device.type, str(Path(folder, "store"))]
        command = [sys.executable, "-m", "benchmarks.step.silent_rank"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        processes = [subprocess.Popen([*command, str(rank), *options], **pipes) for rank in range(ranks)]
        try:
            row = _watch(processes[0])
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    yield [{"backend": "nccl" if on_gpu else "gloo", "ranks": ranks, "timeout_seconds": patience, **row}]


def _watch(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    line = ""
    for line in process.stdout:
        if line.startswith("all are here"):
            break
    else:
        return {"ended_after_seconds": None, "exit_code": process.wait(), "why": f"did not start: {line.strip()[:160]}"}
    began = time.perf_counter()
    try:
        said, _ = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"ended_after_seconds": None, "exit_code": None, "why": f"it still waits after {LONGEST:g} s"}
    lines = [line for line in said.splitlines() if "imeout" in line or "imed out" in line]
    why = lines[-1].strip()[:160] if lines else said.strip()[-160:]
    return {"ended_after_seconds": time.perf_counter() - began, "exit_code": process.returncode, "why": why}
