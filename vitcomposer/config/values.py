"""Turns a tree of text into frozen dataclasses: each value by the type of its field, every problem noted."""

import difflib
import math
import re
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vitcomposer.config.foreign_names import ours_for
from vitcomposer.config.trees import Plain, Tree, is_null
from vitcomposer.errors import collect

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_INTEGER = re.compile(r"[-+]?\d[\d_]*")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)


class _Unusable(Exception):
    """A value has another type; the problem is noted already."""


def read(cls: type, tree: Tree, problems: list[str]) -> Any:
    """The dataclass of a recipe from a tree, with what is wrong with it added to ``problems``.

    Returns:
        The dataclass. After problems it may lack fields, and serves only to be looked at further.
    """
    for path in _unknown(cls, tree):
        problems.append(f"{path} is no key of this recipe.{suggest_key(cls, path)}")
    return _build(cls, tree, problems, "")


def _build(cls: type, tree: Any, problems: list[str], prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise _refuse(problems, prefix[:-1], "a block of keys and values", tree, "Write its keys below it.")
    values: dict[str, Any] = {}
    for field in fields(cls):
        key = f"{prefix}{field.name}"
        if field.name in tree:
            with suppress(_Unusable):
                values[field.name] = _convert(_hints(cls)[field.name], tree[field.name], key, problems)
        elif field.default is not MISSING:
            values[field.name] = field.default
        elif field.default_factory is not MISSING:
            values[field.name] = field.default_factory()
        else:
            problems.append(f"{key} is required and missing. Add it to the yaml.")
    # Not cls(**values): one field that cannot be had would keep the others from being looked at.
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    check = getattr(made, "__post_init__", None)
    if check is not None:
        with collect(problems):
            check()
    return made


def known(made: object, key: str) -> Any:
    """The value of a dotted key of what :func:`read` made; None where it is null, unknown, or wrong and so left out."""
    for part in key.split("."):
        made = getattr(made, part, None)
    return made


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def block_of(hint: Any) -> type | None:
    """The dataclass that a type is, or may be beside None."""
    return next((each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)), None)


def is_mapping(cls: type, parts: list[str]) -> bool:
    """Whether the key has free entries below it, as ``algorithms``, ``algorithms.EMA`` and ``optimizer.options``."""
    hint: Any = cls
    for at, part in enumerate(parts):
        block = block_of(hint)
        if block is None or part not in _hints(block):
            return False
        hint = _hints(block)[part]
        if get_origin(hint) is dict:
            return at == len(parts) - 1 or get_origin(get_args(hint)[1]) is dict
    return False


def _unknown(cls: type, tree: Tree, prefix: str = "") -> Iterator[str]:
    """Dotted names of what ``cls`` does not have, down to the values."""
    for name, value in tree.items():
        hint = _hints(cls).get(name)
        block = block_of(hint)
        if hint is None:
            yield from (f"{prefix}{name}{below}" for below in _leaves(value))
        elif block is not None and isinstance(value, dict):
            yield from _unknown(block, value, f"{prefix}{name}.")


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, entry in value.items():
            yield from (f".{name}{below}" for below in _leaves(entry))
    else:
        yield ""


@cache
def _all_keys(cls: type, prefix: str = "") -> tuple[str, ...]:
    found: list[str] = []
    for name, hint in _hints(cls).items():
        block = block_of(hint)
        found += [f"{prefix}{name}"] if block is None else _all_keys(block, f"{prefix}{name}.")
    return tuple(found)


def suggest_key(cls: type, path: str) -> str:
    """`` Did you mean optimizer.lr?`` for a key that a recipe does not have; also for what others call one of its."""
    ours = ours_for(path)
    if ours is not None:
        return f" Use {ours}."
    keys, last = _all_keys(cls), path.rpartition(".")[2]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    names = {key.rpartition(".")[2]: key for key in keys}
    near = (
        [key for key in same if difflib.get_close_matches(path, [key], cutoff=0.7)]
        or [key for key in keys if key.startswith(path)]
        or difflib.get_close_matches(path, keys, n=1, cutoff=0.75)
        or same
        or [names[name] for name in difflib.get_close_matches(last, names, n=1)]
    )
    return f" Did you mean {' or '.join(near[:3])}?" if near else ""


