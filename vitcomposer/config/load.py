"""Reads a yaml and ``key=value`` overrides into a frozen dataclass. The only file that knows OmegaConf.

OmegaConf answers references (``${model.image_size}``) and writes a configuration; what a value means is decided by the
type of its field (:mod:`vitcomposer.config.values`), so that a text keeps its letters and every error is reported.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from vitcomposer.config.credentials import variable_within
from vitcomposer.config.trees import Plain, Tree, find_page, is_null, read_overrides, read_page
from vitcomposer.config.values import is_mapping, read
from vitcomposer.errors import ConfigError, collect, did_you_mean, no_classes
from vitcomposer.json_file import read_json
from vitcomposer.origins import recorded_model, recorded_page, recorded_statistics, take_over
from vitcomposer.runs import layout
from vitcomposer.schema import CONFIGS, Data, Run, expand_home
from vitcomposer.schema.model import FOLLOWED
from vitcomposer.schema.recipe import Recipe
from vitcomposer.stores.hub import is_on_hub

# What ``${oc.env:NAME}`` may read: where a job runs and where its files lie. A run keeps its configuration, so
# everything else of the environment stays out of it; the shell can write any other value into a key by itself.
# fmt: off
ENVIRONMENT = frozenset({
    "DATA", "DATASETS", "HOME", "HOSTNAME", "SCRATCH", "TMPDIR", "USER", "WORK", "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NUM_NODES", "SLURM_TMPDIR", "PBS_JOBID",
    "PBS_JOBNAME", "LSB_JOBID", "JOB_ID", "SKYPILOT_TASK_ID",
})
# fmt: on


_LABELLED = ("supervised", "distill", "probe")
_MOST_NAMES = 1 << 26  # bytes


def load(
    path: str | Path,
    overrides: Iterable[str] = (),
    *,
    also: Callable[[Any], None] | None = None,
    count_classes: bool = True,
) -> Any:
    """Read a recipe's yaml, apply overrides and return its frozen dataclass (:mod:`vitcomposer.schema`).

    Args:
        path: A yaml with a ``recipe`` key, or the name of one of ours, such as ``deit_s``; a file of that name wins.
        overrides: ``dotted.key=value`` strings; the type of the key says what a value means. ``null`` removes an entry
            of ``algorithms`` or ``optimizer.options`` that the yaml has, ``{}`` empties a block.
        also: A further check, such as of the files that the configuration names. What it raises is reported together
            with the rest. It may meet a configuration that lacks keys which are wrong.
        count_classes: Off, a number of classes that is left to the data set becomes 2: the data set is not there yet.

    Raises:
        ConfigError: All keys that are unknown, missing, of the wrong type or out of range.
    """
    problems: list[str] = []
    path = find_page(Path(expand_home(path, "The yaml")))
    page = read_page(path)
    changes = read_overrides(overrides, problems)
    schema = _schema_of(page, changes, path)
    tree: Tree = {**page, "run": _with_name(page.get("run", {}), path.stem)}
    for key, value in changes:
        _apply(schema, tree, key, value, problems)
    with _environment_behind_a_list():
        tree = _without_references(tree, problems)
    with collect(problems):
        _check_secrets(tree)
        tree = expand_home(tree)
        _start_from_recorded(tree, set(_leaves(dict(changes))), path)
        _note_what_follows(tree)
    with collect(problems):
        _fill_classes(tree, count=count_classes)
    cfg = read(schema, tree, problems)
    if also is not None:
        with collect(problems):
            also(cfg)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return cfg


def to_yaml(cfg: Recipe) -> str:
    """The whole configuration as yaml text that :func:`load` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def _schema_of(page: Tree, changes: list[tuple[str, Any]], path: str | Path) -> type:
    name = next((value for key, value in reversed(changes) if key == "recipe"), page.get("recipe"))
    if not isinstance(name, str) or name not in CONFIGS:
        given = None if name is None or is_null(name) else name
        hint = did_you_mean(str(name), CONFIGS) or " Write recipe: supervised."
        raise ConfigError(f"recipe must be one of {', '.join(sorted(CONFIGS))}, got {given!r} in {path}.{hint}")
    return CONFIGS[name]


def _with_name(run: Any, stem: str) -> Any:
    return {"name": stem, **run} if isinstance(run, dict) else run


def _apply(schema: type, tree: Tree, key: str, value: Any, problems: list[str]) -> None:
    *above, last = key.split(".")
    for at, name in enumerate(above):
        below = tree.get(name)
        if isinstance(below, list):
            whole = ".".join(above[: at + 1])
            problems.append(f"{key} must be a key of {whole}, which is a list. Write {whole}=[..., ...].")
            return
        tree[name] = dict(below) if isinstance(below, dict) else {}
        tree = tree[name]
    _put(schema, tree, [*above, last], value, problems)


def _put(schema: type, tree: Tree, path: list[str], value: Any, problems: list[str]) -> None:
    """Set ``path``, whose last name is in ``tree``; entries of a mapping are merged, and removed by null."""
    name, old = path[-1], tree.get(path[-1])
    if is_null(value) and is_mapping(schema, path[:-1]):
        if name in tree:
            del tree[name]
            return
        if is_mapping(schema, path):  # an algorithm: it has no value null
            hint = did_you_mean(name, list(tree)) or f" There are: {', '.join(tree) or 'none'}."
            problems.append(f"{'.'.join(path)} must be an entry that can be removed, it is not there.{hint}")
            return
    if isinstance(value, dict) and value and isinstance(old, dict):
        tree[name] = dict(old)
        for below, entry in value.items():
            _put(schema, tree[name], [*path, below], entry, problems)
        return
    tree[name] = value


