"""Turns a fatal error into one line that names the cause and the remedy, and stops all ranks.

A rank that fails tells the others through the store by which the process group found itself; where nobody knows a
cause, they name the rank that is silent.
"""

import contextlib
import errno
import json
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch.distributed.distributed_c10d import _get_default_store

from vitcomposer.data.mds.shards import describe_cut_shard
from vitcomposer.data.workers import number_of_workers
from vitcomposer.errors import ConfigError, NonFiniteError, SaveError, ShardError
from vitcomposer.escape import message
from vitcomposer.runs import layout
from vitcomposer.runs.checkpoints import last_step
from vitcomposer.runs.folder import run_folder
from vitcomposer.runs.typed import typed_command
from vitcomposer.schema.recipe import Recipe

FAILED, UNMENDABLE, INTERRUPTED = 1, 2, 130  # a start of the same command may help; it cannot; by Ctrl-C
SECONDS_FOR_OTHERS = 5.0  # until a rank that has not told why it ends counts as silent

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK = _FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_OTHER_RANK = re.compile(r"gloo|nccl|closed by peer|connection reset|broken pipe|recvvalue|tcpstore", re.I)
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)")
_LATE = "DataLoader timed out"
_OF_THE_CODE = (TypeError, ValueError, LookupError, AttributeError, NameError, AssertionError, ImportError)
_OF_THE_CODE += (ArithmeticError, NotImplementedError)

Report = dict[str, Any]  # status, text: the line, or None where another rank must know the cause


def explain(error: BaseException, cfg: Recipe) -> Report | None:
    """What a user can do about an error; None for one that a user cannot cause, which deserves its traceback."""
    if any(isinstance(each, KeyboardInterrupt) for each in _chain(error)):  # whatever died of it
        return {"status": INTERRUPTED, "text": _interrupted(cfg)}
    for each in _chain(error):
        if isinstance(each, ConfigError | NonFiniteError):
            return {"status": UNMENDABLE, "text": _message(each)}
        if isinstance(each, torch.OutOfMemoryError):
            return {"status": UNMENDABLE, "text": _out_of_memory(cfg)}
        if isinstance(each, OSError) and each.errno in _DISK:
            return {"status": FAILED, "text": _disk(each, cfg)}
        if isinstance(each, SaveError | ShardError):
            return {"status": FAILED, "text": _message(each)}
        if isinstance(each, RuntimeError) and (worker := _WORKER.search(str(each))):
            return {"status": FAILED, "text": _worker(worker[1], str(each), cfg)}
        if isinstance(each, RuntimeError) and _LATE in str(each):
            return {"status": FAILED, "text": _late(cfg)}
        if isinstance(each, OSError) and each.errno in (errno.EMFILE, errno.ENFILE):
            return {"status": FAILED, "text": _open_files(each, cfg)}
    return {"status": FAILED, "text": None} if _is_of_another_rank(error) else None


def _message(error: BaseException) -> str:
    """What was said, also in a loader worker: torch hands it on inside the text of its traceback."""
    kind = type(error)
    name = f"{kind.__qualname__}: " if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}: "
    text = str(error)
    return text.rpartition(name)[2].strip() if text.startswith("Caught ") else text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_another_rank(error: BaseException) -> bool:
    if dist.get_world_size() == 1:
        return False
    distributed = isinstance(error, torch.distributed.DistError)
    return distributed or (isinstance(error, RuntimeError) and _OTHER_RANK.search(str(error)) is not None)


def _again(cfg: Recipe) -> str:
    step = last_step(run_folder(cfg) / layout.CHECKPOINTS)
    if step is None:
        return "Then start the same command: it begins anew, for there is no checkpoint yet."
    return f"Then start the same command: it goes on after step {step:,}."


def _interrupted(cfg: Recipe) -> str:
    step = last_step(run_folder(cfg) / layout.CHECKPOINTS)
    if step is None:
        return f"Interrupted before the first checkpoint. Start again: {typed_command()}"
    return f"Interrupted. Go on after step {step:,}: {typed_command()}"


def _disk(error: OSError, cfg: Recipe) -> str:
    place = error.filename or run_folder(cfg)
    if error.errno in _FULL:
        return f"{place} cannot be written: {error.strerror}. What was saved before is whole. Make room. {_again(cfg)}"
    return f"{place} cannot be used: {error.strerror}. See its disk and who may write there. {_again(cfg)}"


def _worker(pids: str, text: str, cfg: Recipe) -> str:
    workers = number_of_workers(cfg.data, gpu=torch.cuda.is_available())
    if "Bus error" in text and (cut := _cut_shard(cfg)):
        return f"Loader worker {pids} has died: {cut}. It was cut while the run read it: put it back. {_again(cfg)}"
    if "Bus error" in text:
        cause = "there is no room left in /dev/shm. Enlarge it (docker run --shm-size=16g)"
    elif "Killed" in text or "exited unexpectedly" in text:
        cause = "most likely for want of memory (see dmesg) or of room in /dev/shm. Give the job more of it"
    else:
        cause = f"{text.splitlines()[0]} Look at its own error above"
    less = f", or lower data.num_workers (now {workers}) and data.prefetch_factor (now {cfg.data.prefetch_factor})"
    return f"Loader worker {pids} has died, {cause}{less}. {_again(cfg)}"


def _late(cfg: Recipe) -> str:
    return (
        f"No batch came for data.timeout, {cfg.data.timeout:g} s: a loader worker hangs, or {cfg.data.local} cannot be "
        f"reached. See what the workers wait for (py-spy dump), or raise data.timeout. {_again(cfg)}"
    )


