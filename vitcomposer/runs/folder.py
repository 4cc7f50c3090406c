"""Opens the folder of a run: whether it holds this run, how far it is, and the checkpoint that it is resumed from."""

import hashlib
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from composer.utils import dist

from vitcomposer import config, folder_lock
from vitcomposer.data.jpeg import RESIZE
from vitcomposer.data.mds.shards import images_of, read_class_names
from vitcomposer.errors import ConfigError
from vitcomposer.runs import layout
from vitcomposer.runs.checkpoints import has_checkpoints, newest_whole, ranks_and_step, remove
from vitcomposer.runs.devices import current_device
from vitcomposer.runs.identity import difference, plain, read_identity
from vitcomposer.runs.metrics import read_object
from vitcomposer.runs.remote import DOWNLOADED, restore_remote
from vitcomposer.schema.recipe import Recipe
from vitcomposer.whole_files import PARTIAL, set_aside

# What a resumed run may change: how long, where the data lies, how it is read and what is printed.
FREE_ON_RESUME = ("max_duration", "data", "run", "evaluation", "cache.local", "cache.remote")

# What a kill leaves of files that were being written, and of downloads from run.remote.
_UNFINISHED = (f"*{PARTIAL}", f".*{PARTIAL}*", f"*{DOWNLOADED}")
_UNFINISHED += (f"{layout.CHECKPOINTS}/*{PARTIAL}", f"{layout.CHECKPOINTS}/*{DOWNLOADED}", f"{layout.BEST}/*{PARTIAL}")


def initialize_dist(timeout: float = 600) -> None:
    """Start the process group unless it runs; ``timeout`` is how many seconds a rank waits for the others."""
    if not dist.is_initialized():
        dist.initialize_dist(current_device(), timeout=timeout)


def run_folder(cfg: Recipe) -> Path:
    """The folder that tells the whole story of one run."""
    return Path(cfg.run.folder) / cfg.run.name


_new: set[Path] = set()  # folders that were not there when this process took their lock


def lock_run_folder(cfg: Recipe) -> bool:
    """Make this process the only one that writes the run folder; returns whether it was not before. For rank 0.

    Raises:
        ConfigError: Another process writes there.
    """
    folder = run_folder(cfg)
    is_new = not folder.exists()
    try:
        taken = folder_lock.acquire(folder_lock.beside(folder), str(folder), f"set run.name={_free_name(cfg)}")
    except OSError:  # whether the folder itself can be written is looked at later
        return False
    if taken and is_new:
        _new.add(folder)
    if taken:  # whoever wrote these is dead
        for pattern in _UNFINISHED:
            for left in folder.glob(pattern):
                remove(left)
    return taken


def _free_name(cfg: Recipe) -> str:
    folder = run_folder(cfg)
    numbered = (f"{cfg.run.name}_{number}" for number in range(2, 1 << 20))
    return next(name for name in numbered if not folder.with_name(name).exists())


def unlock_run_folder(cfg: Recipe) -> None:
    """Give back what :func:`lock_run_folder` took; a start that was refused before its first step leaves nothing."""
    folder = run_folder(cfg)
    if folder in _new:
        _new.remove(folder)
        metrics, summary = folder / layout.METRICS, folder / layout.SUMMARY
        has_lines = metrics.is_file() and metrics.stat().st_size > 0
        if not has_lines and not has_checkpoints(folder / layout.CHECKPOINTS) and not summary.exists():
            shutil.rmtree(folder, ignore_errors=True)
    folder_lock.release(folder_lock.beside(folder))


@contextmanager
def only_writer_of_run(cfg: Recipe) -> Iterator[None]:
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


def already_finished(cfg: Recipe) -> bool:
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
                here = newest_whole(run_folder(cfg) / layout.CHECKPOINTS).path
                name = None if here is None else here.name
                restore_remote(cfg.run.remote, run_folder(cfg), keep=cfg.run.keep_checkpoints, here=name)
            answer[0] = _look_at_run_folder(cfg)
        except ConfigError as error:
            answer[0] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ConfigError(answer[0])
    return bool(answer[0])


def _look_at_run_folder(cfg: Recipe) -> bool:
    """Whether the run that the folder holds is complete.

    Raises:
        ConfigError: It is another one.
    """
    folder = run_folder(cfg)
    old = _recorded_config(folder)
    if old is None:
        return False
    changed = _changed_keys(old, plain(cfg))
    if changed:
        key, before, after = changed[0]
        more = "" if len(changed) == 1 else f" (and {len(changed) - 1} more: {', '.join(c[0] for c in changed[1:])})"
        raise ConfigError(
            f"{key} must be {before!r} to go on with the run in {folder}, got {after!r}{more}. "
            f"Set run.name to start another run, or delete the folder."
        )
    _compare_images(cfg)
    summary = read_object(folder / layout.SUMMARY)
    if summary is None and (folder / layout.SUMMARY).is_file():
        _set_aside(folder / layout.SUMMARY, "The run is finished again from its last checkpoint.")
    if not summary or not summary.get("finished"):
        return False
    same = old.get("max_duration", cfg.max_duration) == cfg.max_duration
    key = summary.get("stopped_by")  # patience or max_hours of the block run, which may allow more now
    return same and (key is None or old.get("run", {}).get(key) == plain(cfg)["run"].get(key))


