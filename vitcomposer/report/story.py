"""Reads what a run folder tells: numbers over the run, what came out, what it ran on and how it was started."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vitcomposer import config
from vitcomposer.errors import ConfigError
from vitcomposer.json_file import read_json
from vitcomposer.runs import layout
from vitcomposer.runs.identity import plain, read_identity
from vitcomposer.runs.metrics import read_object, split_metrics
from vitcomposer.runs.predictions import Predictions, read_predictions

Line = dict[str, Any]  # of metrics.jsonl
_OVERRIDE = re.compile(r"\+?[A-Za-z_][\w-]*(\.[\w-]+)*=", re.ASCII)
EMA = "ema"  # models.weights.averages.EMA_LABEL, whose module needs torch
_NAMES = {"eval": "trained weights", EMA: "average (EMA)"}


@dataclass(frozen=True)
class Story:
    """One run. What its folder does not tell is empty or None.

    Attributes:
        lines: Of metrics.jsonl, in order.
        settings: The whole configuration by dotted key.
        images: Of each split, as identity.json has them.
        problems: What could not be read, a line each.
    """

    folder: Path
    lines: list[Line]
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    images: Mapping[str, Any]
    class_names: list[str] | None
    predictions: Mapping[str, Predictions]  # by kind of weights: eval, ema
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @property
    def finished(self) -> bool:
        """Whether it reached its last step and the evaluation there."""
        return self.summary.get("finished") is True

    @property
    def on_gpu(self) -> bool:
        """Whether it ran on GPUs; of a run that has not ended, whether its machine has some."""
        device = self.summary.get("device")
        return device != "cpu" if device is not None else bool(self.environment.get("gpus"))

    def series(self, key: str, x: str) -> tuple[list[float], list[float]]:
        """Where both are known, the values of ``x`` and of ``key`` over the run."""
        points = [(line[x], line[key]) for line in self.lines if line.get(key) is not None and line.get(x) is not None]
        return [point[0] for point in points], [point[1] for point in points]

    def last(self, key: str) -> float | None:
        """The last value of a number."""
        return next((line[key] for line in reversed(self.lines) if line.get(key) is not None), None)

    @cached_property
    def kind(self) -> str:
        """The weights that are reported: the average, unless the last evaluation found the trained ones better."""
        raw, average = self.last("metrics/eval/top1"), self.last("metrics/ema/top1")
        return EMA if average is not None and (raw is None or average >= raw) else "eval"

    @property
    def weights(self) -> str:
        """What the weights that are reported are called; empty where there is one kind alone."""
        both = self.last("metrics/ema/top1") is not None
        return _NAMES[self.kind] if both else ""

    @property
    def said(self) -> Predictions | None:
        """What the reported weights said about each image."""
        return self.predictions.get(self.kind)

    @property
    def top1(self) -> float | None:
        """Of the reported weights, at the last evaluation."""
        return self.last(f"metrics/{self.kind}/top1")

    @property
    def evaluated_images(self) -> int | None:
        """Over which accuracies are means."""
        if self.said is not None:
            return len(self.said.label)
        val = self.images.get("val")
        count = val.get("samples") if isinstance(val, dict) else None
        return count if isinstance(count, int) and count > 0 else None

    @property
    def classes(self) -> int | None:
        """That are told apart."""
        count = self.settings.get("model.num_classes")
        return count if isinstance(count, int) and count > 1 else None

    def class_name(self, label: int) -> str:
        """What a class is called, or its number."""
        names = self.class_names
        return names[label] if names is not None and label < len(names) else f"class {label}"

    def number(self, key: str) -> float | None:
        """A number of summary.json."""
        value = self.summary.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None

    @property
    def seconds(self) -> float | None:
        """Wall clock, evaluations and checkpoints with it, without the time between sessions."""
        found = self.number("seconds")
        return self.last("seconds") if found is None else found

    @property
    def ranks(self) -> int:
        """Processes, one for each GPU."""
        found = self.number("world_size") or self.environment.get("world_size")
        return found if isinstance(found, int) and found > 0 else 1

    @property
    def device_hours(self) -> float | None:
        """GPU-hours, or hours of the processes on a CPU."""
        return None if self.seconds is None else self.seconds * self.ranks / 3600


def read_story(run_folder: str | Path) -> Story:
    """Read a run folder, also one of a run that goes on or was cut off, or whose files were damaged.

    Raises:
        ValueError: The folder has no ``metrics.jsonl``.
    """
    folder = Path(run_folder)
    if not (folder / layout.METRICS).is_file():
        raise ValueError(
            f"RUN must be the folder of a run, with a metrics.jsonl, got {folder}. "
            "Give the folder that holds config.yaml."
        )
    lines, bad = split_metrics((folder / layout.METRICS).read_bytes())
    problems = [f"{folder / layout.METRICS}: {len(bad)} of its lines cannot be read and are left out."] if bad else []
    identity = read_identity(folder) or {}
    return Story(
        folder=folder,
        lines=lines,
        summary=_object(folder / layout.SUMMARY, problems),
        environment=_object(folder / layout.ENVIRONMENT, problems),
        settings=_settings(folder, identity, problems),
        images=identity.get("images") or {},
        class_names=_class_names(folder / layout.CLASS_NAMES, problems),
        predictions=_predictions(folder, problems),
        problems=problems,
    )


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    found = read_object(path)
    if found is None and path.is_file():
        problems.append(f"{path} cannot be read and is left out.")
    return found or {}


def _settings(folder: Path, identity: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """By dotted key; identity.json has them as the run read them, whatever its code has become."""
    recorded = identity.get("config")
    if isinstance(recorded, dict):
        return flat(recorded)
    path = folder / layout.CONFIG
    if not path.is_file():
        return {}
    try:
        return flat(plain(config.load(path)))
    except (ConfigError, OSError, ValueError):
        problems.append(f"{path} cannot be read and is left out.")
        return {}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings by dotted key; lists are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _class_names(path: Path, problems: list[str]) -> list[str] | None:
    if not path.is_file():
        return None
    try:
        names = read_json(path)
    except (OSError, ValueError):
        names = None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    problems.append(f"{path} cannot be read and is left out: classes have their numbers.")
    return None


def _predictions(folder: Path, problems: list[str]) -> dict[str, Predictions]:
    found = {}
    for kind, name in (("eval", layout.PREDICTIONS), (EMA, layout.PREDICTIONS_EMA)):
        try:
            read = read_predictions(folder / name)
        except ValueError as error:
            problems.append(str(error))
            continue
        if read is not None:
            found[kind] = read
    return found


def command_words(story: Story) -> tuple[str | None, list[str]]:
    """The yaml that the command of a run names, as it was typed, and its ``key=value``."""
    command = story.environment.get("command")
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return None, []
    changes = [word for word in words if _OVERRIDE.match(word) and not word.startswith("-")]
    starts = [at for at, word in enumerate(words) if Path(word).name in ("train", "train.py", "vitcomposer.train")]
    pages = [word for word in words if word.endswith((".yaml", ".yml")) and word not in changes]
    after = [word for word in words[starts[-1] + 1 :] if word not in changes and word[:1] != "-"] if starts else []
    return next(iter([*pages, *after]), None), changes


def changed_from_yaml(story: Story) -> list[tuple[str, Any, Any]] | None:
    """Keys of which the run has another value than its yaml has now, and both; None where the yaml cannot be read."""
    page, _ = command_words(story)
    if page is None or not story.settings:
        return None
    try:
        before = flat(plain(config.load(page)))
    except (ConfigError, OSError, ValueError):
        return None
    return differing(before, story.settings)


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys with different values, and both; a key that is not there has None."""
    keys = [*before, *(key for key in after if key not in before)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]
