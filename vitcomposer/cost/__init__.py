"""What a run costs: FLOPs, hours on a GPU, speed of the input; behind ``plan`` and ``bench``."""
