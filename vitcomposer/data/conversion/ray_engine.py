"""Converts on a Ray cluster, or on a local Ray: one task per part, then the merge."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from vitcomposer.data.conversion.left_out import MAX_BAD_FRACTION, check_fraction
from vitcomposer.data.conversion.parts import check_part, convert_part, merge
from vitcomposer.data.conversion.sources import Item, Source
from vitcomposer.data.conversion.write import Progress, begin, counted


def convert_with_ray(
    source: Source,
    out: str | Path,
    count: int,
    *,
    workers: int | None = None,
    on_progress: Progress | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    **plan: Any,
) -> dict[str, Any]:
    """Write a data set as ``count`` tasks of one core each; called again it makes what is missing.

    The cluster is the one of ``RAY_ADDRESS``; without it Ray runs on this machine alone, with ``workers`` processes.
    Every node needs this package, and the images and ``out`` under the same paths. ``plan`` is ``shard_size``, ``seed``
    and ``stored`` of :func:`vitcomposer.data.convert`, whose result and errors this has too.

    Raises:
        ChildProcessError: Ray lost a task for good.
    """
    check_part(0, count)
    check_fraction(max_bad_fraction)
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise ValueError("--engine ray needs Ray. Install it with: pip install 'vitcomposer[ray]'") from error
    _, chunks = begin(source, out, **plan)  # one plan before all tasks, and its errors before Ray starts
    images = [sum(len(chunk.items) for chunk in chunks[index::count]) for index in range(count)]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        ray.init(address="local", num_cpus=workers, include_dashboard=False, _node_ip_address="127.0.0.1")
    try:
        options = {**plan, "max_bad_fraction": max_bad_fraction}
        listed = ray.put((source, source.splits))
        task = ray.remote(_make_part)
        waiting = {task.remote(listed, os.fspath(out), index, count, options): images[index] for index in range(count)}
        progress = counted(on_progress, sum(images))
        progress(0)
        while waiting:
            (ready,), _ = ray.wait(list(waiting))
            ray.get(ready)
            progress(waiting.pop(ready))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ChildProcessError(f"Ray lost a part: {error}. Call again to continue.") from error
    finally:
        ray.shutdown()
    return merge(out, max_bad_fraction)


def _make_part(
    listed: tuple[Source, dict[str, list[Item]]], out: str, index: int, count: int, options: dict[str, Any]
) -> None:
    source, source.splits = listed  # a source travels without its lists
    convert_part(source, out, index, count, workers=1, **options)
