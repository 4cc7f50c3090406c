"""train.py with a note of the samples of every step: watched_run.py NOTES YAML [key=value ...]

Each rank appends ``{"step": 1, "ranks": 2, "ids": [...]}`` to ``NOTES/RANK.jsonl``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from composer import Callback
from composer.utils import dist

from recipes import RECIPES
from vitcomposer import config
from vitcomposer.training.fit import fit


class Samples(Callback):
    def __init__(self, notes: Path) -> None:
        self.path = notes / f"{dist.get_global_rank()}.jsonl"

    def batch_start(self, state: Any, logger: Any) -> None:
        ids = state.batch["sample_id"].tolist()
        note = {"step": state.timestamp.batch.value + 1, "ranks": dist.get_world_size(), "ids": ids}
        with self.path.open("a") as file:
            file.write(json.dumps(note) + "\n")


def main(argv: list[str]) -> int:
    os.environ.setdefault("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    notes, path, *overrides = argv
    cfg = config.load(path, overrides)
    trainer = RECIPES[cfg.recipe].build(cfg)
    trainer.state.callbacks.append(Samples(Path(notes)))
    return fit(trainer, cfg)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
