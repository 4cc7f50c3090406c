"""Measures the accuracy of classifiers on labelled images: one decode of each image for all of them."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from vitcomposer.data.augment.transforms import EvalTransform
from vitcomposer.data.files import ImageSet, crop_loader
from vitcomposer.data.labeled_sets import model_classes, open_labelled_images, real_of_files
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.evaluation.trained import Trained

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model gets right. Accuracies are in [0, 1].

    Attributes:
        top5: None with up to five classes.
        loss: Mean cross-entropy of all images, as training logs it.
        class_top1: Mean of the classes' top-1, those without images aside.
        real: Share of images whose prediction is among their ReaL labels, those without such labels aside.
        labels, predictions: Outputs of the model, by image.
        bad_images: Those that could not be decoded and are in none of the others.
    """

    images: int
    bad_images: int
    top1: float
    top5: float | None
    loss: float
    class_top1: float
    real: float | None
    labels: NDArray[np.int32]
    predictions: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A data set as a model sees it; it may be measured on again and again."""

    images: ImageSet
    loader: DataLoader[Any]
    normalize: EvalTransform
    outputs: Tensor | None  # int64: of the model, by label of the data set; None where they are the same
    num_classes: int
    real: list[list[int]] | None = None  # right outputs by sample


def open_labelled(
    path: str, trained: Trained, *, split: str = "val", batch_size: int = 64, workers: int = 2, cache: str | None = None
) -> Labelled:
    """Open an MDS data set or a folder with one folder per class, with the size, crop and classes of a model.

    Once per process and data set: Streaming refuses a second reader of the same shards.

    Args:
        path: Holds the split, or is the split.
        cache: Folder for the shards of an object store.

    Raises:
        ValueError: No such data set, or classes that the model does not have.
    """
    images = open_labelled_images(path, split=split, batch_size=batch_size, cache=cache).lying(trained.upright)
    classes = trained.model.num_classes
    outputs = model_classes(images.class_names, trained.class_names, num_classes=classes, where=path)
    return Labelled(
        images=images,
        loader=crop_loader(
            images.samples,
            image_size=trained.image_size,
            crop_ratio=trained.crop_ratio,
            interpolation=trained.interpolation,
            batch_size=batch_size,
            workers=workers,
        ),
        normalize=EvalTransform(trained.mean, trained.std),
        outputs=None if outputs is None else torch.tensor(outputs),
        num_classes=classes,
    )


def with_real_labels(data: Labelled, labels: list[list[int]]) -> Labelled:
    """The data set with ReaL labels, where its files are those of ImageNet's validation split.

    Raises:
        ValueError: An MDS data set, which has no file names.
    """
    paths = data.images.paths
    if paths is None:
        raise ValueError(
            f"--real finds the labels of an image by its file name, which {data.images.name} does not keep, being MDS. "
            "Give the folder of ImageNet's validation images, one folder per class."
        )
    return replace(data, real=real_of_files(paths, labels))


def measure(
    networks: Mapping[str, nn.Module],
    data: Labelled,
    *,
    device: str | torch.device = "cpu",
    bf16: bool = False,
    max_bad_fraction: float = 0.0,
    on_images: Callable[[int], Any] | None = None,
) -> dict[str, Scores]:
    """Measure networks on the same images.

    Args:
        networks: In eval mode, on ``device``, normalised images (B, 3, S, S) to logits (B, classes).
        bf16: Run them under autocast to bfloat16.
        max_bad_fraction: Of the images, left out where they cannot be read, and named in the log.
        on_images: Told of the images of every batch when they are done.

    Raises:
        ValueError: More images than that cannot be read, or a label stands for no class.
    """
    device = torch.device(device)
    bad: set[int] = set()
    labels: list[Tensor] = []
    ids: list[Tensor] = []
    answers: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in networks}
    with torch.inference_mode():
        for batch in data.loader:
            real = batch["label"] != IGNORE_LABEL  # not the padding
            _leave_out(batch, real, data, bad, max_bad_fraction)
            if not real.any():
                continue
            images = data.normalize({"image": batch["image"].to(device, non_blocking=True)})["image"][_all(real)]
            outputs = _outputs(batch["label"][real], data)
            target = outputs.to(device)
            for name, network in networks.items():
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                    logits = network(images)
                answers[name].append(_answers(logits.float(), target))
            labels.append(outputs)
            ids.append(batch["sample_id"][real])
            if on_images is not None:
                on_images(len(outputs))
    return {name: _scores(labels, ids, parts, data, len(bad)) for name, parts in answers.items()}


def _all(chosen: Tensor) -> Any:
    """An index without a copy where everything is chosen, which is all but the last batch."""
    return slice(None) if bool(chosen.all()) else chosen


def _leave_out(batch: dict[str, Any], real: Tensor, data: Labelled, bad: set[int], max_bad_fraction: float) -> None:
    """Take the images that cannot be read out of the real ones."""
    total = data.images.num_samples
    for row, reason in batch["broken"]:
        if not real[row]:
            continue
        real[row] = False
        sample_id = int(batch["sample_id"][row])
        bad.add(sample_id)
        where = data.images.describe(sample_id)
        if len(bad) == total:
            raise ValueError(f"{where} cannot be read: {reason}. No image of {data.images.name} can: write it again.")
        if len(bad) > max_bad_fraction * total:
            share = max(0.001, math.ceil(1e4 * len(bad) / total) / 1e4)
            others = f" More than {max_bad_fraction:g} of the {total:,} images are like that." if len(bad) > 1 else ""
            raise ValueError(
                f"{where} cannot be read: {reason}.{others} Every image counts: mend it or take it away, or leave "
                f"such images out with --max-bad-fraction {share:g} or more."
            )
        log.warning("%s cannot be read: %s. It is left out.", where, reason)


def _outputs(labels: Tensor, data: Labelled) -> Tensor:
    count = data.num_classes if data.outputs is None else len(data.outputs)
    bad = labels[(labels < 0) | (labels >= count)]
    if len(bad):
        raise ValueError(
            f"{data.images.name} must have labels in [0, {count}), got {int(bad[0])}. "
            "Measure on the classes of the model."
        )
    return labels if data.outputs is None else data.outputs[labels]


def _answers(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Prediction, whether the target is among the five best, and cross-entropy, each (B,)."""
    loss = F.cross_entropy(logits, target, reduction="none")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return logits.argmax(dim=1).int(), (best == target[:, None]).any(dim=1), loss


def _scores(
    labels: list[Tensor], ids: list[Tensor], parts: list[tuple[Tensor, ...]], data: Labelled, bad_images: int
) -> Scores:
    truth = torch.cat(labels).int().numpy()
    predictions, among_five, losses = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    right = predictions.numpy() == truth
    images = np.bincount(truth, minlength=data.num_classes)
    hits = np.bincount(truth[right], minlength=data.num_classes)
    seen = images > 0
    return Scores(
        images=len(truth),
        bad_images=bad_images,
        top1=float(right.mean()),
        top5=float(among_five.double().mean()) if data.num_classes > 5 else None,
        loss=float(losses.double().mean()),
        class_top1=float((hits[seen] / images[seen]).mean()),
        real=None if data.real is None else _real(torch.cat(ids).tolist(), predictions.tolist(), data.real),
        labels=truth,
        predictions=predictions.numpy(),
    )


def _real(ids: list[int], predictions: list[int], real: list[list[int]]) -> float | None:
    right = [guess in real[at] for at, guess in zip(ids, predictions, strict=True) if real[at]]
    return sum(right) / len(right) if right else None
