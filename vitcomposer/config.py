"""From a yaml and ``key=value`` overrides to a frozen dataclass. The only file that knows OmegaConf."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from vitcomposer.origins import LATEST, RECORDED, recorded_model, recorded_page, take_over
from vitcomposer.schema import CONFIGS, ConfigError, Run, did_you_mean, expand_home
from vitcomposer.schema.credentials import variable_within

# What ``${oc.env:NAME}`` may read: where a job runs and where its files lie. A run keeps its configuration, so
# everything else of the environment stays out of it; the shell can write any other value into a key by itself.
# fmt: off
ENVIRONMENT = frozenset({
    "DATA", "DATASETS", "HOME", "HOSTNAME", "SCRATCH", "TMPDIR", "USER", "WORK", "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NUM_NODES", "SLURM_TMPDIR", "PBS_JOBID",
    "PBS_JOBNAME", "LSB_JOBID", "JOB_ID", "SKYPILOT_TASK_ID",
})
# fmt: on


def load(path: str | Path, overrides: Iterable[str] = ()) -> Any:
    """Read a recipe's yaml, apply overrides and return its frozen dataclass (:mod:`vitcomposer.schema`).

    Args:
        path: A yaml with a ``recipe`` key.
        overrides: ``dotted.key=value`` strings; values are parsed as yaml (``1e-3`` is a float, ``null`` is None).

    Raises:
        ConfigError: The first key that is unknown, missing, of the wrong type or out of range.
    """
    with _environment_behind_a_list():
        return _load(path, overrides)


def _load(path: str | Path, overrides: Iterable[str]) -> Any:
    path = expand_home(path, "The yaml")
    page = _read(Path(path))
    changes = _parse_overrides(overrides)
    schema = _schema_of(OmegaConf.merge(page, changes), path)
    _take_over_model(page, changes, Path(path))
    base = OmegaConf.merge(OmegaConf.structured(schema), {"run": {"name": Path(path).stem}})
    merged = _merge(_merge(base, page, str(path)), changes, "the command line")
    try:
        _check_secrets(OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, str(path))) from error
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"{missing[0]} is required and missing in {path}. Add it to the yaml. All missing: {missing}")
    try:
        return expand_home(OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, str(path))) from error


def to_yaml(cfg: Any) -> str:
    """The whole configuration as yaml text that :func:`load` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


@contextmanager
def _environment_behind_a_list() -> Iterator[None]:
    """``${oc.env:NAME}`` reads the variables of ENVIRONMENT alone, however the reference is written or nested."""
    OmegaConf.register_resolver("oc.env", _variable, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)


def _variable(name: str, *default: Any) -> Any:
    if name not in ENVIRONMENT:
        raise ConfigError(
            f"A yaml must not read the environment variable {name}, which the run folder would keep. "
            f"It may read {', '.join(sorted(ENVIRONMENT))}; have the shell write any other value: key=$NAME."
        )
    return oc.env(name, *default)


def _check_secrets(value: Any, key: str = "") -> None:
    """Refuse what would carry a credential of the environment into config.yaml, logs and reports."""
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        for name, entry in entries:
            _check_secrets(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and (name := variable_within(value)):
        raise ConfigError(
            f"{key} must not hold the value of the environment variable {name}: the run folder would keep it. "
            "Leave it in the environment, where the object stores' clients look for it."
        )


def _take_over_model(page: DictConfig, changes: DictConfig, path: Path) -> None:
    """Give the page the architecture of the run, or of the exported model, whose weights it starts from.

    What the command line says of it stays, and is compared with the weights as they are loaded. A run that goes on has
    its own record of it: the folder that it started from may be gone.
    """
    merged = OmegaConf.merge(page, changes)
    try:
        weights = OmegaConf.select(merged, "init.weights")
        folder = OmegaConf.select(merged, "run.folder", default=Run.folder)
        own = Path(str(folder), str(OmegaConf.select(merged, "run.name", default=path.stem)))
    except OmegaConfBaseException:  # reported where the whole configuration is resolved
        return
    model = page.get("model")
    if not isinstance(weights, str) or not isinstance(model, DictConfig):
        return
    if path.name == RECORDED and OmegaConf.select(changes, "init.weights") is None:
        return  # a run's own page, which says what its network became
    weights, own = expand_home(weights, "init.weights"), expand_home(own, "run.folder")
    started = recorded_page(own / LATEST)
    same = isinstance(started.get("init"), dict) and started["init"].get("weights") == weights
    recorded = recorded_model(own / LATEST if same else weights)
    if recorded:
        measured_as_it_is = page.get("recipe") in ("probe", "knn")
        page.model = take_over(OmegaConf.to_container(model), recorded, size=measured_as_it_is)  # pyright: ignore


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        near = sorted(p.as_posix() for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"There is no yaml at {path}.{did_you_mean(path.as_posix(), near)}")
    try:
        page = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not readable yaml: {error}. Mend the line it names.") from error
    if not isinstance(page, DictConfig):
        raise ConfigError(
            f"{path} must hold keys and values, got a {type(page).__name__}. Start with recipe: supervised."
        )
    return page


def _parse_overrides(overrides: Iterable[str]) -> DictConfig:
    overrides = list(overrides)
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key.strip() or key.startswith("-"):
            raise ConfigError(f"An override must read key=value, got {text!r}. Write it like max_duration=100ep.")
    return OmegaConf.from_dotlist(overrides)


def _schema_of(page: Any, path: str | Path) -> type:
    name = page.get("recipe") if isinstance(page, DictConfig) else None
    if name not in CONFIGS:
        hint = did_you_mean(str(name), CONFIGS)
        raise ConfigError(f"recipe must be one of {sorted(CONFIGS)}, got {name!r} in {path}.{hint}")
    return CONFIGS[name]


def _merge(base: Any, more: DictConfig, origin: str) -> Any:
    try:
        return OmegaConf.merge(base, more)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, origin, base, more)) from error


def _explain(error: OmegaConfBaseException, origin: str, base: Any = None, more: DictConfig | None = None) -> str:
    """OmegaConf's first line says what is wrong; the full key and the origin say where."""
    key = getattr(error, "full_key", None) or _first_bad_key(base, more)
    reason = str(getattr(error, "msg", None) or error).splitlines()[0].strip()
    reason = reason.removeprefix(f"{ConfigError.__name__} raised while resolving interpolation: ")
    return f"{key or 'The configuration'} (from {origin}): {reason}"


def _first_bad_key(base: Any, more: Any, prefix: str = "") -> str:
    """The deepest key whose value alone cannot be merged: some of OmegaConf's errors do not name theirs."""
    for key in more if isinstance(more, DictConfig) else ():
        try:
            OmegaConf.merge(base, {key: more[key]})
        except OmegaConfBaseException:
            below = base[key] if isinstance(base, DictConfig) and key in base else None
            deeper = _first_bad_key(below, more[key], f"{prefix}{key}.") if isinstance(below, DictConfig) else ""
            return deeper or f"{prefix}{key}"
    return ""