def _convert(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in args and is_null(value):
            return None
        return _convert_choice([arg for arg in args if arg is not type(None)], value, key, problems)
    if block_of(hint) is hint:
        return _build(hint, value, problems, f"{key}.")
    if origin is dict:
        return _convert_mapping(args[1], value, key, problems)
    if origin in (list, tuple):
        return _convert_list(origin, args, value, key, problems)
    if hint is Any:
        return _by_looks(value, key, problems)
    if isinstance(value, dict | list) or is_null(value):
        remedy = "Quote it if it is a text." if hint is str else "Give one value."
        raise _refuse(problems, key, _rule(hint), value, remedy)
    if hint is str:
        return str(value)
    if origin is Literal:
        if value in args:
            return str(value)
        near = difflib.get_close_matches(value, args, n=1) or [name for name in args if str(value) in name]
        raise _refuse(problems, key, _rule(hint), value, f"Did you mean {near[0]}?" if near else "Choose one.")
    found = _number_or_truth(hint, value)
    if found is None:
        raise _refuse(problems, key, _rule(hint), value, _REMEDIES[hint])
    return found


def _refuse(problems: list[str], key: str, rule: str, value: Any, remedy: str) -> _Unusable:
    given = "null" if is_null(value) else repr(_as_shown(value))
    problems.append(f"{key} must be {rule}, got {given}. {remedy}")
    return _Unusable()


def _convert_list(kind: type, hints: tuple[Any, ...], value: Any, key: str, problems: list[str]) -> Any:
    if not isinstance(value, list):
        remedy = f"Write it like {key}=[{'..., ' * (len(hints) - 1)}...]."
        raise _refuse(problems, key, "a list", value, remedy)
    if kind is tuple and len(value) != len(hints):
        raise _refuse(problems, key, f"a list of {len(hints)} values", value, "Give all of them.")
    of_each = hints if kind is tuple else hints * len(value)
    pairs = enumerate(zip(of_each, value, strict=True))
    return kind(_convert(hint, entry, f"{key}[{at}]", problems) for at, (hint, entry) in pairs)


_REMEDIES = {
    int: "Write it like 8, without a point.",
    float: "Write it like 0.1 or 1e-3.",
    bool: "Write true or false.",
}


def _rule(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return {str: "a text", int: "a whole number", float: "a finite number", bool: "true or false"}[hint]


def _number_or_truth(hint: Any, value: str) -> int | float | bool | None:
    text = value.strip()
    if hint is bool:
        return True if text.lower() in _TRUE else False if text.lower() in _FALSE else None
    if hint is int and _INTEGER.fullmatch(text):
        return int(text)
    if hint is float and _NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return None


def _convert_choice(hints: list[Any], value: Any, key: str, problems: list[str]) -> Any:
    """Of ``int | str`` the number, where the value is written as one."""
    if len(hints) == 1:
        return _convert(hints[0], value, key, problems)
    number = _number_or_truth(int, value) if isinstance(value, Plain) else None
    return _convert(str, value, key, problems) if number is None else number


def _convert_mapping(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    if is_null(value):
        return {}
    if not isinstance(value, dict):
        raise _refuse(problems, key, "keys and values", value, f"Write it like {key}={{NAME: VALUE}}.")
    if get_origin(hint) is dict:  # what is null there is left out
        value = {name: entry for name, entry in value.items() if not is_null(entry)}
    return {name: _convert(hint, entry, f"{key}.{name}", problems) for name, entry in value.items()}


def _by_looks(value: Any, key: str, problems: list[str]) -> Any:
    """An argument of somebody else's class, whose type we don't know."""
    if isinstance(value, dict):
        return {name: _by_looks(entry, f"{key}.{name}", problems) for name, entry in value.items()}
    if isinstance(value, list):
        return [_by_looks(entry, f"{key}[{at}]", problems) for at, entry in enumerate(value)]
    if not isinstance(value, Plain):
        return str(value)
    if is_null(value):
        return None
    if value.lower() in _TRUE[:3] + _FALSE[:3]:
        return value.lower() in _TRUE
    if _NOT_FINITE.fullmatch(value) or (_NUMBER.fullmatch(value) and not math.isfinite(float(value))):
        problems.append(f"{key} must be a finite number, got {str(value)!r}. Quote it if it is a text.")
        raise _Unusable
    number = _number_or_truth(int, value)
    number = _number_or_truth(float, value) if number is None else number
    return str(value) if number is None else number


def _as_shown(value: Any) -> Any:
    """A tree as a user knows it: numbers without quotes."""
    if isinstance(value, dict):
        return {name: _as_shown(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_as_shown(entry) for entry in value]
    if isinstance(value, Plain):
        number = _number_or_truth(int, value)
        number = _number_or_truth(float, value) if number is None else number
        return str(value) if number is None else number
    return value
