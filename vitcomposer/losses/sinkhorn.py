"""Sinkhorn-Knopp over the samples of all ranks: prototype scores to codes that use every prototype alike."""

import torch
import torch.distributed as dist
from torch import Tensor

from vitcomposer.collectives import all_reduce
from vitcomposer.losses.precision import at_least_float32


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Codes of this rank's samples: entropic optimal transport (arXiv:2006.09882, eq. 3 to 5).

    ``exp(scores / epsilon)`` of the samples of all ranks is scaled, ``iterations`` times, first so that every
    prototype has the same share, then so that every sample has. Works on logarithms, so that no score is too large for
    any ``epsilon``. All ranks have to call it; they exchange ``1 + iterations`` vectors of length K.

    Args:
        scores: (B, K) of this rank's samples and all prototypes; B may differ between ranks.
        epsilon: Smaller is closer to one prototype per sample; 0.05 in the paper.
        iterations: At least 1; 3 in the paper.

    Returns:
        (B, K) in float32, or float64 for float64 scores. Every row sums to 1; the sums over all samples of all ranks
        are equal in the limit of many iterations.
    """
    log_codes = at_least_float32(scores) / epsilon  # (B, K)
    # The largest entry of every prototype becomes exp(0). That scales rows alone, as the first step below does anyway.
    log_codes = log_codes - all_reduce(log_codes.amax(dim=0), dist.ReduceOp.MAX)
    for _ in range(iterations):
        # At most the number of samples and, here and in every later step, at least 1 / K: a column is only ever
        # scaled up after its prototype had its full share. So this neither overflows nor becomes 0.
        share = all_reduce(log_codes.exp().sum(dim=0))  # (K,)
        # First every prototype to one share, then every sample to 1: the diagonal scalings of eq. 5.
        log_codes = (log_codes - share.log()).log_softmax(dim=1)
    return log_codes.exp()
