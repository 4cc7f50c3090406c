"""Builds trained classifiers to learn from, ours and timm's, filled from a file to the last tensor and frozen."""

from os import PathLike
from typing import Any

import torch
from torch import nn

from vitcomposer.errors import did_you_mean
from vitcomposer.models import build_model, load_weights, model_names
from vitcomposer.schema.model import TIMM
from vitcomposer.stores.weights import how_to_get


def build_teacher(
    name: str, weights: str | PathLike[str], *, num_classes: int, image_size: int, **options: Any
) -> nn.Module:
    """A frozen classifier in evaluation mode: images (B, 3, image_size, image_size) to logits (B, num_classes).

    Args:
        name: One of ``model_names()``, else one of timm's; ``timm/<name>`` is built for ``image_size``, to which
            positions are resized.
        weights: As ``load_weights`` reads them, without running code in the file. All of the network has to be in it.
        options: Of ``build_model``, or of that network of timm.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another name, option, size or number of classes than those of the weights; keys are ``teacher.*``.

    Example:
        >>> build_teacher("regnety_160", "weights/regnety_160-a5fe301d.pth", num_classes=1000, image_size=224)
    """
    teacher = build_teacher_network(name, num_classes=num_classes, image_size=image_size, **options)
    _fill(teacher, weights, name, num_classes)
    teacher.requires_grad_(False).eval()
    _set_image_size(teacher, name, num_classes, image_size)
    return teacher


def build_teacher_network(name: str, *, num_classes: int, image_size: int, **options: Any) -> nn.Module:
    """The network of :func:`build_teacher`, with new weights; those of timm are of the size that their name says.

    Raises:
        ValueError: A name or an option that neither we nor timm know.
    """
    if name.startswith(TIMM):
        options = {"arguments": options}
    if name.startswith(TIMM) or name in model_names():
        try:
            return build_model(name, num_classes=num_classes, image_size=image_size, **options)
        except ValueError as error:
            said = str(error).replace("model.name", "teacher.name").replace("model.image_size", "teacher.image_size")
            raise ValueError(said.replace("model.", "teacher.options.")) from error
    import timm  # all its models: a second that a teacher of ours does not take

    if not timm.is_model(name):
        known = [*model_names(), *timm.list_models()]
        hint = did_you_mean(name, known) or f" See {', '.join(model_names())}, or timm.list_models()."
        raise ValueError(f"teacher.name must be one of our models or of timm's, got {name!r}.{hint}")
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"teacher.options must be arguments of timm.create_model({name!r}), got {options}. It says: {error}"
        ) from error


def _fill(teacher: nn.Module, weights: str | PathLike[str], name: str, num_classes: int) -> None:
    try:
        report = load_weights(teacher, weights, min_matched=1.0)
    except FileNotFoundError as error:
        remedy = how_to_get(str(weights), "teacher.weights")
        raise FileNotFoundError(f"teacher.weights must be a file, got {str(weights)!r}. {remedy}") from error
    except ValueError as error:
        said = str(error).replace("model.", "teacher.options.")
        raise ValueError(f"teacher.weights must hold the weights of {name}. {said}") from error
    if report.replaced_heads:
        raise ValueError(
            f"teacher.weights must have the {num_classes} classes of model.num_classes, but {weights} has another "
            f"number in {', '.join(report.replaced_heads)}. Choose a teacher of the same classes."
        )
    missing = sorted(teacher.state_dict().keys() - set(report.loaded))
    for names, what in ((missing, "lacks"), (report.unexpected, "also holds")):
        if names:
            raise ValueError(
                f"teacher.weights must hold the weights of {name} and nothing else, but {weights} {what} "
                f"{len(names)} tensors: {', '.join(names[:3])}. Choose the teacher.name it was made with."
            )


def _set_image_size(teacher: Any, name: str, num_classes: int, image_size: int) -> None:
    try:
        # timm's transformers refuse images of another size than they were made for until they are told.
        if hasattr(teacher, "set_input_size"):
            teacher.set_input_size((image_size, image_size))
        with torch.no_grad():
            shape = tuple(teacher(torch.zeros(1, 3, image_size, image_size)).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"teacher.image_size must be one that {name} takes, got {image_size}. It says: {error}"
        ) from error
    if shape != (1, num_classes):
        raise ValueError(
            f"teacher.name must be a classifier of {num_classes} classes, but {name} returns {shape} for an image."
        )
