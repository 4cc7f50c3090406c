"""Called by test_launch.py under a launcher: write down which samples this rank sees in one epoch of each split."""

import json
import os
import sys
from pathlib import Path

from recipes import RECIPES
from vitcomposer import config


def main() -> None:
    os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    out, path, *overrides = sys.argv[1:]
    cfg = config.load(path, overrides)
    trainer = RECIPES[cfg.recipe].build(cfg)
    evaluator = trainer.state.evaluators[0].dataloader.dataloader
    seen = {
        "train": [int(i) for batch in trainer.state.train_dataloader for i in batch["sample_id"]],
        "val": [int(i) for batch in evaluator for i in batch["sample_id"][batch["label"] >= 0]],
    }
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(seen))
    trainer.close()


if __name__ == "__main__":
    main()
