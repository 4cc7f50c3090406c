"""The folder of one run: whether it holds this run, how far it is, and the checkpoint that it goes on from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

from vitcomposer import config
from vitcomposer.models.checkpoints import check_harmless
from vitcomposer.schema import ConfigError

# What a resumed run may change: how long, where the data lies, how it is read and what is printed.
FREE_ON_RESUME = ("max_duration", "data", "run", "evaluation", "cache.local", "cache.remote")
LATEST = "latest-rank{rank}.pt"


def current_device() -> str:
    """What Composer calls the device of this rank."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def initialize_dist() -> None:
    """Start the process group unless it runs."""
    if not dist.is_initialized():
        dist.initialize_dist(current_device(), timeout=600)


def run_folder(cfg: Any) -> Path:
    """The folder that tells the whole story of one run."""
    return Path(cfg.run.folder) / cfg.run.name


def already_finished(cfg: Any) -> bool:
    """Whether the run folder holds this run, complete.

    Raises:
        ConfigError: The folder holds another run, which this one would overwrite.
    """
    initialize_dist()
    # Rank 0 looks and tells: other nodes need not see its disk, and all ranks must take the same way.
    answer: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            answer[0] = _look_at_run_folder(cfg)
        except ConfigError as error:
            answer[0] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ConfigError(answer[0])
    return bool(answer[0])


def _look_at_run_folder(cfg: Any) -> bool:
    folder = run_folder(cfg)
    if not (folder / "config.yaml").is_file() or not (folder / "checkpoints" / LATEST.format(rank=0)).exists():
        return False
    old = config.load(folder / "config.yaml")
    changed = _changed_keys(dataclasses.asdict(old), dataclasses.asdict(cfg))
    if changed:
        key, before, after = changed[0]
        more = "" if len(changed) == 1 else f" (and {len(changed) - 1} more: {', '.join(c[0] for c in changed[1:])})"
        raise ConfigError(
            f"{key} must be {before!r} to go on with the run in {folder}, got {after!r}{more}. "
            f"Set run.name to start another run, or delete the folder."
        )
    summary = folder / "summary.json"
    finished = summary.is_file() and json.loads(summary.read_text()).get("finished", False)
    return finished and old.max_duration == cfg.max_duration


def _changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    changed = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or f"{prefix}{key}" in FREE_ON_RESUME:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changed += _changed_keys(before, after, f"{prefix}{key}.")
        else:
            changed.append((f"{prefix}{key}", before, after))
    return changed


def latest_checkpoint(folder: Path) -> str | None:
    """Where rank 0 sees the run's last checkpoint, if there is one.

    Composer's own autoresume dies on several nodes that share a disk: each of them removes the same signal file.
    """
    latest = folder / "checkpoints" / LATEST.format(rank=0)
    found = [str(latest) if latest.exists() else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def harmless_checkpoint(folder: Path) -> str | None:
    """:func:`latest_checkpoint` after a look into it: Composer unpickles it as a whole, which would run code in it.

    Raises:
        ConfigError: It would.
    """
    path = latest_checkpoint(folder)
    problem: list[str | None] = [None]
    if path is not None and dist.get_global_rank() == 0:  # which hands it to the ranks that cannot see it
        try:
            check_harmless(path)
        except ValueError as error:
            problem[0] = str(error)
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ConfigError(
            f"run.folder must hold checkpoints of weights and numbers to go on from: {problem[0]}. "
            f"Set run.name to start another run, or put a checkpoint that you trust in its place."
        )
    return path
