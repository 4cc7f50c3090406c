"""A trained classifier for use in other programs: ``vitcomposer.load("runs/photos").predict(images)``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vitcomposer.data.batch import Sample
from vitcomposer.data.files import ImageFiles
from vitcomposer.data.jpeg.pixels import eight_bits
from vitcomposer.data.jpeg.raw import raw_of
from vitcomposer.data.jpeg.upright import exif_orientation, turned
from vitcomposer.data.labels import IGNORE_LABEL
from vitcomposer.errors import require
from vitcomposer.evaluation.inference import run_network
from vitcomposer.evaluation.trained import Trained, Weights, load_trained

Picture = str | Path | Image.Image | NDArray[Any] | Tensor


class Prediction(NamedTuple):
    """What a classifier says about one image, the most probable class first."""

    classes: tuple[str, ...]  # their names, or numbers as text where the model has no names
    probabilities: tuple[float, ...]  # of these


class Classifier:
    """A trained classifier that is ready to answer, made by :func:`load`.

    It sees what the evaluation of its run saw: the same decoder, centre crop, size and normalisation, and images turned
    upright by EXIF as those of its training were.

    Attributes:
        trained: The network, in eval mode on ``device``, and how its images are made.
        class_names: In the order of the network's outputs.
        device: Where the network runs.
    """

    def __init__(self, trained: Trained, device: str) -> None:
        self.trained, self.device = trained, device
        self.class_names = trained.class_names or tuple(map(str, range(trained.model.num_classes)))
        trained.network.to(device)

    def predict(
        self, images: Picture | Sequence[Picture], *, top_k: int | None = None, batch_size: int = 64
    ) -> list[Prediction]:
        """Classify images.

        Args:
            images: One or several: a path; a Pillow image; an array, uint8 (height, width, 3) or (height, width); a
                tensor, uint8 or float in [0, 1], (3, height, width). A fourth dimension in front is that of several.
            top_k: Classes that are given of each image; None gives five, or all where there are fewer.
            batch_size: Images that the network sees at once.

        Returns:
            One prediction for each image, in their order.

        Raises:
            ValueError: An image that cannot be read or has another shape or type, which the message names, or a
                ``top_k`` that is not from 1 to the number of classes.
        """
        most = len(self.class_names)
        top_k = min(5, most) if top_k is None else top_k
        require(1 <= top_k <= most, "top_k", f"from 1 to {most}, the classes", top_k, "Leave it out for five.")
        require(batch_size >= 1, "batch_size", "1 or more", batch_size, "64 is usual.")
        samples = _Given(_several(images), self.trained.upright)
        if not len(samples):
            return []
        how: dict[str, Any] = {"device": self.device, "batch_size": batch_size, "workers": 0}
        found: list[Prediction] = []
        for answers in run_network(self.trained.network, samples, self.trained, **how):
            for at, reason in answers.broken.items():
                raise ValueError(f"{samples.describe(at)} cannot be read: {reason}")
            best = answers.outputs.softmax(dim=1).topk(top_k, dim=1)  # (n, top_k) each
            for shares, outputs in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found.append(Prediction(tuple(self.class_names[output] for output in outputs), tuple(shares)))
        return found


def load(
    source: str | Path, overrides: Sequence[str] = (), *, weights: Weights = "auto", device: str | None = None
) -> Classifier:
    """Load a trained classifier, without running code from its file.

    Args:
        source: A run folder, a checkpoint in one, a folder of ``vitcomposer export``, or a yaml with ``init.weights``.
        overrides: ``key=value`` on the yaml of the run, such as ``evaluation.image_size=384``.
        weights: ``raw``, ``ema``, or ``auto`` for the better of the two, which is said on stderr.
        device: Such as ``cuda:1``; None is a GPU where there is one.

    Raises:
        ValueError: As ``evaluation.trained.load_trained``.

    Example:
        >>> model = vitcomposer.load("runs/photos")
        >>> for prediction in model.predict(["cat.jpg", "dog.jpg"], top_k=1):
        ...     print(prediction.classes[0], prediction.probabilities[0])
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Classifier(load_trained(source, overrides, weights=weights), chosen)


class _Given(Dataset[Sample]):
    """Images in memory and files as samples, in their order; each is made when it is asked for."""

    def __init__(self, images: Sequence[Picture], upright: bool) -> None:
        self._images, self._upright = images, upright

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, at: int) -> Sample:
        image = self._images[at]
        if isinstance(image, str | Path):
            return {**ImageFiles([str(image)], upright=self._upright)[0], "sample_id": at}
        try:
            encoded: Any = raw_of(_pixels(image, self._upright))
        except ValueError as error:
            encoded = error
        return {"image": encoded, "label": IGNORE_LABEL, "sample_id": at}

    def describe(self, at: int) -> str:
        """What an image is called in a message."""
        image = self._images[at]
        return str(image) if isinstance(image, str | Path) else f"image {at}"


def _several(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    if isinstance(images, np.ndarray | Tensor):
        return list(images) if images.ndim == 4 else [images]
    return [images] if isinstance(images, str | Path | Image.Image) else images


def _pixels(image: Any, upright: bool) -> NDArray[np.uint8]:
    """RGB, uint8 (height, width, 3)."""
    if isinstance(image, Image.Image):
        orientation = exif_orientation(image) if upright else 1
        return _rgb(turned(np.asarray(eight_bits(image)), orientation))
    if isinstance(image, Tensor) and image.ndim == 3 and len(image) == 3:
        values = image.detach().cpu()
        if values.is_floating_point():
            if not bool(((values >= 0) & (values <= 1)).all()):
                raise ValueError("a tensor of floats must lie in [0, 1], not normalised")
            values = (values.float() * 255).round().to(torch.uint8)
        if values.dtype == torch.uint8:
            return _rgb(values.permute(1, 2, 0).numpy())
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        return _rgb(image)
    kind = f"{type(image).__name__}" + (f" {image.dtype} {tuple(image.shape)}" if hasattr(image, "shape") else "")
    raise ValueError(
        "it must be a path, a Pillow image, a uint8 array (height, width, 3) or (height, width), or a tensor "
        f"(3, height, width) of uint8 or floats in [0, 1], got {kind}"
    )


def _rgb(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"it must have three channels and at least one pixel, its shape is {pixels.shape}")
    return np.ascontiguousarray(pixels)
