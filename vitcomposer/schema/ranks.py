"""Checks which batches a number of ranks can share, and says what is rounded for them."""

from vitcomposer.errors import ConfigError
from vitcomposer.schema.moco import MoCo
from vitcomposer.schema.recipe import Recipe
from vitcomposer.schema.self_supervised import SelfSupervised
from vitcomposer.schema.supervised import Supervised
from vitcomposer.schema.swav import SwAV


def check_ranks(cfg: Recipe, ranks: int, ranks_of_node: int) -> None:
    """Refuse batches that so many ranks cannot share.

    Raises:
        ConfigError: All keys that cannot be used.
    """
    train = cfg.global_train_batch_size
    problems = _share_faults("global_train_batch_size", train, ranks)
    evaluation = cfg.evaluation.global_batch_size
    if evaluation is not None:
        problems += _share_faults("evaluation.global_batch_size", evaluation, ranks)
    if not problems:
        problems += _pair_faults(cfg, train // ranks, ranks, ranks_of_node)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def _share_faults(key: str, size: int, ranks: int) -> list[str]:
    below, above = max(size // ranks, 1) * ranks, -(-size // ranks) * ranks
    choice = f"Use {below} or {above}." if below != above else f"Use {below}."
    return [f"{key} must be divisible by the {ranks} ranks, got {size}. {choice}"] if size % ranks else []


def _pair_faults(cfg: Recipe, share: int, ranks: int, ranks_of_node: int) -> list[str]:
    """Of what needs more than one image on a rank."""
    key, batch = "global_train_batch_size", cfg.global_train_batch_size
    mixing = cfg.mixing if isinstance(cfg, Supervised) else None
    if mixing is not None and (mixing.mixup_alpha > 0 or mixing.cutmix_alpha > 0) and share % 2:
        rule = f"an even number of images for each of the {ranks} ranks, since mixing pairs images"
        return [f"{key} must be {rule}, got {batch}. Use {2 * ranks * -(-share // 2)}."]
    if isinstance(cfg, MoCo):
        group = sync_bn_ranks(cfg.sync_bn, ranks, ranks_of_node)
        if share * (ranks % group or group) < 2:
            rule = "two or more images for the ranks that share a batch norm"
            return [f"{key} must be {rule}, got {batch}. Use {2 * ranks}, or sync_bn=global."]
    return []


def sync_bn_ranks(sync_bn: str | int, ranks: int, ranks_of_node: int) -> int:
    """How many neighbouring ranks share the statistics of their batch norms: VISSL's 0 is all, its -1 those of a node.

    Raises:
        ValueError: Another word or number.
    """
    named = {"none": 1, "global": ranks, 0: ranks, "node": ranks_of_node, -1: ranks_of_node}
    size = None if isinstance(sync_bn, bool) else named.get(sync_bn, sync_bn)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"sync_bn must be none, global, node or a number of ranks, got {sync_bn!r}; use global")
    return min(size, ranks)


def adjustments(cfg: Recipe, ranks: int) -> list[str]:
    """What a run changes of its configuration to fit, a line each."""
    lines = []
    if isinstance(cfg, SelfSupervised) and isinstance(cfg.sync_bn, int) and cfg.sync_bn > ranks:
        lines.append(f"sync_bn={cfg.sync_bn}: of the {ranks} ranks that there are, all share their batch norms.")
    if isinstance(cfg, SelfSupervised) and isinstance(cfg.sync_bn, int) and 1 < cfg.sync_bn < ranks:
        rest = ranks % cfg.sync_bn
        lines += [f"sync_bn={cfg.sync_bn}: of the {ranks} ranks the last {rest} are a smaller group."] if rest else []
    if isinstance(cfg, SwAV) and cfg.queue_length != cfg.loss.queue_length:
        batch = cfg.global_train_batch_size
        lines.append(
            f"loss.queue_length={cfg.loss.queue_length}: the queue keeps {cfg.queue_length}, whole batches of {batch}."
        )
    return lines
