"""Defines every error that a user can see, and collects those of a configuration so that all are reported at once."""

import difflib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_noted: ContextVar[list[str] | None] = ContextVar("noted", default=None)  # what `collect` gathers


class ConfigError(ValueError):
    """Keys of the yaml or of the command line that cannot be used; each problem names key, rule, value and remedy.

    Args:
        problems: One or more lines, each about one key, with which it begins.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) < 2:
            return "".join(self.problems)
        pairs = [problem.partition(" ")[::2] for problem in self.problems]
        width = max(len(key) for key, _ in pairs)
        return f"{len(pairs)} keys cannot be used\n" + "\n".join(f"  {key:<{width}}  {text}" for key, text in pairs)


def require(condition: bool, key: str, rule: str, given: Any, remedy: str) -> None:
    """Raise ConfigError in the one form that every configuration error of vitcomposer has.

    Within :func:`collect` the problem is noted and what comes next is looked at too.
    """
    if condition:
        return
    problem, noted = f"{key} must be {rule}, got {given!r}. {remedy}", _noted.get()
    if noted is None:
        raise ConfigError(problem)
    noted.append(problem)


def require_within(key: str, value: Any, low: float, high: float, remedy: str) -> None:
    """:func:`require` of a number, or of each of a list; None is a value that is left to somebody else."""
    values = [each for each in (value if isinstance(value, list | tuple) else [value]) if each is not None]
    small = any(each < low for each in values)
    fits = not small and all(each <= high for each in values)
    require(fits, key, f"{low} or more" if small else f"at most {high}", value, remedy)


@contextmanager
def collect(problems: list[str]) -> Iterator[None]:
    """Add what is wrong to ``problems`` instead of raising it.

    A failure of another kind, after a problem was found, follows from it (a maximum of an empty list) and is dropped.
    """
    token = _noted.set(problems)
    try:
        yield
    except ConfigError as error:
        problems.extend(error.problems)
    except Exception:
        if not problems:
            raise
    finally:
        _noted.reset(token)


@contextmanager
def noting() -> Iterator[None]:
    """Have a check that fails not keep those after it from being made, where problems are collected."""
    noted = _noted.get()
    try:
        yield
    except ConfigError as error:
        if noted is None:
            raise
        noted.extend(error.problems)
    except AttributeError:  # of a field that cannot be had, which is noted already
        if not noted:
            raise


def did_you_mean(given: str, known: Collection[str]) -> str:
    """`` Did you mean 'x'?`` with the nearest known name, or nothing; small and capital letters are the same."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(given, known, n=1) or difflib.get_close_matches(given.lower(), names, n=1)
    return f" Did you mean {names.get(near[0], near[0])!r}?" if near else ""


def no_classes(class_names: object) -> str:
    """The message where a recipe with labels meets images without; ``class_names`` is the path of their list."""
    return (
        f"data.local must be a data set of two classes or more, {class_names} lists fewer. Convert one folder per "
        "class, or train without labels: swav, dino."
    )


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a weight is NaN or infinite; says step, layer, samples, the last checkpoint and a remedy.

    All ranks raise it at the same place with the same message.
    """


class SaveError(RuntimeError):
    """What a run leaves could not be written; for a checkpoint all ranks raise it, with the same message."""


class ShardError(RuntimeError):
    """A shard that cannot be had or is damaged; the message names shard, cause and remedy."""