def _open_files(error: OSError, cfg: Recipe) -> str:
    return (
        f"{error.strerror}: the limit of open files is too low for this run. Raise it (ulimit -n 65536). {_again(cfg)}"
    )


def _cut_shard(cfg: Recipe) -> str | None:
    if cfg.data.local is None:
        return None
    splits = (Path(cfg.data.local, split) for split in (cfg.data.train_split, cfg.data.val_split))
    return next((cut for cut in map(describe_cut_shard, splits) if cut), None)


def _out_of_memory(cfg: Recipe) -> str:
    share = cfg.global_train_batch_size // dist.get_world_size()
    now = cfg.run.device_train_microbatch_size or share
    less = max(1, now // 2) if isinstance(now, int) else share // 2
    return (
        f"The memory of the device does not hold a step: run.device_train_microbatch_size is {now}. Set it to {less}, "
        f"which trains the same in more passes, or use run.parallelism=fsdp2 on more devices. {_again(cfg)}"
    )


def end_together(error: BaseException, cfg: Recipe) -> int:
    """Say once, for all ranks, why the run ends, within some seconds; returns the status for this process to exit with.

    An error that nobody can explain is printed with its traceback too, by the rank that it happened on.
    """
    report = explain(error, cfg)
    if report is None:
        traceback.print_exception(error)
        # The same code meets the same value again; what a driver, a store or a library reports may pass.
        status = UNMENDABLE if isinstance(error, _OF_THE_CODE) else FAILED
        report = {"status": status, "text": f"{type(error).__name__}: {_message(error)}".splitlines()[0]}
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    interrupted = report["status"] == INTERRUPTED  # as all ranks are, and their launcher
    reports = {rank: report}
    if ranks > 1:
        # Launchers send it as soon as one rank is gone, and SIGKILL half a minute later.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        seconds = 0.0 if interrupted else SECONDS_FOR_OTHERS
        # A store whose host is gone can keep a call for ever.
        thread = threading.Thread(target=_collect_reports, args=(reports, rank, ranks, seconds), daemon=True)
        thread.start()
        thread.join(seconds + 1)
    seen = dict(reports)
    causes = {each: found for each, found in sorted(seen.items()) if found["text"]}
    if interrupted and rank == 0:
        print(f"error: {message(report['text'])}", file=sys.stderr, flush=True)
    elif not interrupted and rank == min(seen):
        line = _name_causes(causes, ranks) if causes else _name_silent(seen, ranks, error, cfg)
        print(f"error: {message(line)}", file=sys.stderr, flush=True)
    elif ranks > 1:
        time.sleep(1)  # a launcher ends all ranks with the first, which shall not be before that line
    return report["status"] if interrupted else next(iter(causes.values()), report)["status"]


def status_of_rank(status: int) -> int:
    """What this rank exits with where the run ends with ``status``.

    After Ctrl-C the first rank of a node says so for all of them: of each other one that does not exit with 0,
    Composer's launcher prints whatever it ever wrote.
    """
    return 0 if status == INTERRUPTED and dist.get_local_rank() > 0 else status


def _collect_reports(reports: dict[int, Report], rank: int, ranks: int, seconds: float) -> None:
    """Tell the other ranks and add what they tell, until all have or their time is up."""
    with contextlib.suppress(Exception):  # no store yet, or its host is gone: nobody to ask
        store: Any = _get_default_store()
        store.set(_key(rank), json.dumps(reports[rank]))
        deadline = time.monotonic() + seconds
        while len(reports) < ranks and time.monotonic() < deadline:
            for other in set(range(ranks)) - set(reports):
                if store.check([_key(other)]):
                    reports[other] = json.loads(store.get(_key(other)))
            time.sleep(0.1)


def _key(rank: int) -> str:
    return f"vitcomposer/ends/{rank}"


def _name_causes(causes: dict[int, Report], ranks: int) -> str:
    texts = list(dict.fromkeys(found["text"] for found in causes.values()))
    if len(causes) == ranks and len(texts) == 1:
        return texts[0]
    rank, found = next(iter(causes.items()))
    return f"{_place(rank)}: {found['text']}" if ranks > 1 else found["text"]


def _name_silent(reports: dict[int, Report], ranks: int, error: BaseException, cfg: Recipe) -> str:
    said = str(error).splitlines()[0].rstrip(".")
    silent = [rank for rank in range(ranks) if rank not in reports]
    if not torch.distributed.is_initialized():
        return (
            f"The {ranks} ranks did not find each other within run.dist_timeout, {cfg.run.dist_timeout:g} s: {said}. "
            "See that all were started and that MASTER_ADDR and MASTER_PORT can be reached from each node."
        )
    if not silent:
        return f"The ranks lost each other: {said}. See the network between the nodes. {_again(cfg)}"
    who = ", ".join(_place(rank) for rank in silent)
    if re.search(r"timed? ?out", str(error), re.I):
        what = f"hangs: no answer for run.dist_timeout, {cfg.run.dist_timeout:g} s. See what it waits for (py-spy dump)"
    else:
        what = "ended without a word: killed, or out of memory (see dmesg there)"
    return f"{who} {what}. {_again(cfg)}"


def _place(rank: int) -> str:
    on_node = dist.get_local_world_size()
    return f"rank {rank}" if on_node == dist.get_world_size() else f"rank {rank} (node {rank // on_node})"
