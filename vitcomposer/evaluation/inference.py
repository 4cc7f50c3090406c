"""Runs a trained network over images, batch by batch: for ``predict``, ``embed`` and ``vitcomposer.load``."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitcomposer.data.augment.transforms import EvalTransform
from vitcomposer.data.batch import Sample
from vitcomposer.data.files import crop_loader
from vitcomposer.evaluation.trained import Trained


class Answers(NamedTuple):
    """Of one batch: why some of its samples cannot be read, and what the network makes of the others."""

    sample_ids: list[int]  # of the sound ones, in the order of the rows of outputs
    broken: dict[int, str]  # by sample_id
    outputs: Tensor  # float32 (n, ...)


def run_network(
    network: Callable[[Tensor], Tensor],
    samples: Dataset[Sample],
    trained: Trained,
    *,
    device: str,
    batch_size: int,
    workers: int,
    bf16: bool = False,
) -> Iterator[Answers]:
    """Give a network the crops of evaluation, in order.

    Args:
        network: Normalised images (B, 3, S, S) to outputs (B, ...), on ``device``.
        samples: Such as ``ImageFiles``.
        trained: Says how crops are made.
        bf16: Run it under autocast to bfloat16.
    """
    normalize = EvalTransform(trained.mean, trained.std)
    loader = crop_loader(
        samples,
        image_size=trained.image_size,
        crop_ratio=trained.crop_ratio,
        interpolation=trained.interpolation,
        batch_size=batch_size,
        workers=workers,
    )
    for batch in loader:
        ids, broken = batch["sample_id"].tolist(), dict(batch["broken"])
        with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            outputs = network(normalize({"image": batch["image"].to(device)})["image"])
        sound = [row for row in range(len(ids)) if row not in broken]
        faults = {ids[row]: reason for row, reason in broken.items()}
        yield Answers([ids[row] for row in sound], faults, outputs.float()[sound])
