"""Cross-entropy between views, for SwAV and DINO: the target of one view is learned by all other views of the image."""

from collections.abc import Sequence

from torch import Tensor


def cross_view_entropy(targets: Tensor, logits: Tensor, target_views: Sequence[int]) -> Tensor:
    """Mean over the pairs of a target's view and another view of ``-sum_k target_k log softmax(logits)_k``.

    The sum over the other views is taken once over all views, less the one, which saves a pass over (B, K) per pair.

    Args:
        targets: (A, B, K), rows that sum to 1.
        logits: (V, B, K), divided by their temperature.
        target_views: Which of the V views each of the A targets belongs to.

    Returns:
        A scalar in the dtype of ``logits``.
    """
    # -sum_k q_k log softmax(l)_k = logsumexp(l) - sum_k q_k l_k, as q sums to 1. So a sum over views needs no more than
    # the product of q with the sum of their l.
    normalizers = logits.logsumexp(dim=-1)  # (V, B)
    sum_of_logits, sum_of_normalizers = logits.sum(dim=0), normalizers.sum(dim=0)  # (B, K), (B,)
    total = logits.new_zeros(())
    for target, view in zip(targets, target_views, strict=True):
        matched = (target * (sum_of_logits - logits[view])).sum(dim=-1)  # (B,)
        total = total + (sum_of_normalizers - normalizers[view] - matched).mean()
    return total / (len(target_views) * (len(logits) - 1))
