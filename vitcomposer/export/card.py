"""Writes the README.md of an exported model: what it is, what it was measured at, how to use it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vitcomposer import __version__
from vitcomposer.escape import for_markdown

_PAPERS = {
    "vit_": "An Image is Worth 16x16 Words (arXiv:2010.11929)",
    "deit_": "Training data-efficient image transformers and distillation through attention (arXiv:2012.12877)",
    "deit3_": "DeiT III: Revenge of the ViT (arXiv:2204.07118)",
    "convit_": "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases (arXiv:2103.10697)",
    "resnet": "Deep Residual Learning for Image Recognition (arXiv:1512.03385)",
}
_NAMED = 20  # classes that the card lists; config.json has all

_LYING = {
    "apply": "Photographs are turned upright by their EXIF orientation (Pillow's `ImageOps.exif_transpose`).",
    "keep": "EXIF orientation is ignored.",
}

_TIMM = """\
```python
import json

import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # FOLDER: where this file is

# The same by name, and from the file alone:
page = json.load(open("FOLDER/config.json"))
overlay = dict(page["pretrained_cfg"], file="FOLDER/model.safetensors")
model = timm.create_model(page["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, **page["model_args"])

model = timm.create_model(page["architecture"], num_classes=page["num_classes"], **page["model_args"]).eval()
timm.models.load_checkpoint(model, "FOLDER/model.safetensors")

transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
```
"""
_OURS = """\
```
vitcomposer eval FOLDER --data DATA
vitcomposer predict FOLDER IMAGES
train.py YAML init.weights=FOLDER/model.safetensors
```
"""
_ONNX = """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
(logits,) = session.run(["logits"], {"images": images})  # float32 (batch, 3, SIZE, SIZE), prepared as above
```
"""
_PROGRAM = """\
```python
import torch

model = torch.export.load("FOLDER/model.pt2").module()
logits = model(images)  # float32 (batch, 3, SIZE, SIZE), prepared as above
```
"""


def write_card(
    page: Mapping[str, Any],
    *,
    parameters: int,
    files: Mapping[str, float],
    metrics: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """The text of the card.

    Args:
        page: The content of config.json.
        files: Of each model file the largest difference of its logits from the network's.
        metrics: ``summary.json`` of the run, or nothing.
        notes: Sentences about this model, in Markdown.
    """
    ours = page["vitcomposer"]
    model, evaluation = ours["model"], ours["evaluation"]
    name, size = model["name"], evaluation["image_size"]
    papers = [title for prefix, title in _PAPERS.items() if name.startswith(prefix)]
    library = "library_name: timm\n" if "architecture" in page else ""
    what = f"Classifies images of {size} x {size} pixels into {model['num_classes']:,} classes"
    parts = [
        f"---\n{library}tags: [image-classification, vitcomposer]\n---\n# {for_markdown(name)}\n",
        f"{what}; {parameters / 1e6:.2f} M parameters. Exported by vitcomposer {__version__}.\n",
        *(f"Architecture: {paper}.\n" for paper in papers),
        *(f"{note}\n" for note in notes),
        _classes(page.get("label_names")),
        _measured(metrics, averaged=ours["averaged"]),
        f"## Input\n\n{_LYING[ours['exif']]}\n"
        f"RGB in [0, 1]; shorter side to {size} / {evaluation['crop_ratio']:g} pixels "
        f"({evaluation['interpolation']}, antialiased), the centre {size} x {size} of it, "
        f"less the mean {_numbers(ours['mean'])}, divided by {_numbers(ours['std'])}.\n",
        "## Files\n\n| file | largest difference of its logits from the trained network's |\n|-|-|\n"
        + "".join(f"| {file} | {difference:.1e} |\n" for file, difference in files.items()),
        *_usage(files, size, timm="architecture" in page),
        "## Licence and citation\n\nNo licence is stated here: that of the weights is for whoever trained them to "
        "give, and the training data may have terms of their own. Cite the paper of the architecture.\n",
    ]
    return "\n".join(part for part in parts if part)


def _classes(names: Sequence[str] | None) -> str:
    if names is None:
        return ""
    more = f" and {len(names) - _NAMED:,} more, in config.json" if len(names) > _NAMED else ""
    return f"Classes, in the order of the logits: {', '.join(map(for_markdown, names[:_NAMED]))}{more}.\n"


def _measured(metrics: Mapping[str, Any], *, averaged: bool) -> str:
    suffix = "_ema" if averaged and metrics.get("top1_ema") is not None else ""
    rows = {
        "top-1": _percent(metrics.get(f"top1{suffix}")),
        "top-5": _percent(metrics.get(f"top5{suffix}")),
        "recipe": _text(metrics.get("recipe")),
        "epochs": _text(metrics.get("epochs")),
        "seed": _text(metrics.get("seed")),
        "commit of vitcomposer": _text(metrics.get("git_commit")),
    }
    if rows["top-1"] is None:
        return ""
    lines = [f"| {row} | {value} |\n" for row, value in rows.items() if value is not None]
    return "## Measured\n\nBy the run that trained it, on its validation split.\n\n| | |\n|-|-|\n" + "".join(lines)


def _percent(share: Any) -> str | None:
    return f"{100 * share:.2f} %" if isinstance(share, int | float) else None


def _text(value: Any) -> str | None:
    return None if value is None else for_markdown(str(value))


def _numbers(values: Sequence[float]) -> str:
    return json.dumps(list(values))


def _usage(files: Mapping[str, float], size: int, *, timm: bool) -> list[str]:
    texts = {"model.safetensors": f"{_TIMM}\n{_OURS}" if timm else _OURS, "model.onnx": _ONNX, "model.pt2": _PROGRAM}
    parts = [text.replace("SIZE", str(size)) for file, text in texts.items() if file in files]
    return ["## Use\n", *parts]
