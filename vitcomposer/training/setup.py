"""Starts the ranks, seeds them and shares the batch out over them."""

import ctypes
import dataclasses
import sys
from typing import TypeVar

from composer.utils import dist, reproducibility

from vitcomposer.data.workers import choose_workers, here
from vitcomposer.errors import ConfigError, require
from vitcomposer.escape import message
from vitcomposer.models.weights.published import follow_weights
from vitcomposer.runs.devices import current_device, with_precision
from vitcomposer.runs.folder import (
    check_folders,
    initialize_dist,
)
from vitcomposer.schema import SelfSupervised
from vitcomposer.schema.ranks import check_ranks
from vitcomposer.schema.recipe import Recipe
from vitcomposer.training.execution import (
    check_execution,
)

_Recipe = TypeVar("_Recipe", bound=Recipe)

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """What the machine adds to a configuration."""

    device: str  # "gpu" or "cpu"
    world_size: int
    device_train_batch_size: int  # images per rank and step
    device_eval_batch_size: int


def prepare(cfg: _Recipe) -> tuple[_Recipe, BatchShare]:
    """Start the process group, seed every generator and share the batch out over the ranks.

    Returns:
        The configuration with the precision and the loader workers that this machine has for ``auto``, and what a
        rank gets of the batch.

    Raises:
        ConfigError: A batch that the ranks cannot share, or a precision that the device does not have.
    """
    initialize_dist(cfg.run.dist_timeout)
    cfg = _follow(cfg)
    check_folders(cfg)
    device = current_device()
    cfg = with_precision(cfg)
    remedy = "Add precision=auto, or run on a GPU."
    require(device == "gpu" or cfg.precision == "fp32", "precision", "fp32 on a CPU", cfg.precision, remedy)
    reproducibility.seed_all(cfg.seed)
    if device == "cpu":
        keep_freed_memory()
    ranks = dist.get_world_size()
    check_ranks(cfg, ranks, dist.get_local_world_size())
    train = cfg.global_train_batch_size
    evaluate = cfg.evaluation.global_batch_size or train
    of_rank = train // ranks
    check_execution(cfg.run, device=device, device_batch_size=of_rank, algorithms=cfg.algorithms, world_size=ranks)
    share = BatchShare(
        device=device,
        world_size=ranks,
        device_train_batch_size=of_rank,
        device_eval_batch_size=evaluate // ranks,
    )
    return _with_workers(cfg, share), share


def _with_workers(cfg: _Recipe, share: BatchShare) -> _Recipe:
    """The configuration with a number of loader workers for ``auto``, the same on all ranks, which is said once."""
    if isinstance(cfg.data.num_workers, int):
        return cfg
    ahead = cfg.data.prefetch_factor
    place = here(node=dist.get_node_rank(), prefetch_factor=ahead, batch_bytes=_batch_bytes(cfg, share))
    chosen = choose_workers(dist.all_gather_object(place), gpu=share.device == "gpu")
    if dist.get_global_rank() == 0 and cfg.run.output == "text":
        print(f"data.num_workers={chosen.count}: {chosen.reason}", file=sys.stderr)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, num_workers=chosen.count))


def _batch_bytes(cfg: Recipe, share: BatchShare) -> int:
    """Of the images of one batch of a rank, of training or of evaluation, whichever is larger."""
    pixels = cfg.crops.pixels if isinstance(cfg, SelfSupervised) else cfg.model.image_size**2
    evaluated = (cfg.evaluation.image_size or cfg.model.image_size) ** 2
    return 3 * max(share.device_train_batch_size * pixels, share.device_eval_batch_size * evaluated)


def _follow(cfg: _Recipe) -> _Recipe:
    """What the images take from published weights, said on one line."""
    try:
        cfg, line = follow_weights(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if line is not None and dist.get_global_rank() == 0:
        print(message(line))
    return cfg


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of large tensors instead of giving it back to the system after every use.

    Each page that comes back costs a fault, 0.4 ms for the float32 of one image of 224 pixels as measured, as much as
    normalising it. The process keeps its peak. Other libraries of C have no mallopt and change nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
