"""Computes what a run costs: FLOPs, hours on a GPU, speed of the input, for ``plan`` and ``bench``."""