def _recorded_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder, from config.yaml, or from identity.json where that one is damaged."""
    path, identity = folder / layout.CONFIG, read_identity(folder)
    if identity is None and (folder / layout.IDENTITY).is_file():
        _set_aside(folder / layout.IDENTITY, "Whether these are the images that the run began with is not checked.")
    content = path.read_bytes() if path.is_file() else None
    if identity is not None and (content is None or hashlib.sha256(content).hexdigest() != identity["config_sha256"]):
        if content is not None:
            _set_aside(path, f"{layout.IDENTITY} holds the same.")
        return identity["config"]
    if content is None:
        return None
    if identity is None and not _is_whole_config(content):
        _set_aside(path, "That this configuration is the one that the run began with is not checked.")
        return None
    return plain(config.load(path))


def _is_whole_config(content: bytes) -> bool:
    """Whether a config.yaml has an end: the block run is its last."""
    try:
        page = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return False
    return isinstance(page, dict) and "recipe" in page and isinstance(page.get("run"), dict)


def _set_aside(path: Path, what_follows: str) -> None:
    print(f"{path} is not as the run wrote it and is set aside as {set_aside(path).name}. {what_follows}")


def check_images(cfg: Recipe) -> dict[str, Any]:
    """What a run notes down of the images of its splits; all ranks have to call it, once the indexes are here.

    Raises:
        ConfigError: They are others than those that the run in the folder began with.
    """
    answer: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            answer[0] = _compare_images(cfg)
            _say_other_resize(run_folder(cfg))
        except ConfigError as error:
            answer[0] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], str):
        raise ConfigError(answer[0])
    return answer[0]


def _say_other_resize(folder: Path) -> None:
    identity = read_identity(folder)
    before = RESIZE if identity is None else identity.get("resize", "Pillow 12")
    if before != RESIZE and has_checkpoints(folder / layout.CHECKPOINTS):
        print(
            f"{folder} began with the resize of {before}; from here on it is that of {RESIZE}: training crops that "
            "lose more than twice as many rows as columns differ, in one value of seven and mostly by 1 of 255."
        )


def _compare_images(cfg: Recipe) -> dict[str, Any]:
    """By split, what the run began with, and what is here of the others."""
    folder = run_folder(cfg)
    recorded = (read_identity(folder) or {}).get("images", {})
    before = recorded or _images_of_older_run(folder)
    found = {}
    for split in ("train", "val"):
        name = cfg.data.split_name(split)
        now = images_of(cfg.data, name)
        found[split] = recorded.get(split) or now
        was = before.get(split)
        differing = difference(was, now) if was and now else None
        if differing is not None:
            key, old, new = differing
            place = f" in {cfg.data.local}/{name}" if cfg.data.source == "mds" else ""
            raise ConfigError(
                f"{key} must lead to the images of the run in {folder}, whose split {split} has {old}, got "
                f"{new}{place}. Set run.name={_free_name(cfg)} to use these, or name those, which may lie anywhere."
            )
    return found


def _images_of_older_run(folder: Path) -> dict[str, Any]:
    """What a run that noted nothing down tells of its images: the names of their classes."""
    try:
        names = read_class_names(folder / layout.CLASS_NAMES)
    except ConfigError:
        return {}
    return {} if names is None else {"train": {"source": "mds", "samples": None, "classes": names, "index": None}}


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


def resumes(cfg: Recipe) -> bool:
    """Whether rank 0 sees a checkpoint that this run goes on from."""
    found = [dist.get_global_rank() == 0 and newest_whole(run_folder(cfg) / layout.CHECKPOINTS).path is not None]
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
    found = newest_whole(folder / layout.CHECKPOINTS)
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


def check_folders(cfg: Recipe) -> None:
    """Refuse folders that cannot be written, before anything is read; all ranks have to call it.

    Raises:
        ConfigError: On all ranks, for ``run.folder`` seen from rank 0 or for the cache ``data.local`` on any node.
    """
    problem = None
    if dist.get_global_rank() == 0:
        problem = _unwritable("run.folder", cfg.run.folder, run_folder(cfg), "Set run.folder to one that is.")
    if problem is None and cfg.data.remote is not None and dist.get_local_rank() == 0:
        assert cfg.data.local is not None, "the schema wants a cache for what is remote"
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
