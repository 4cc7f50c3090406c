"""The folder of one run: whether it holds this run, how far it is, and the checkpoint that it goes on from."""

import dataclasses
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

from vitcomposer import config, folder_lock
from vitcomposer.checkpoint_folder import has_checkpoints, newest_whole, ranks_and_step
from vitcomposer.data.run_store import bring_back
from vitcomposer.schema import ConfigError

# What a resumed run may change: how long, where the data lies, how it is read and what is printed.
FREE_ON_RESUME = ("max_duration", "data", "run", "evaluation", "cache.local", "cache.remote")


def current_device() -> str:
    """What Composer calls the device of this rank."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def initialize_dist(timeout: float = 600) -> None:
    """Start the process group unless it runs; ``timeout`` is how many seconds a rank waits for the others."""
    if not dist.is_initialized():
        dist.initialize_dist(current_device(), timeout=timeout)


def run_folder(cfg: Any) -> Path:
    """The folder that tells the whole story of one run."""
    return Path(cfg.run.folder) / cfg.run.name


_new: set[Path] = set()  # folders that were not there when this process took their lock


def lock_run_folder(cfg: Any) -> bool:
    """Make this process the only one that writes the run folder; returns whether it was not before. For rank 0.

    Raises:
        ConfigError: Another process writes there.
    """
    folder = run_folder(cfg)
    numbered = (f"{cfg.run.name}_{number}" for number in range(2, 1 << 20))
    free = next(name for name in numbered if not folder.with_name(name).exists())
    is_new = not folder.exists()
    try:
        taken = folder_lock.acquire(folder_lock.beside(folder), str(folder), f"set run.name={free}")
    except OSError:  # whether the folder itself can be written is looked at later
        return False
    if taken and is_new:
        _new.add(folder)
    return taken


def unlock_run_folder(cfg: Any) -> None:
    """Give back what :func:`lock_run_folder` took; a start that was refused before its first step leaves nothing."""
    folder = run_folder(cfg)
    if folder in _new:
        _new.remove(folder)
        metrics = folder / "metrics.jsonl"
        has_lines = metrics.is_file() and metrics.stat().st_size > 0
        if not has_lines and not has_checkpoints(folder / "checkpoints") and not (folder / "summary.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
    folder_lock.release(folder_lock.beside(folder))


@contextmanager
def only_writer_of_run(cfg: Any) -> Iterator[None]:
    """Hold the lock of the run folder, on all ranks or on none.

    Raises:
        ConfigError: On all ranks, where another process writes there.
    """
    taken = False
    problem: list[str | None] = [None]
    if dist.get_global_rank() == 0:
        try:
            taken = lock_run_folder(cfg)
        except ConfigError as error:
            problem[0] = str(error)
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ConfigError(problem[0])
    try:
        yield
    finally:
        if taken:
            unlock_run_folder(cfg)


def already_finished(cfg: Any) -> bool:
    """Whether the run folder holds this run, complete; its lock is held from here on, see :func:`unlock_run_folder`.

    Raises:
        ConfigError: The folder holds another run, which this one would overwrite, or another process writes there.
    """
    initialize_dist(cfg.run.dist_timeout)
    # Rank 0 looks and tells: other nodes need not see its disk, and all ranks must take the same way.
    answer: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            lock_run_folder(cfg)
            if cfg.run.remote is not None:
                here = newest_whole(run_folder(cfg) / "checkpoints").path
                name = None if here is None else here.name
                bring_back(cfg.run.remote, run_folder(cfg), keep=cfg.run.keep_checkpoints, here=name)
            answer[0] = _look_at_run_folder(cfg)
        except ConfigError as error:
            answer[0] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ConfigError(answer[0])
    return bool(answer[0])


def _look_at_run_folder(cfg: Any) -> bool:
    folder = run_folder(cfg)
    if not (folder / "config.yaml").is_file():
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


def goes_on(cfg: Any) -> bool:
    """Whether rank 0 sees a checkpoint that this run goes on from."""
    found = [dist.get_global_rank() == 0 and newest_whole(run_folder(cfg) / "checkpoints").path is not None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def checkpoint_to_load(folder: Path) -> str | None:
    """The run's newest whole checkpoint, said on one line, after a look into it: loading it could run code in it.

    Composer's own autoresume dies on several nodes that share a disk: each of them removes the same signal file.

    Raises:
        ConfigError: It would.
    """
    answer: list[Any] = [None, None]  # the path, and what is wrong with it
    if dist.get_global_rank() == 0:  # which hands it to the ranks that cannot see it
        try:
            answer[0] = _choose_checkpoint(folder)
        except ValueError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    path, problem = answer
    if problem is not None:
        raise ConfigError(
            f"run.folder must hold checkpoints of weights and numbers to go on from: {problem}. "
            f"Set run.name to start another run, or put a checkpoint that you trust in its place."
        )
    return path


def _choose_checkpoint(folder: Path) -> str | None:
    found = newest_whole(folder / "checkpoints")
    said = [f"Refused {each}." for each in found.refused]
    if found.path is None:
        if found.unsafe:
            raise ValueError(found.unsafe)
        if said:
            print(f"{folder} starts from the beginning.", *said)
        return None
    if not found.digest:
        said.append("It carries no digest, as those of older versions: read by the checksums of its parts.")
    saved_by, step = ranks_and_step(found.path)
    now = dist.get_world_size()
    if saved_by != now:
        said.append(
            f"Saved by {saved_by} rank{'s' * (saved_by > 1)}, goes on with {now}: the same images in every step; "
            "rounding differs, and so does what a rank draws or pairs by itself (mixing, drop path)."
        )
    print(f"{folder} goes on after step {step}.", *said)
    return str(found.path)


def check_folders(cfg: Any) -> None:
    """Refuse folders that cannot be written, before anything is read; all ranks have to call it.

    Raises:
        ConfigError: On all ranks, for ``run.folder`` seen from rank 0 or for the cache ``data.local`` on any node.
    """
    problem = None
    if dist.get_global_rank() == 0:
        problem = _unwritable("run.folder", cfg.run.folder, run_folder(cfg), "Set run.folder to one that is.")
    if problem is None and cfg.data.remote is not None and dist.get_local_rank() == 0:
        remedy = "It caches data.remote: set data.local to one that is."
        problem = _unwritable("data.local", cfg.data.local, Path(cfg.data.local), remedy)
    problem = next((each for each in dist.all_gather_object(problem) if each), None)
    if problem is not None:
        raise ConfigError(problem)


def _unwritable(key: str, given: str, folder: Path, remedy: str) -> str | None:
    trial = folder / f".writable-{uuid.uuid4().hex}"
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            trial.write_bytes(bytes(4096))
        finally:
            trial.unlink(missing_ok=True)
        if is_new:  # a run that is refused later leaves nothing
            with suppress(OSError):
                folder.rmdir()
    except OSError as error:
        return f"{key} must be a folder that can be written, got {given!r}: {_why(error)}. {remedy}"
    return None


def _why(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)
