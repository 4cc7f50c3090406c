"""One rank of a group in which nobody answers rank 0: it should end by its time-out. For benchmarks.step.gpu_runs.

python -m benchmarks.step.silent_rank RANK RANKS SECONDS cuda|cpu FILE
"""

import sys
import time
from datetime import timedelta

import torch
from torch import distributed

MEETING = 60.0  # seconds that the ranks have to start
CYCLES_PER_SECOND = 2_000_000_000  # of a GPU, or somewhat fewer


def main(rank: int, ranks: int, seconds: float, device: str, file: str) -> None:
    """Meet the others once; then rank 0 asks again and the others sleep, or the only GPU is busy for long."""
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=MEETING),
    )
    if device == "cuda":
        torch.cuda.set_device(rank)
    one = torch.ones(1, device=device)
    distributed.all_reduce(one)
    assert one.item() == ranks
    group = distributed.new_group(timeout=timedelta(seconds=seconds))
    distributed.all_reduce(one, group=group)
    print("all are here", flush=True)
    if rank:
        time.sleep(20 * seconds)
        return
    if ranks == 1:
        torch.cuda._sleep(int(3 * seconds * CYCLES_PER_SECOND))
    distributed.all_reduce(one, group=group)
    print(one.item())  # waits for the GPU


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5])
