"""Writes the folder of an exported model, and compares each of its files with the network."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitcomposer import __version__
from vitcomposer.errors import require
from vitcomposer.escape import for_terminal
from vitcomposer.runs.metrics import read_object

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitcomposer.evaluation.trained import Trained
    from vitcomposer.export.timm_form import TimmForm
import contextlib
import glob
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vitcomposer.folder_lock import beside, only_writer
from vitcomposer.runs import layout
from vitcomposer.whole_files import PARTIAL

if TYPE_CHECKING:
    pass

FILES = {"safetensors": "model.safetensors", "onnx": "model.onnx", "torch-export": "model.pt2"}
CONFIG, CARD = "config.json", "README.md"
TOLERANCE = 1e-4  # of a logit in float32, whose digits end there above _LARGE
_LARGE = 100.0
_CHECKED_BATCHES = (1, 3)


def metrics_of_run(folder: Path) -> dict[str, Any]:
    """What a finished run measured at its end; nothing for any other source."""
    path = folder / layout.SUMMARY
    found = read_object(path)
    if found is None and path.is_file():
        print(f"{path} cannot be read: the model card has no accuracy.")
    found = found or {}
    return found if found.get("finished") else {}


def check_target(out: Path, *, force: bool) -> None:
    """Raise ConfigError where a folder cannot be written or holds what would be lost."""
    require(not out.exists() or out.is_dir(), "--out", "a folder", str(out), "Name another.")
    rule = "a folder of its own, this is that of a run"
    require(not (out / layout.CONFIG).exists(), "--out", rule, str(out), f"Use {out / 'export'}.")
    present = [name for name in (*FILES.values(), CONFIG, CARD) if (out / name).exists()]
    rule = f"a folder without {present[0] if present else ''}"
    require(force or not present, "--out", rule, str(out), "Name another, or add --force to replace what is there.")


def write_folder(
    trained: "Trained",
    out: Path,
    *,
    formats: Sequence[str] = ("safetensors",),
    force: bool = False,
    metrics: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, float]:
    """Write an export folder: config.json, README.md and one file per format; an earlier export is replaced whole.

    Args:
        metrics: ``summary.json`` of the run, for the card.
        notes: Sentences for the card.

    Returns:
        By file, the largest difference of its logits from those of ``trained.network``.

    Raises:
        ValueError: The target exists, a package is missing, timm has no such network, or a file answers differently.
            Nothing is left behind then.
    """
    from vitcomposer.export.card import write_card
    from vitcomposer.export.graph import check_onnx, settle
    from vitcomposer.export.timm_form import timm_form

    check_target(out, force=force)
    network, model = settle(trained.network, trained.model, trained.image_size)
    trained = dataclasses.replace(trained, network=network, model=model)
    if "onnx" in formats:
        check_onnx(network)
    form = timm_form(network, model) if "safetensors" in formats else None
    page = _page(trained, form)
    notes = [*notes, *_notes(trained, form)]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    with _staged(out, force=force) as staged:
        differences = _write_files(trained, formats, staged, page)
        card = write_card(page, parameters=parameters, files=differences, metrics=metrics or {}, notes=notes)
        (staged / CARD).write_text(card, encoding="utf-8")
        _move(staged, out)
    print(
        f"{out}: {model.name}, {model.num_classes:,} classes, {trained.image_size} px, "
        f"from {for_terminal(trained.source)}"
    )
    for file, difference in differences.items():
        size = (out / file).stat().st_size / 1e6
        print(f"  {file:<18} {size:9,.1f} MB  logits differ by {difference:.1e} at most")
    for note in notes:
        print(f"  note: {for_terminal(note)}")
    return differences


def _page(trained: "Trained", form: "TimmForm | None") -> dict[str, Any]:
    """The content of config.json: timm's keys where timm can build it, and ours."""
    size = trained.image_size
    page = {} if form is None else _page_of_timm(trained, form)
    if trained.class_names is not None:
        page["label_names"] = list(trained.class_names)
    page["vitcomposer"] = {
        "version": __version__,
        "model": trained.model.options(),
        "evaluation": {"image_size": size, "crop_ratio": trained.crop_ratio, "interpolation": trained.interpolation},
        "mean": list(trained.mean),
        "std": list(trained.std),
        "exif": "apply" if trained.upright else "keep",
        "averaged": trained.averaged,
    }
    return page


def _page_of_timm(trained: "Trained", form: "TimmForm") -> dict[str, Any]:
    size, classes = trained.image_size, trained.model.num_classes
    pretrained = {
        "input_size": [3, size, size],
        "fixed_input_size": "img_size" in form.model_args,
        "interpolation": trained.interpolation,
        "crop_pct": trained.crop_ratio,
        "crop_mode": "center",
        "mean": list(trained.mean),
        "std": list(trained.std),
        "num_classes": classes,
        "pool_size": None,
        "first_conv": form.first_conv,
        "classifier": form.head,
    }
    return {
        "architecture": form.architecture,
        "num_classes": classes,
        "num_features": trained.network.num_features,
        "global_pool": form.global_pool,
        "model_args": form.model_args,
        "pretrained_cfg": pretrained,
    }


