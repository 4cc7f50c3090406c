"""``vitcomposer cache-teacher``: stores a teacher's answers once, for all students and all epochs.

Heavy imports stay inside the functions, as in ``vitcomposer.cli``.
"""

import argparse
import os
from typing import Any

from vitcomposer.errors import ConfigError, require
from vitcomposer.schema import Distill


def add_command(commands: Any) -> None:
    """Add ``cache-teacher`` to the subcommands of a parser."""
    parser = commands.add_parser("cache-teacher", description=_run.__doc__)
    parser.add_argument("yaml", help="of the recipe distill")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.local=FOLDER")
    parser.add_argument("--crop-sets", type=int, required=True, help="views of each image; call again for more")
    help_text = "logits that are stored of a view, or all (default: 10, or all of fewer classes)"
    parser.add_argument("--top-k", help=help_text)
    help_text = "folder or s3://bucket/prefix (default: cache.local of the yaml, else data.local with -teacher)"
    parser.add_argument("--out", help=help_text)
    parser.add_argument("--seed", type=int, help="of the views (default: that of the yaml)")
    help_text = "views that the teacher of a rank sees at once (default: %(default)s)"
    parser.add_argument("--batch-size", type=int, default=256, help=help_text)
    parser.add_argument("--shard-images", type=int, help="of one shard (default: 16384, or as many as make 64 MB)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Run the teacher of a yaml over K augmented views of every training image and store its highest logits.

    On several GPUs: torchrun --nproc-per-node 8 -m vitcomposer cache-teacher ..., or composer -n 8 -m vitcomposer
    cache-teacher ... Call again after a crash: finished shards are kept.
    """
    # torchrun sets GROUP_RANK where Composer's own launcher sets NODE_RANK.
    os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    from vitcomposer import config

    cfg = config.load(args.yaml, args.overrides)
    require(isinstance(cfg, Distill), "recipe", "distill", cfg.recipe, "Use a yaml with a teacher.")
    top_k = args.top_k or str(min(10, cfg.model.num_classes))
    require(top_k == "all" or top_k.isdecimal(), "--top-k", "a number of classes, or all", top_k, "10 is usual.")
    from vitcomposer.errors import ShardError
    from vitcomposer.runs.devices import with_precision
    from vitcomposer.teacher.writer import write_cache

    try:
        write_cache(
            with_precision(cfg),
            args.out or (cfg.cache.local if cfg.cache else f"{cfg.data.local}-teacher"),
            crop_sets=args.crop_sets,
            top_k=None if top_k == "all" else int(top_k),
            seed=args.seed,
            batch_size=args.batch_size,
            shard_images=args.shard_images,
        )
    except ShardError as error:
        raise ConfigError(str(error)) from error
    return 0
