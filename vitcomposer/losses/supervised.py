"""Losses of supervised training. All take logits (B, K) and soft targets (B, K) and return a scalar.

They are computed in float32 even where autocast hands over bfloat16 or float16 logits; float64 stays float64.
"""

import torch.nn.functional as F
from torch import Tensor

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
