"""SwAV's loss (arXiv:2006.09882): the codes of one crop, predicted from every other crop of the image.

Written from the equations; the official code is under a non-commercial licence and was not used.

Shapes: B images of this rank, W ranks, V crops of an image, A of them with codes, D width of the embedding, K
prototypes, L queue_length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitcomposer.collectives import gather, rank_and_world_size
from vitcomposer.losses.cross_view import cross_view_entropy
from vitcomposer.losses.precision import at_least_float32
from vitcomposer.losses.sinkhorn import sinkhorn


class SwAVLoss(nn.Module):
    """``1 / |A| sum_a 1 / (V - 1) sum_(v != a) mean_b -sum_k q_a log softmax(s_v / temperature)_k``.

    Eq. 2 of the paper, with every other crop (multi-crop). The codes ``q_a`` are :func:`sinkhorn` of the
    scores ``s_a`` over all ranks. With a queue, its embeddings meet the present prototypes and take part in the codes.
    The queue holds those of all ranks and every rank has the same one, in the buffer ``queue`` (A, queue_length, D),
    newest first: a checkpoint has all of it, and the number of ranks does not matter.

    Args:
        num_crops: V.
        temperature: Of the prediction; 0.1 in the paper.
        epsilon: Of the codes, see :func:`sinkhorn`.
        iterations: Of the codes, see :func:`sinkhorn`.
        crops_for_assign: The A crops, by position.
        queue_length: Embeddings kept of every crop with codes, over all ranks; 0 for no queue.
        embedding_dim: D, which only a queue needs.

    Raises:
        ValueError: Crops that are not there, or a queue without the width of what it holds.
    """

    queue: Tensor

    def __init__(
        self,
        *,
        num_crops: int,
        temperature: float,
        epsilon: float,
        iterations: int,
        crops_for_assign: Sequence[int] = (0, 1),
        queue_length: int = 0,
        embedding_dim: int = 0,
    ) -> None:
        super().__init__()
        if num_crops < 2:
            raise ValueError(f"num_crops must be at least 2, got {num_crops}: a crop is predicted from another one")
        if not crops_for_assign or not all(0 <= crop < num_crops for crop in crops_for_assign):
            raise ValueError(
                f"crops_for_assign must be crops in 0 .. {num_crops - 1}, got {list(crops_for_assign)}; "
                "use [0, 1], the two large ones"
            )
        if queue_length and embedding_dim < 1:
            raise ValueError(
                f"embedding_dim must be the head's last width for queue_length={queue_length}, got {embedding_dim}"
            )
        self.num_crops = num_crops
        self.crops_for_assign = tuple(crops_for_assign)
        self.temperature = temperature
        self.epsilon = epsilon
        self.iterations = iterations
        self.queue_length = queue_length
        if queue_length:
            self.register_buffer("queue", torch.zeros(len(self.crops_for_assign), queue_length, embedding_dim))

    def forward(
        self,
        scores: Sequence[Tensor],
        embeddings: Tensor,
        prototypes: Sequence[Tensor],
        *,
        use_queue: bool = False,
        hard: bool = False,
    ) -> Tensor:
        """The loss of this rank's images, a mean, over all prototype heads. In training the queue moves on by a batch.

        Args:
            scores: One (V * B, K) per prototype head, crop-major: row ``v * B + b`` is crop v of image b.
            embeddings: (V * B, D), normalised, in the same order; read by the queue only.
            prototypes: The weight (K, D) of each prototype head.
            use_queue: The queue takes part. It should be full: from the ``ceil(queue_length / global batch)``-th
                training step after the first on.
            hard: The most likely prototype of the codes gets all of a sample.
        """
        queued = self._queue_share() if use_queue else None
        losses = [
            self._loss_of_head(head_scores, weight, queued, hard)
            for head_scores, weight in zip(scores, prototypes, strict=True)
        ]
        if self.training and self.queue_length:
            self._enqueue(embeddings)
        return torch.stack(losses).mean()

    def _loss_of_head(self, scores: Tensor, weight: Tensor, queued: Tensor | None, hard: bool) -> Tensor:
        scores = at_least_float32(scores)
        by_crop = scores.view(self.num_crops, -1, scores.shape[-1])  # (V, B, K)
        codes = torch.stack(
            [
                self._codes(by_crop[crop], None if queued is None else queued[index], weight, hard)
                for index, crop in enumerate(self.crops_for_assign)
            ]
        )  # (A, B, K)
        return cross_view_entropy(codes, by_crop / self.temperature, self.crops_for_assign)

    @torch.no_grad()
    def _codes(self, scores: Tensor, queued: Tensor | None, weight: Tensor, hard: bool) -> Tensor:
        count = len(scores)
        if queued is not None:
            # Scores of cosines in half precision are too coarse to be divided by epsilon.
            with torch.autocast(scores.device.type, enabled=False):
                scores = torch.cat((scores, queued.to(scores.dtype) @ weight.to(scores.dtype).T))  # (B + L / W, K)
        # Entries of the queue only help to spread the samples over the prototypes: their codes are not learned from.
        codes = sinkhorn(scores, epsilon=self.epsilon, iterations=self.iterations)[:count]
        return torch.zeros_like(codes).scatter_(1, codes.argmax(dim=1, keepdim=True), 1.0) if hard else codes

    def _queue_share(self) -> Tensor:
        """This rank's part of the queue: every entry is counted by one rank."""
        rank, world_size = rank_and_world_size()
        return self.queue[:, rank::world_size]  # (A, L / W, D)

    @torch.no_grad()
    def _enqueue(self, embeddings: Tensor) -> None:
        by_crop = embeddings.detach().to(self.queue.dtype).view(self.num_crops, -1, embeddings.shape[-1])  # (V, B, D)
        newest = gather(torch.stack([by_crop[crop] for crop in self.crops_for_assign]))  # (W, A, B, D)
        newest = newest.transpose(0, 1).flatten(1, 2)  # (A, W * B, D)
        self.queue.copy_(torch.cat((newest, self.queue), dim=1)[:, : self.queue_length])
