"""Loads trained classifiers from wherever they lie: a run folder, a checkpoint, an exported folder, a yaml."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from vitcomposer import config
from vitcomposer.data.mds.index import CLASS_NAMES
from vitcomposer.errors import ConfigError, require
from vitcomposer.json_file import read_json, to_block
from vitcomposer.models import build_model, load_weights
from vitcomposer.models.trunks import Trunk
from vitcomposer.models.weights.averages import averaging_window, better_weights, saved_weights
from vitcomposer.models.weights.formats import model_tensors
from vitcomposer.models.weights.load import read_checkpoint
from vitcomposer.models.weights.published import follow_weights, local_weights
from vitcomposer.origins import EXPORTED
from vitcomposer.runs import layout
from vitcomposer.runs.identity import read_identity
from vitcomposer.runs.metrics import last_evaluation
from vitcomposer.schema import Evaluation, Model, Probe, Supervised
from vitcomposer.schema.recipe import Recipe
from vitcomposer.schema.times import parse_time

Weights = Literal["auto", "raw", "ema"]
Statistics = tuple[float, float, float]

_LARGEST_SIDE = 1 << 14  # pixels, to which an exported model has images resized
_SMALL_NETWORK = 10_000_000  # weights
_PREFIX = "model."  # of the network in the task whose state a checkpoint has


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A classifier and how the images it is given are made.

    Attributes:
        network: In eval mode, float32, on the CPU.
        model: What the network was built from.
        image_size: Of evaluation, in pixels, as are ``crop_ratio`` and ``interpolation`` (see ``schema.Evaluation``).
        mean, std: Of values in [0, 1].
        class_names: In the order of the outputs, where they are known.
        source: What was loaded, for messages.
        averaged: The weights are a moving average (EMA) or that of a schedule-free optimizer.
        upright: Image files are turned by their EXIF orientation, as those of its training were; where nothing is known
            of these, they are turned.
    """

    network: nn.Module
    model: Model
    image_size: int
    crop_ratio: float
    interpolation: Literal["bicubic", "bilinear"]
    mean: Statistics
    std: Statistics
    class_names: tuple[str, ...] | None
    source: str
    averaged: bool
    upright: bool = True


@dataclass(frozen=True)
class _Saved:
    """What was found: a Trained without its network, and the weights that could fill it.

    Attributes:
        file: That the weights were read from.
        better: Which of the weights to take, and why.
    """

    facts: dict[str, Any]
    model: Model
    file: Path
    weights: dict[str, Mapping[str, Any]]  # "raw" and "ema", those there are
    better: tuple[str, str] | None = None  # where there are two


def load_trained(source: str | Path, overrides: Sequence[str] = (), *, weights: Weights = "auto") -> Trained:
    """Load a trained classifier without running code from its file.

    Args:
        source: A run folder, a checkpoint in one, a folder of ``vitcomposer export``, or a yaml of the recipe
            ``supervised`` or ``distill`` whose ``init.weights`` fill the whole network, head included.
        overrides: ``key=value`` on the yaml of the run; another ``model.image_size`` resizes the positions.
        weights: ``auto`` takes the better of the trained weights and their average, see
            ``averages.better_weights``, and says so on stderr; where there is one kind alone, that.

    Raises:
        ConfigError: Overrides or a configuration that cannot be used.
        ValueError: No classifier there, a file that is unsafe, damaged or of another network, or no such weights.
    """
    saved = _find(Path(source), overrides)
    kind, why = saved.better or (next(iter(saved.weights)), None)
    if weights == "auto" and why is not None:
        print(f"note: {why}", file=sys.stderr)
    kind = kind if weights == "auto" else weights
    if kind not in saved.weights:
        raise ValueError(f"{saved.facts['source']} must hold {_MISSING[kind]}")
    return _build(saved, kind)


def load_each(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Trained]:
    """All that :func:`load_trained` finds in one source: ``raw``, ``ema`` or both."""
    saved = _find(Path(source), overrides)
    return {kind: _build(saved, kind) for kind in saved.weights}


_MISSING = {
    "ema": "a started average (EMA), it has none. Use the raw weights.",
    "raw": "the raw weights, it holds nothing but their average, which is what such a run learns. Use weights ema.",
}


