"""Train a recipe: composer -n 8 train.py yamls/deit_s.yaml [key=value ...]"""

import os
import sys

from vitcomposer import config
from vitcomposer.schema import ConfigError


def main(argv: list[str]) -> int:
    """Load the yaml, build the recipe's Trainer and fit.

    Returns:
        0 when the run is finished (also if it already was), 2 for a configuration that cannot run, 143 when a signal
        stopped it after a checkpoint: the same command then goes on from there.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    # torchrun sets GROUP_RANK where Composer's own launcher sets NODE_RANK.
    os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    try:
        cfg = config.load(argv[0], argv[1:])
        # Composer takes seconds to import: a typo is reported before that.
        from recipes import RECIPES
        from vitcomposer.report import write_report
        from vitcomposer.run_folder import already_finished, run_folder
        from vitcomposer.trainer import fit

        if already_finished(cfg):
            print(f"{cfg.run.folder}/{cfg.run.name} is already done: {cfg.max_duration}. Raise max_duration to go on.")
            return 0
        trainer = RECIPES[cfg.recipe].build(cfg)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = fit(trainer, cfg)
    if os.environ.get("RANK", "0") == "0":
        write_report(run_folder(cfg))
    return status


if __name__ == "__main__":
    # Composer's remote uploader spawns processes that import this file.
    sys.exit(main(sys.argv[1:]))
