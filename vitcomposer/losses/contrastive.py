"""InfoNCE over all ranks: SimCLR's (arXiv:2002.05709) and MoCo-v3's (arXiv:2104.02057).

MoCo-v3's is written from the paper; its code is under a non-commercial licence and was not used.

Shapes: B images of this rank, V views of each, W ranks, D width of the embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcomposer.collectives import gather, gather_with_gradient, rank_and_world_size
from vitcomposer.losses.precision import at_least_float32


def info_nce(*views: Tensor, temperature: float) -> Tensor:
    """SimCLR's NT-Xent (eq. 1): the mean over this rank's anchors of ``-log(positive / (positive + negatives))``.

    An anchor's positive is another view of its image, its negatives are all views of all other images of all ranks,
    which get a gradient from here too. With more than two views, the mean is over all ordered pairs of views of an
    image.

    Args:
        views: Two or more embeddings (B, D), not normalised; row b of each is a view of image b. B is the same on all
            ranks, and there are at least two images.
        temperature: 0.1 in the paper.

    Returns:
        A scalar, float32 or wider; the mean over all ranks is that of the global batch.
    """
    # bfloat16 holds cosines near 1 in steps of 0.004, which a temperature of 0.1 makes steps of 0.04 in the logits.
    with torch.autocast(views[0].device.type, enabled=False):
        own = torch.stack([_unit(view) for view in views])  # (V, B, D)
        num_views, batch, width = own.shape
        everyone = gather_with_gradient(own)  # (W, V, B, D)
        rank, world_size = rank_and_world_size()
        images = torch.arange(world_size * batch, device=own.device).view(world_size, 1, batch)  # (W, 1, B)
        # (V * B, W * V * B): neither an anchor itself nor another view of its image is a negative.
        same_image = images[rank].expand(num_views, -1).reshape(-1, 1) == images.expand(-1, num_views, -1).reshape(-1)
        similarity = own.view(-1, width) @ everyone.reshape(-1, width).T / temperature  # (V * B, W * V * B)
        negatives = similarity.masked_fill(same_image, -torch.inf).logsumexp(dim=1).view(num_views, 1, batch)
        positives = torch.einsum("vbd,ubd->vub", own, own) / temperature  # (V, V, B)
        # Eq. 1 is -log(e^p / (e^p + e^n)) with n the log-sum-exp of the negatives, which is softplus(n - p).
        losses = F.softplus(negatives - positives).mean(dim=-1)  # (V, V)
        pairs = num_views * (num_views - 1)
        # The diagonal pairs a view with itself.
        return (losses.sum() - losses.diagonal().sum()) / pairs


def moco_contrastive(queries: Tensor, keys: Tensor, *, temperature: float) -> Tensor:
    """MoCo-v3's contrastive loss of one direction (Algorithm 1): its own key among the keys of the global batch.

    Times ``2 * temperature``, as in the paper. The other view's direction is a call of its own; the loss is the sum of
    the two.

    Args:
        queries: (B, D), not normalised.
        keys: (B, D) from the momentum encoder, not normalised; they get no gradient. B is the same on all ranks.
        temperature: 0.2 in the paper.

    Returns:
        A scalar, float32 or wider: the mean over this rank's queries.
    """
    with torch.autocast(queries.device.type, enabled=False):
        all_keys = gather(_unit(keys)).flatten(0, 1)  # (W * B, D)
        logits = _unit(queries) @ all_keys.T / temperature  # (B, W * B)
        # The keys of this rank stand behind those of the ranks before it.
        labels = torch.arange(len(queries), device=queries.device) + len(queries) * rank_and_world_size()[0]
        return 2 * temperature * F.cross_entropy(logits, labels)


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(at_least_float32(embeddings), dim=-1)