def _build(saved: _Saved, kind: str) -> Trained:
    source = saved.facts["source"]
    # A network that is a little too large is told what it lacks; one that is far too large would never be built.
    most_weights = 4 * sum(tensor.numel() for tensor in model_tensors(saved.weights[kind])[0].values()) + _SMALL_NETWORK
    try:
        network = build_model(**saved.model.options(), most_weights=most_weights)
        report = load_weights(network, saved.weights[kind], min_matched=1, origin=saved.file)
    except ValueError as error:
        raise ValueError(str(error) if source in str(error) else f"{source}: {error}") from error
    absent = [*report.missing, *report.replaced_heads]
    if absent:
        raise ValueError(
            f"{source} must fill the whole of {saved.model.name} with model.num_classes={saved.model.num_classes}, it "
            f"lacks {', '.join(absent[:3])} or has them in another shape. Give the model the classes it was trained on."
        )
    size, patch = saved.facts["image_size"], getattr(network, "patch_size", 1)
    require(
        size % patch == 0, "evaluation.image_size", f"divisible by {patch}", size, f"Use {-(-size // patch) * patch}."
    )
    if isinstance(network, Trunk):
        network.require_size(size, "evaluation.image_size")
    return Trained(network=network.eval(), model=saved.model, averaged=kind == "ema", **saved.facts)


def _find(source: Path, overrides: Sequence[str]) -> _Saved:
    if source.is_dir() and all((source / name).is_file() for name in EXPORTED):
        return _exported(source, overrides)
    if source.is_dir() and not (source / ".metadata").is_file():  # which a checkpoint of shares has
        if not (source / layout.CONFIG).is_file():
            raise ValueError(
                f"{source} must be a run folder (config.yaml, checkpoints) or a folder of `vitcomposer export` "
                f"({', '.join(EXPORTED)}); it is neither."
            )
        return _of_run(source, source / layout.LATEST_CHECKPOINT, overrides)
    if source.suffix in (".yaml", ".yml"):
        return _of_yaml(source, overrides)
    if not source.exists():
        raise ValueError(f"There is no {source}. Give a run folder, a checkpoint in one, an exported folder or a yaml.")
    run = source.parent.parent
    if not (run / layout.CONFIG).is_file():
        raise ValueError(
            f"{source} must lie in the folder checkpoints of a run, whose config.yaml says what it is. "
            f"Name the network in a yaml instead: give YAML init.weights={source}"
        )
    return _of_run(run, source, overrides)


def _of_run(run: Path, file: Path, overrides: Sequence[str]) -> _Saved:
    cfg = _load_config(run / layout.CONFIG, overrides)
    if not file.exists():
        raise ValueError(
            f"{run} must hold {file.relative_to(run)}, it has no checkpoint yet. Train on, or name a file."
        )
    recorded = run / layout.CLASS_NAMES
    names = _names_in(recorded) if recorded.is_file() else _names_of_data(cfg)
    source = str(run if file == run / layout.LATEST_CHECKPOINT else file)
    return _saved(cfg, file, source, names, trained_upright(cfg, run))


def _of_yaml(path: Path, overrides: Sequence[str]) -> _Saved:
    cfg = _load_config(path, overrides)
    if cfg.init.weights is None:
        raise ConfigError(
            f"init.weights must be the file of the trained network for {path}, got None. Add init.weights=FILE, or "
            "give the folder of a run instead of a yaml."
        )
    cfg, line = follow_weights(cfg)
    if line is not None:
        print(line, file=sys.stderr)
    assert cfg.init.weights is not None
    return _saved(cfg, local_weights(cfg.init.weights), cfg.init.weights, _names_of_data(cfg), trained_upright(cfg))


def _load_config(path: Path, overrides: Sequence[str]) -> Supervised:
    cfg = config.load(path, overrides)
    if isinstance(cfg, Supervised):
        return cfg
    if isinstance(cfg, Probe):
        raise ValueError(
            f"{path} must be of a run that trains one classifier, it is a linear probe: many heads, whose accuracies "
            "its summary.json has. For a classifier train the head alone: recipe supervised with init.train_blocks=0."
        )
    raise ValueError(
        f"{path} must be of a run that trains a classifier, the recipe {cfg.recipe} has no classes. Train them on its "
        "features: train.py yamls/probe_linear.yaml init.weights=CHECKPOINT"
    )


def _names_of_data(cfg: Supervised) -> list[str] | None:
    """Of the data set that the configuration names, where it is here and has as many classes as the model."""
    for split in (cfg.data.val_split, cfg.data.train_split):
        path = Path(cfg.data.local or "", split, CLASS_NAMES)
        if cfg.data.local and path.is_file():
            names = _names_in(path)
            return names if len(names) == cfg.model.num_classes else None
    return None


def trained_upright(cfg: Recipe, run: Path | None = None) -> bool:
    """Whether the images of a run were turned by EXIF, by what it noted down or by its data; True if nothing tells."""
    recorded = None if run is None else (read_identity(run) or {}).get("images", {}).get("train")
    images = recorded
    if images is None:
        from vitcomposer.data.mds.shards import images_of  # Streaming takes seconds to import

        images = images_of(cfg.data, cfg.data.train_split)
    return images is None or images["source"] != "mds" or images.get("exif") == "apply"


