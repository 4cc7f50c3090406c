"""Losses of supervised training. All take logits (B, K) and soft targets (B, K) and return a scalar.

They are computed in float32 even where autocast hands over bfloat16 or float16 logits; float64 stays float64.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vitcomposer.losses.precision import at_least_float32


def soft_target_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy against a distribution over classes: the batch mean of ``-sum_k targets_k log softmax(logits)_k``.

    The loss of DeiT (arXiv:2012.12877) after mixup, CutMix and label smoothing, all of which are in ``targets``, whose
    rows sum to 1.
    """
    # With targets of its input's shape torch's cross-entropy takes them for distributions, not for class numbers.
    return F.cross_entropy(at_least_float32(logits), at_least_float32(targets))


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid cross-entropy against binarised targets, mean over batch and classes: DeiT III (arXiv:2204.07118).

    Every class with a target above 0 counts as present, whatever its share, so an image mixed from two has two
    positive classes. Label smoothing raises all targets above 0 and so would make every class of every image positive:
    it has to be 0 with this loss.
    """
    logits = at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(logits, (targets > 0).to(logits.dtype))


class LogitAdjustedCrossEntropy(nn.Module):
    """Softmax cross-entropy for unequal classes: Menon et al., arXiv:2007.07314, equation 10.

    The batch mean of ``-sum_k targets_k log softmax(logits + tau log pi)_k``, where ``pi_k`` is the share of class k
    among the training images. The logits by themselves, which evaluation takes, then aim at the mean of the classes'
    accuracies: at tau 1 their softmax is that of a data set in which all classes have equal shares.

    Args:
        counts: Training images of each class, (K,); a class without any counts as if it had one.
        tau: How far to correct; the paper's is 1, and 0 gives :func:`soft_target_cross_entropy`.
    """

    shift: Tensor

    def __init__(self, counts: Tensor, tau: float) -> None:
        super().__init__()
        counts = counts.double().clamp(min=1)
        self.register_buffer("shift", tau * (counts / counts.sum()).log(), persistent=False)  # (K,)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, K) and soft targets (B, K) to a scalar."""
        logits = at_least_float32(logits)
        return soft_target_cross_entropy(logits + self.shift.to(logits.dtype), targets)
