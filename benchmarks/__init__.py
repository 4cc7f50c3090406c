"""Measurements of speed, memory, accuracy and robustness, in folders by subject; results lie in ``results``.

They run from the checkout, such as ``python -m benchmarks.input --help``:

- ``input``: images per CPU second of the input path against peers; ``input.end_to_end`` goes through train.py
- ``step``: training steps against timm's on a CPU; ``step.gpu``: on a GPU, with the parts of a step;
  ``step.torches``: under several versions of torch in turn
- ``accuracy.photos``, ``accuracy.against_timm``: accuracy and cost of the recipes on small real data;
  ``accuracy.first_hour``: one's own photographs against timm's train.py and ``yolo classify``, on equal CPU time
- ``speedrun``: who reaches a given accuracy in the least time; rules, entries and the harness that checks them
- ``distill.step``, ``distill.small``: what a teacher costs, and what a small student gains from one
- ``scale``: several ranks against one, and the order of the samples over many
- ``faults``, ``faults.fuzz``: what a user sees of each fault; damaged images, indexes and shards
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
