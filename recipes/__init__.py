"""The only table from a recipe's name in a yaml to code. A recipe's ``build(cfg)`` returns a ready composer.Trainer."""

from recipes import dino, distill, knn, moco, probe, simclr, supervised, swav

RECIPES = {
    "supervised": supervised,
    "distill": distill,
    "probe": probe,
    "knn": knn,
    "swav": swav,
    "simclr": simclr,
    "moco": moco,
    "dino": dino,
}
