"""Names every key of a sample and of a batch, and splits batches into microbatches."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vitcomposer.data.batch_memory import empty_batch
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.errors import ConfigError

# The columns of a batch, see losses.TeacherAnswers.
TEACHER_CLASSES = "teacher_classes"  # int32 (B, k)
TEACHER_LOGITS = "teacher_logits"  # float16 (B, k)
TEACHER_REST = "teacher_rest"  # float32 (B,)

CROPS = "crops"

Batch = dict[str, Any]  # tensors, and numpy arrays of what must stay on the host; the first dimension is the image
MIX_LAM = "mix_lam"  # float32 (B,): the share of the image's own label
MIX_BOX = "mix_box"  # int32 (B, 4): the partner's pixels in CutMix; empty in Mixup

# numpy, not tensors: Composer leaves them on the host, where the groups of equal operations are counted.
OP_CODES = "op_codes"  # int8 (B, L)
OP_VALUES = "op_values"  # float32 (B, L)
ERASE_BOX = "erase_box"  # int32 (B, 4); an empty box erases nothing
ERASE_SEED = "erase_seed"  # int64 (B,)
UNMIXED = "unmixed"  # float32 (B, 3, H, W): what was mixed

Sample = dict[str, Any]


class Source(Protocol):
    """Where samples come from: it knows their neighbours, and counts those that cannot be decoded."""

    def replace(self, samples: list[Sample], error: ValueError) -> list[Sample]:
        """Views of another sample in place of those of one."""
        ...

    def skip(self, sample: Sample, error: ValueError) -> None:
        """A sample that is left out."""
        ...

    def describe(self, sample_id: int) -> str:
        """Where a sample lies."""
        ...


def _place(source: Source | None, sample: Sample) -> str:
    sample_id = sample["sample_id"]
    return f"sample_id {sample_id}" if source is None else source.describe(sample_id)


def batch_head(samples: list[Sample], image_size: int, num_classes: int, source: Source | None = None) -> Batch:
    """A batch of evaluation with its labels checked and its images still to be filled."""
    check_labels(samples, num_classes, ignored=IGNORE_LABEL, source=source)
    return {"image": empty_batch(len(samples), image_size), **batch_labels(samples)}


def check_labels(
    samples: list[Sample], num_classes: int, ignored: int | None = None, source: Source | None = None
) -> None:
    """Raise ValueError for a label that is no class."""
    for sample in samples:
        label = sample["label"]
        if not 0 <= label < num_classes and label != ignored:
            raise ConfigError(
                f"{_place(source, sample)}: the label must be in [0, {num_classes}) for model.num_classes="
                f"{num_classes}, got {label}. Set model.num_classes to the number of classes in the data set."
            )


def batch_labels(samples: list[Sample]) -> Batch:
    """``label`` and ``sample_id`` as int64 (B,)."""
    return {key: torch.tensor([int(sample[key]) for sample in samples]) for key in ("label", "sample_id")}


def split_batch(batch: Batch, microbatch_size: int | float) -> list[Batch]:
    """Microbatches for Composer's ``DataSpec(split_batch=...)``; the last one may be smaller.

    A mixed batch is cut so that every image stays with its partner and reversing a microbatch pairs the same images
    as reversing the whole: images a..b come with their mirror B-1-b..B-1-a. Such microbatches are even: an odd
    ``microbatch_size`` is rounded down, 1 becomes 2.
    """
    if microbatch_size != int(microbatch_size) or microbatch_size < 1:
        raise ValueError(
            f"run.device_train_microbatch_size must be a whole number of images, got {microbatch_size}. "
            "Use a divisor of the device's share of global_train_batch_size."
        )
    count, size = len(batch["label"]), int(microbatch_size)
    if size >= count:
        return [batch]
    if MIX_LAM not in batch:
        return [{key: value[a : a + size] for key, value in batch.items()} for a in range(0, count, size)]
    pairs, half = max(size // 2, 1), count // 2
    spans = [(a, min(a + pairs, half)) for a in range(0, half, pairs)]
    return [{key: _join(value[a:b], value[count - b : count - a]) for key, value in batch.items()} for a, b in spans]


def _join(first: Any, second: Any) -> Any:
    return torch.cat([first, second]) if isinstance(first, Tensor) else np.concatenate([first, second])