def _saved(cfg: Supervised, file: Path, source: str, names: list[str] | None, upright: bool) -> _Saved:
    facts = {
        "image_size": cfg.evaluation.image_size or cfg.model.image_size,
        "crop_ratio": cfg.evaluation.crop_ratio,
        "interpolation": cfg.evaluation.interpolation,
        "mean": tuple(cfg.augment.mean),
        "std": tuple(cfg.augment.std),
        "source": source,
        "upright": upright,
    }
    content = read_checkpoint(file)
    weights = _weights_in(content)
    better = _better_of(content, cfg, file) if len(weights) > 1 else None
    return _Saved(_with_names(facts, names, cfg.model), cfg.model, file, weights, better)


def _better_of(content: Mapping[str, Any], cfg: Supervised, file: Path) -> tuple[str, str]:
    """By what the run measured whose folder the file lies in, else by how long it was averaged."""
    time = content["state"]["timestamp"]["Timestamp"]
    measured = last_evaluation(file.parent.parent / layout.METRICS, time["batch"])
    # A yaml which names the file of a run in init.weights may have another EMA, or none.
    window = averaging_window(**cfg.algorithms["EMA"]) if "EMA" in cfg.algorithms else None
    done = {"ba": time["batch"], "ep": time["epoch"], "sp": time["sample"]}
    length, unit = parse_time("max_duration", cfg.max_duration)
    return better_weights(time["batch"], {**done, "dur": done[unit] / length}, measured, window)


def _weights_in(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    state = content.get("state")
    if not isinstance(state, Mapping) or "algorithms" not in state:  # a file of timm and its like
        return {"raw": content}
    return {kind: _of_network(weights) for kind, weights in saved_weights(content).items()}


def _of_network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    return own or dict(state)


def _exported(folder: Path, overrides: Sequence[str]) -> _Saved:
    if overrides:
        raise ConfigError(f"{overrides[0]!r} must be left out for {folder}, an exported model is as it is.")
    try:
        page = read_json(folder / EXPORTED[0])
    except ValueError as error:
        raise ValueError(f"{folder / EXPORTED[0]} must be what `vitcomposer export` writes: {error}.") from error
    ours = page.get("vitcomposer") if isinstance(page, dict) else None
    if not isinstance(ours, dict):
        raise ValueError(
            f"{folder / EXPORTED[0]} must have the key vitcomposer, which `vitcomposer export` writes. For a model of "
            f"timm give YAML init.weights={folder / EXPORTED[1]}"
        )
    try:
        model = to_block(Model, ours["model"])
        facts = {**_input_of(ours), "source": str(folder)}
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{folder / EXPORTED[0]} is damaged or of another version of vitcomposer ({ours.get('version')}): {error}. "
            "Export the model again."
        ) from error
    kind = "ema" if ours.get("averaged") else "raw"
    weights = read_checkpoint(folder / EXPORTED[1])
    return _Saved(_with_names(facts, page.get("label_names"), model), model, folder / EXPORTED[1], {kind: weights})


def _input_of(ours: Mapping[str, Any]) -> dict[str, Any]:
    """How the images are made for an exported model."""
    evaluation = to_block(Evaluation, ours["evaluation"])
    size, side = evaluation.image_size, 0 if evaluation.image_size is None else evaluation.image_size
    if size is None or not 0 < side / evaluation.crop_ratio <= _LARGEST_SIDE:
        raise ValueError(f"evaluation.image_size / crop_ratio must be at most {_LARGEST_SIDE} pixels, got {size!r}")
    statistics = {}
    for name in ("mean", "std"):
        values = ours[name]
        if not isinstance(values, list) or len(values) != 3 or not all(type(each) in (int, float) for each in values):
            raise ValueError(f"{name} must be three numbers, got {values!r}"[:200])
        statistics[name] = tuple(float(each) for each in values)
    if not all(each > 0 for each in statistics["std"]):
        raise ValueError(f"std must be positive, got {statistics['std']}")
    facts = {"image_size": size, "crop_ratio": evaluation.crop_ratio, "interpolation": evaluation.interpolation}
    facts["upright"] = ours.get("exif", "apply") == "apply"
    return {**facts, **statistics}


def _names_in(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} must be a list of names in JSON: {error}. Correct or delete it.") from error


def _with_names(facts: dict[str, Any], names: Any, model: Model) -> dict[str, Any]:
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{facts['source']} must name its classes in a list of texts. Mend or delete {CLASS_NAMES}.")
    if names is not None and len(names) != model.num_classes:
        raise ValueError(
            f"{facts['source']} must name its {model.num_classes} classes, {CLASS_NAMES} or label_names has "
            f"{len(names)}. Mend or delete them."
        )
    return {**facts, "class_names": None if names is None else tuple(cast(list[str], names))}