def _notes(trained: "Trained", form: "TimmForm | None") -> list[str]:
    notes = ["The weights are the moving average over training."] if trained.averaged else []
    if trained.model.stem == "conv":
        notes.append("timm has no network with a convolutional stem: vitcomposer alone reads model.safetensors.")
    if form is not None and trained.model.combine_heads == "probabilities":
        notes.append(
            "In timm it answers with the mean of its two heads' logits; it was evaluated with the mean of their "
            "probabilities (model.combine_heads), so the best class can differ."
        )
    return notes


def _write_files(trained: "Trained", formats: Sequence[str], folder: Path, page: dict[str, Any]) -> dict[str, float]:
    (folder / CONFIG).write_text(json.dumps(page, indent=2) + "\n", encoding="utf-8")
    differences = {}
    for name in FILES:
        if name not in formats:
            continue
        path = folder / FILES[name]
        answer, expected = _write_file(trained, name, path, page)
        difference, largest = _compare(answer, expected, trained.image_size)
        differences[path.name] = difference
        tolerance = TOLERANCE * max(1.0, largest / _LARGE)
        if not difference <= tolerance:  # not a number is too large
            raise ValueError(
                f"{path.name} must give the network's logits within {tolerance:g}, they differ by {difference:.1e}, so "
                "nothing was written. Leave this --format out, or try another version of its packages."
            )
    return differences


def _write_file(
    trained: "Trained", name: str, path: Path, page: dict[str, Any]
) -> "tuple[Callable[[Tensor], Tensor], nn.Module]":
    """Write one format: what reads it again, and what that has to answer."""
    from vitcomposer.evaluation.trained import load_trained
    from vitcomposer.export import graph as export_graph
    from vitcomposer.export import timm_form as export_timm

    if name == "safetensors":
        export_timm.save_tensors(trained.network, path)
        if "architecture" not in page:
            return load_trained(path.parent).network, trained.network
        return export_timm.from_folder(path.parent), _with_mean_logits(trained)
    facts = {**page["vitcomposer"], "label_names": page.get("label_names")}
    write = export_graph.write_onnx if name == "onnx" else export_graph.write_program
    return write(trained.network, trained.image_size, path, facts), trained.network


def _with_mean_logits(trained: "Trained") -> "nn.Module":
    """The network as timm combines its heads."""
    from vitcomposer.models import build_model

    if trained.model.combine_heads != "probabilities":
        return trained.network
    network = build_model(**dataclasses.replace(trained.model, combine_heads="logits").options())
    network.load_state_dict(trained.network.state_dict())
    return network.eval()


def _compare(answer: "Callable[[Tensor], Tensor]", network: "nn.Module", image_size: int) -> tuple[float, float]:
    """The largest difference and the largest logit, over fixed inputs spread as normalised images, in two batches."""
    import torch

    generator = torch.Generator().manual_seed(0)
    difference, largest = torch.zeros(()), torch.zeros(())
    with torch.no_grad():
        for batch in _CHECKED_BATCHES:
            images = torch.randn(batch, 3, image_size, image_size, generator=generator)
            expected = network(images)
            # Of two numbers maximum takes the one that is none.
            difference = torch.maximum(difference, (answer(images) - expected).abs().max())
            largest = torch.maximum(largest, expected.abs().nan_to_num().max())
    return difference.item(), largest.item()


def _move(staged: Path, out: Path) -> None:
    """The files in place of those of an earlier export; what else is in the folder stays.

    Its config.json goes first and the new one comes last: a kill in between leaves no folder that mixes the two.
    """
    if not out.exists():
        staged.rename(out)
        return
    (out / CONFIG).unlink(missing_ok=True)
    for name in (*FILES.values(), CARD):
        if not (staged / name).exists():
            (out / name).unlink(missing_ok=True)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == CONFIG):
        os.replace(path, out / path.name)


@contextlib.contextmanager
def _staged(out: Path, *, force: bool) -> Iterator[Path]:
    """An empty folder beside ``out``, which no other export writes meanwhile; those that killed ones left go."""
    with only_writer(beside(out), str(out), "name another --out"):
        check_target(out, force=force)  # again, now that nobody else may change it
        whole = out.resolve()
        for left in whole.parent.glob(f".{glob.escape(whole.name)}.*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        staged = whole.with_name(f".{whole.name}.{os.getpid()}{PARTIAL}")
        staged.mkdir(parents=True)
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)