def _fill_classes(tree: Tree, *, count: bool) -> None:
    """Give the model as many classes as the data set has, where ``model.num_classes`` is null or left out.

    Raises:
        ConfigError: A data set that does not list its classes, or has none.
    """
    model, data = tree.get("model"), tree.get("data")
    if tree.get("recipe") not in _LABELLED or not isinstance(model, dict) or not isinstance(data, dict):
        return
    given = model.get("num_classes")
    if not model or (given is not None and not is_null(given)):
        return
    tree["model"] = {**model, "num_classes": Plain("2")}  # where there is an error, it is the only one
    if not count:
        return
    path = Path(str(data.get("local")), str(data.get("train_split", Data.train_split)), layout.CLASS_NAMES)
    names: Any = None
    with suppress(OSError, ValueError):
        names = read_json(path, _MOST_NAMES)
    if not isinstance(names, list):
        rule = f"a number, or left out where {path} lists the classes, which it does not"
        raise ConfigError(f"model.num_classes must be {rule}. Write it with `vitcomposer convert`, or set a number.")
    if len(names) < 2:
        raise ConfigError(no_classes(path))
    tree["model"]["num_classes"] = Plain(str(len(names)))


def _start_from_recorded(tree: Tree, given: set[str], path: Path) -> None:
    """Give the tree the architecture of the run, or of the exported model, whose weights it starts from.

    What the command line gave of it stays, and is compared with the weights as they are loaded. A run that goes on has
    its own record of it: the folder that it started from may be gone.
    """
    init, run, model = (tree.get(block) for block in ("init", "run", "model"))
    weights = init.get("weights") if isinstance(init, dict) else None
    if not isinstance(weights, str) or is_null(weights) or not isinstance(model, dict) or not isinstance(run, dict):
        return
    if path.name == layout.CONFIG and "init.weights" not in given:
        return  # a run's own page, which says what its network became
    own = Path(str(run.get("folder", Run.folder)), str(run.get("name"))) / layout.LATEST_CHECKPOINT
    started = recorded_page(own).get("init")
    source = own if isinstance(started, dict) and started.get("weights") == weights else weights
    recorded, measured_as_it_is = recorded_model(source), tree.get("recipe") in ("probe", "knn")
    if not recorded:
        return
    taken = _text_of(take_over(model, recorded, size=measured_as_it_is))
    tree["model"] = {**taken, **{key: value for key, value in model.items() if f"model.{key}" in given}}
    block, prefix = (tree, "") if tree.get("recipe") == "knn" else (tree.get("augment"), "augment.")
    if measured_as_it_is and isinstance(block, dict):
        statistics = _text_of(recorded_statistics(source))
        block.update({key: value for key, value in statistics.items() if f"{prefix}{key}" not in given})


def _note_what_follows(tree: Tree) -> None:
    """Write into ``init.follow`` which keys the yaml leaves to weights on a hub."""
    init = tree.get("init")
    if (
        not isinstance(init, dict)
        or not is_on_hub(init.get("weights"))
        or not is_null(init.get("follow", Plain("null")))
    ):
        return
    colors = tree if tree.get("recipe") == "knn" else tree.get("crops", tree.get("augment"))
    places = {
        "mean": colors,
        "std": colors,
        "crop_ratio": tree.get("evaluation"),
        "interpolation": tree.get("evaluation"),
    }
    open_keys = [key for key in FOLLOWED if isinstance(block := places[key], dict) and key not in block]
    tree["init"] = {**init, "follow": open_keys}


def _leaves(block: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _text_of(value: Any) -> Any:
    """Values of Python as a tree; what is text already stays as it is."""
    if isinstance(value, dict):
        return {key: _text_of(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_text_of(entry) for entry in value]
    if isinstance(value, str):
        return value
    return Plain("null" if value is None else str(value).lower())


def _references(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """The texts with ``${...}``, each after its key."""
    if isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _references(entry, f"{key}.{name}" if key else str(name))
    elif "${" in value:
        yield key, value


def _plain(value: Any) -> Any:
    """The same in str alone: OmegaConf knows no subclasses of it."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if is_null(value) else str(value)


def _without_references(tree: Tree, problems: list[str]) -> Tree:
    """The tree with what its ``${...}`` refer to; one that cannot be had is noted and left as it is."""

    def answered(value: Any, key: str, root: Any) -> Any:
        if isinstance(value, dict):
            return {name: answered(entry, f"{key}.{name}" if key else name, root) for name, entry in value.items()}
        if isinstance(value, list):
            return [answered(entry, f"{key}.{at}", root) for at, entry in enumerate(value)]
        if "${" not in value:
            return value
        try:
            found = OmegaConf.select(root, key)
            found = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        except (OmegaConfBaseException, ConfigError) as error:
            problems.append(_explain_reference(key, value, error))
            return value
        return _as_tree(found)

    references = dict(_references(tree, ""))
    for key, text in references.items():
        try:
            OmegaConf.create({"x": str(text)})
        except OmegaConfBaseException:
            problems.append(
                f"{key} must hold references that are whole, got {text!r}. Close its braces, or take the ${{ out."
            )
            return tree
    return answered(tree, "", OmegaConf.create(_plain(tree))) if references else tree


def _as_tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _as_tree(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_as_tree(entry) for entry in value]
    return Plain("null" if value is None else value)


def _explain_reference(key: str, text: str, error: BaseException) -> str:
    """One line for a reference that leads nowhere, without OmegaConf's words."""
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, ConfigError):
            return f"{key} cannot be had: {each}"
        each = each.__cause__ or each.__context__
    return (
        f"{key} must refer to a key of this yaml or to a variable of the environment that is set, got {text!r}. "
        'Write the value itself; on a command line, have the shell write it: key="$NAME".'
    )


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
